"""Whether all processes hold the same where they must: a check for those who doubt a machine, or this package."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.files import checksum_bytes
from finetune.ranks import Ranks


def require_agreement(step: int, named: Mapping[str, Tensor], facts: Mapping[str, object], ranks: Ranks) -> None:
    """Compare tensors bit for bit, and facts as they print, over all processes; all must call this at once.

    Args:
        step: which optimizer step, from 0.
        named: tensors by what a person would call them; brought to the CPU one at a time.
        facts: such as the gradient norm.
        ranks: the processes.

    Raises:
        TrainingError: on every process, naming the first difference and the processes that have another value than
            the first one.
    """
    mine = {name: str(fact) for name, fact in facts.items()} | {name: _checksum(t) for name, t in named.items()}
    everyone = ranks.all(lambda: mine)
    first = everyone[0]
    for name in {name: None for values in everyone for name in values}:
        odd = [rank for rank, values in enumerate(everyone) if values.get(name) != first.get(name)]
        if odd:
            raise TrainingError(
                f"step {step}: the {name} differs between processes: {', '.join(f'process {rank}' for rank in odd)}"
                " and process 0 do not hold the same; the weights were not updated",
                where="train.check_ranks",
                fix="the run before the last checkpoint may be wrong as well: continue from an earlier one, on other"
                " hardware; if it comes again at the same step, this is a bug",
            )


def _checksum(tensor: Tensor) -> str:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return checksum_bytes(flat.view(torch.uint8).numpy().data)
