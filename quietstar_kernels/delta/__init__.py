"""Back ends of thought_delta: ``reference``, one row after another; ``matmul``, in chunks; ``fla``, by its kernels."""
