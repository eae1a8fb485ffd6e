"""Optimizers, how they train weights in 16 bits, their state without pickle, and the moving average of weights."""
