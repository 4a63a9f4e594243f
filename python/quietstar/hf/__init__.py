"""What the wrapper knows about Hugging Face models: architectures, attention, caches, heads, adapters, graphs."""
