"""Ways to teach a model to reason from its own thoughts, one file a method, over the public parts of ``quietstar``."""
