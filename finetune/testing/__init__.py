"""Tiny models, demo clips and the quickstart: what tests share with a user's first try."""
