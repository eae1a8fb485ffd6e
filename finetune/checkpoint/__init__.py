"""A run's checkpoints: what they are made of, writing and reading them whole, in one file or in shares."""
