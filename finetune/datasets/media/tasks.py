"""Requests to answers, in whichever process: a worker's work, and what ``DecodePool`` does itself without workers."""

from __future__ import annotations

from finetune.datasets.media import frames
from finetune.datasets.media.limits import too_much_memory
from finetune.datasets.media.wire import Answer, ClipRequest, Pixels, ProbeRequest, Request
from finetune.errors import DataError


def answer(request: Request) -> Answer:
    """Do what is asked; a file that cannot be used gives its ``DataError``, which is an answer like another."""
    try:
        if isinstance(request, ProbeRequest):
            return frames.probe_file(request.path)
        if isinstance(request, ClipRequest):
            clip = frames.read_clip(request.path, request.header, request.plan)
            if request.image is None:
                return Pixels(clip, None)
            return Pixels(clip, frames.read_fitted_image(request.image, request.plan.bucket))
        return Pixels(None, frames.read_fitted_image(request.path, request.bucket))
    except DataError as error:
        return error
    except MemoryError:
        return too_much_memory(str(request.path))
