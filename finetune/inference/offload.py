"""Weights that wait in host memory while videos are sampled, through diffusers' own hooks; no number changes by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch

from finetune.core.types import Offload

OFFLOADS: tuple[Offload, ...] = get_args(Offload)
"""The fastest first."""


@contextmanager
def offloading(pipeline: Any, how: Offload, device: torch.device) -> Iterator[None]:
    """Inside, a pipeline's modules are on ``device`` while they compute; diffusers' own hooks see to it.

    With ``group`` and ``sequential`` the modules keep their hooks: page-locking the weights takes seconds.

    Args:
        pipeline: its modules on the CPU; with ``none`` on ``device``, where they stay.
        how: which of them when.
        device: what computes.
    """
    if how == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif how in ("group", "sequential"):
        blocks: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        options = blocks if how == "group" else {"offload_type": "leaf_level"}
        options |= {"onload_device": device, "use_stream": device.type == "cuda"}
        if not _is_offloaded(pipeline.transformer):
            pipeline.transformer.enable_group_offload(**options)
        if how == "group":
            pipeline.vae.to(device)
        elif not _is_offloaded(pipeline.vae):
            pipeline.vae.enable_group_offload(**options)
    try:
        yield
    finally:
        if how == "model":
            pipeline.remove_all_hooks()


def _is_offloaded(module: Any) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return bool(_is_group_offload_enabled(module))
