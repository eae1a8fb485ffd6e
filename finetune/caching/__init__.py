"""Filling the cache: what a run asks of it, what is in its dataset, and the encoders that make what is missing."""
