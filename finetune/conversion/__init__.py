"""From a checkpoint to weights for others: merged or as they are, verified, with a model card."""
