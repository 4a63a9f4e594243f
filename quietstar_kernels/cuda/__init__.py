"""CUDA kernels for NVIDIA GPUs from sm_80 on, compiled from csrc/ when the package is built."""
