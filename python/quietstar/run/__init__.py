"""A training run: batches, optimizer, metrics, checkpoints, resuming."""
