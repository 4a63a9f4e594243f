"""Methods that teach a model to reason from its own chains of thought, built on ``quietstar``.

A file or a folder per method: ``star``, ``vstar``, ``solve``, ``internalize``, ``score``, ``fast``. Each has a ``Config``,
whose fields are the command's options, a function of the method's name that runs it, and the command, which pyproject.toml
registers as an entry point of the group "quietstar.commands". ``common`` holds what several methods share, ``tasks`` the
problems.
"""
