"""What the wrapper knows about transformers: architectures, attention, caches, adapters."""
