"""Benchmarks of every operation and of whole models against what people use without this package.

``python -m benchmarks.run --help`` measures this machine; ``python -m benchmarks.gpu --help`` tests and measures a GPU.
"""
