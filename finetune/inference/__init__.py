"""Videos from a prompt: what is asked for, which adapters, sampling, and files of frames."""
