"""Memory techniques: one file each, each proven to leave loss and gradients unchanged."""
