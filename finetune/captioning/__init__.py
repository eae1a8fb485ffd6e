"""Captions for clips, from a video-language model on this machine or behind an OpenAI-compatible endpoint."""
