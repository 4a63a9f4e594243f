"""``make gpu``: correctness, build, tests, benchmarks and sanitizers of a GPU in one command."""
