"""Texts and thoughts to train on, as the examples that ``run.batches`` makes batches of."""
