"""Methods that teach a model to reason from its own chains of thought. Experimental: interfaces may change.

Each method has a folder: ``star``, ``vstar``, ``solve``, ``internalize``, ``score`` and ``fast``. In it, ``run`` has a
``Config``, whose fields are the command's options, and a function of the method's name; ``command`` has the command, an entry
point of the group "quietstar.commands" in pyproject.toml. ``common`` holds what several methods share, ``tasks`` the problems.

The function of a method runs it in the folder ``config.out`` or, with ``resume``, what a stopped run there lacks, with the same
numbers. It takes ``name``, the model's, which must then be as it was. It raises ValueError if a run is there that has other
settings, or that was not to be resumed. STaR and V-STaR continue after their last complete round. In the others SIGTERM,
SIGHUP, SIGUSR1 and Ctrl-C finish the current update and save, and then ``Interrupted`` is raised.
"""
