"""thought_attention on GPUs: the forward and the backward, each in files of its own."""

from quietstar_kernels.triton._attention_backward import thought_attention_backward
from quietstar_kernels.triton._attention_forward import thought_attention

__all__ = ["thought_attention", "thought_attention_backward"]
