"""Questions with answers: reading them, asking them, and scoring what the model answers."""
