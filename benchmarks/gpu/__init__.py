"""``make gpu``: correctness, build, tests, benchmarks, goals and sanitizers of a GPU in one command."""
