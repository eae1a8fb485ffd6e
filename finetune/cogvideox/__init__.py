"""CogVideoX itself: a checkpoint in numbers, its parts in memory, encoding, one denoising call, the objective."""
