"""Headers and frames of media files as NumPy arrays, without torch; ``datasets.video`` gives them the package's types.

Nothing here imports torch, so that a decode worker process (``media.worker``) starts in a fraction of a second.
"""
