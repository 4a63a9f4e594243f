"""The time that a call costs the host, measured in a process of its own."""
