"""Thoughts: where they begin, how they are sampled, the pass that trains them, and generation with them."""
