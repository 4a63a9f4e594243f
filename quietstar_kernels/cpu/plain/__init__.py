"""Attention and decoding on CPUs in PyTorch's own operations: its flash attention for the text, small matmuls for the rest."""
