"""Back ends of thought_delta: ``reference``, one row after another; ``matmul``, in chunks; ``fla``, by its kernels."""

CHUNK = 32  # text positions between stored states
