"""Triton kernels for NVIDIA GPUs from sm_80 on and for AMD; in Triton's interpreter they also run on a CPU, for tests."""
