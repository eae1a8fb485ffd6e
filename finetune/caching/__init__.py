"""What stands behind ``finetune.precompute``: what is asked of the cache, what it lacks, and the two encoder passes."""
