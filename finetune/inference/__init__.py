"""Videos from a prompt, latents or another video: requests, adapters, sampling, inversion, and files of frames."""
