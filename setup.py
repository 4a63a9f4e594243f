"""The build switch, QUIETSTAR_BUILD=auto|cuda|python; everything else is in pyproject.toml."""

import os
import sys

from setuptools import setup

build = os.environ.get("QUIETSTAR_BUILD", "auto")
if build not in ("auto", "cuda", "python"):
    sys.exit(f"QUIETSTAR_BUILD must be auto, cuda or python, got {build!r}.")
if build == "cuda":
    sys.exit("QUIETSTAR_BUILD=cuda: there are no CUDA sources to build yet, so use auto or python.")

setup()
