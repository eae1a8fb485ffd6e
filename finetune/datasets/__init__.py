"""From files of clips and captions to batches: sources, decoding, the cache of latents, the order of samples."""
