"""Parts that several recipes share: models, sampling, training, evaluation, run folders, logs and plots."""
