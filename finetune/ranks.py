"""What the processes of one launch say to each other outside training: plain objects, however long a process takes.

Encoding a large dataset takes hours and the processes do not finish together, while NCCL gives up on a collective after
ten minutes. Everything here therefore goes through a gloo group with a patient timeout; a process that dies still ends
the others at once, because its connections close.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

from finetune.errors import CacheError, FinetuneError

PATIENCE = timedelta(days=7)

_Result = TypeVar("_Result")


def on_cpu() -> bool:
    """Whether to compute on the CPU: asked for (ACCELERATE_USE_CPU), or because there is no CUDA.

    Asked here because PartialState does not look at the variable by itself, and because accelerate would choose Apple's
    GPU, which has no float64.
    """
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.cuda.is_available()


@dataclass(frozen=True)
class Ranks:
    """One process among those of its launch."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    _group: Any = None

    @classmethod
    def current(cls) -> Ranks:
        """The processes that ``accelerate launch`` or ``torchrun`` started; one, where neither did.

        All of them must call this at the same point.
        """
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu())
        group = None
        if state.num_processes > 1:
            group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device, group)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and decides."""
        return self.rank == 0

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` on the main process alone and give every process its result.

        Raises:
            Exception: what ``work`` raised, on the main process; a ``FinetuneError`` that says so on the others.
        """
        result, error = _attempt(work) if self.is_main else (None, None)
        if self.world > 1:
            box = [(result, _portable(error, self.rank))]
            torch.distributed.broadcast_object_list(box, src=0, group=self._group)
            result, said = box[0]
            error = error or said
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # there is a result where there was no error

    def all(self, work: Callable[[], _Result]) -> list[_Result]:
        """Run ``work`` on every process and give every process all results, in order of rank.

        One that fails is waited for like the others, so that none hangs in a collective.

        Raises:
            Exception: what ``work`` raised here; where it failed only elsewhere, a ``FinetuneError`` that says so.
        """
        result, error = _attempt(work)
        if self.world == 1:
            if error is not None:
                raise error
            return [result]  # type: ignore[list-item]  # as above
        if error is not None:  # said now: the others may take hours to come here
            print(f"process {self.rank} stopped and waits for the others: {error}", file=sys.stderr, flush=True)
        outcomes: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(outcomes, (result, _portable(error, self.rank)), group=self._group)
        for failed in [error, *(said for _, said in outcomes)]:
            if failed is not None:
                raise failed
        return [outcome for outcome, _ in outcomes]


def _attempt(work: Callable[[], _Result]) -> tuple[_Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # handed to every process, and raised there
        return None, error


def _portable(error: Exception | None, rank: int) -> FinetuneError | None:
    """The error as other processes get it: their own kind as it is, anything else in words, since it may not pickle."""
    if error is None or isinstance(error, FinetuneError):
        return error
    return CacheError(f"process {rank} stopped: {type(error).__name__}: {error}", fix="its own message says more")
