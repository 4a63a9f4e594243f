"""Methods that teach a model to reason from its own chains of thought. Experimental: interfaces may change.

Each method has a folder: ``star``, ``vstar``, ``solve``, ``internalize``, ``score`` and ``fast``. In it, ``run`` has a
``Config``, whose fields are the command's options, and a function of the method's name; ``command`` has the command, an entry
point of the group "quietstar.commands" in pyproject.toml. ``common`` holds what several methods share, ``tasks`` the problems.
"""
