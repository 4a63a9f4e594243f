"""Methods that teach a model to reason from its own chains of thought, built on the public parts of ``quietstar``.

Each command has a file: ``star``, ``vstar``, ``solve``, ``internalize``, ``score`` and ``fast``, with a ``Config`` dataclass,
whose fields are the command's options, and a function of the file's name that runs it. Files that serve a single command begin
with its name (``vstar_verifier``). ``common`` holds what several recipes share, ``tasks`` the problems; a recipe imports no
other.

To add a recipe, write such a file, a command file in ``quietstar/cli``, and a test of the same name in
``tests/quietstar/recipes``; an experiment against its controls goes into ``experiments``.
"""
