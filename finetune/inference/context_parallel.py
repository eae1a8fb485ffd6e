"""One video on several processes: the transformer's tokens, or the two passes of guidance, divided among them.

Weights, latents, scheduler and VAE are whole in every process, and each arrives at the same video.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from finetune.cogvideox.spec import ModelSpec
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError
from finetune.core.types import Bucket
from finetune.parallel import context
from finetune.parallel.config import context_faults

Division = Literal["cfg", "context"]
"""What is divided: the batch of the conditional and the unconditional pass, or every pass's tokens."""


def division_faults(
    division: Division, spec: ModelSpec, bucket: Bucket, processes: int, *, guided: bool
) -> Iterator[ConfigError]:
    """Why a video cannot be divided.

    Args:
        division: what would be.
        spec: of the model.
        bucket: size of the video.
        processes: how many would share it.
        guided: whether there is guidance.
    """
    where = f"--parallel {division}, {processes} processes"
    if division == "cfg":
        if processes != 2:
            yield ConfigError(
                "guidance makes two passes, for two processes", where=where, fix="start two, or give --parallel context"
            )
        if not guided:
            yield ConfigError(
                "without guidance there is one pass, and nothing to divide",
                where=f"{where}, --guidance 1",
                fix="give --parallel context",
            )
        return
    for what, most in context_faults(spec, [bucket], processes):
        yield ConfigError(what, where=where, fix=f"start at most {most}")


def divide(transformer: Any, division: Division, ranks: ProcessGroup) -> None:
    """Have every call of a transformer be computed by all processes, which must all make it, with equal arguments.

    Args:
        transformer: unwrapped, with or without adapters, alike in all processes.
        division: without ``division_faults``.
        ranks: the processes, at least two.
    """
    if division == "context":
        context.divide(transformer, context.ContextGroup.of(ranks, ranks.world))
        return
    passes = _GuidancePasses(ranks)
    transformer.register_forward_pre_hook(passes.take, with_kwargs=True)
    transformer.register_forward_hook(passes.put_together)


class _GuidancePasses:
    """Hooks that give each process its pass of a call with guidance, and put the passes' outputs together.

    Args:
        ranks: the two processes.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self._ranks = ranks

    def take(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """One half of the batch."""
        divided = ("hidden_states", "encoder_hidden_states", "timestep")
        return args, kwargs | {name: kwargs[name].chunk(2)[self._ranks.rank] for name in divided}

    def put_together(self, _: Any, args: tuple[Any, ...], output: tuple[Tensor]) -> tuple[Tensor]:
        """Both halves in their order."""
        own = output[0].contiguous()
        parts = [torch.empty_like(own) for _ in range(self._ranks.world)]
        distributed.all_gather(parts, own)
        return (torch.cat(parts),)
