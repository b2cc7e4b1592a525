"""A training run: its weights, optimizers, checkpoints, folder and processes."""
