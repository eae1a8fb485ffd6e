"""Memory techniques: how blocks are computed, where weights, activations and gradients are. ``config`` says which are
used, ``runner`` puts a transformer into that state.
"""
