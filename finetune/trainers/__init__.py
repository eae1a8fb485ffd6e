"""One training run: put together, its steps, what watches it, and what is left when a step goes wrong."""
