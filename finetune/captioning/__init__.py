"""Captions for clips and long prompts, by a language model on this machine or behind an OpenAI-compatible endpoint."""
