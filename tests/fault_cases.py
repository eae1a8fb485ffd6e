"""What the processes of a ``launcher`` run in tests of faults: the command line, one of them hit in a forward pass."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest import mock

from launcher_cases import RANK, command


def hit(how: str, call: int, rank: int, *words: str) -> int:
    """The command line; process ``rank`` (-1: each) is hit when it begins its ``call``-th forward pass (from 1).

    Args:
        how: ``oom``, or the names of the signals that it gets, joined by ``+``.
        call: which pass.
        rank: which process.
        words: of the command line.
    """
    if rank not in (RANK, -1):
        return command(*words)
    from finetune.trainers.run import TrainedModel

    inner, calls = TrainedModel.losses, 0

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            _strike(how)
        return inner(*arguments, **named)

    with mock.patch.object(TrainedModel, "losses", watched):
        return command(*words)


def _strike(how: str) -> None:
    if how == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    for name in how.split("+"):
        os.kill(os.getpid(), getattr(signal, name))
