"""The command line: ``main`` runs a command; each command is a file of its name."""
