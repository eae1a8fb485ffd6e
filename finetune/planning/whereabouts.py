"""What of a transformer runs at the moment, in words, for the figures of a rehearsal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.planning.ledger import Ledger

_PARTS = {"attn1": "attention", "ff": "feed-forward", "norm1": "modulation", "norm2": "modulation"}


class Whereabouts:
    """Keeps ``ledger.where`` up to date; see ``following``."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pass = self._block = self._part = ""

    def enter(self, name: str) -> None:
        """A pass begins, such as ``backward``."""
        self._pass, self._block, self._part = name, "", ""
        self._say()

    def block(self, number: int, count: int) -> None:
        """The pass has come to a block."""
        self._block, self._part = f"block {number} of {count}", ""
        self._say()

    def part(self, name: str) -> None:
        """It has come to a part of the block, or left it (an empty name)."""
        self._part = name
        self._say()

    def _say(self) -> None:
        self._ledger.where = ", ".join(word for word in (self._pass, self._block, self._part) if word)


@contextmanager
def following(ledger: Ledger, transformer: nn.Module) -> Iterator[Whereabouts]:
    """Hooks on ``transformer`` that tell where a pass is, also a backward pass; they change nothing."""
    here = Whereabouts(ledger)
    blocks = list(transformer.get_submodule("transformer_blocks").children())
    handles = []
    for number, block in enumerate(blocks):
        handles += _follow_block(here, block, number, len(blocks))
    try:
        yield here
    finally:
        for handle in handles:
            handle.remove()


def _follow_block(here: Whereabouts, block: nn.Module, number: int, count: int) -> list[Any]:
    def backward_begins(gradient: Tensor) -> None:
        here.block(number, count)

    def ends(_module: nn.Module, _inputs: object, output: Any) -> None:
        here.part("")
        if torch.is_grad_enabled():
            # The first gradient that reaches a block's output is the first sign of its backward pass.
            for tensor in output if isinstance(output, tuple) else (output,):
                if tensor.requires_grad:
                    tensor.register_hook(backward_begins)

    handles = [block.register_forward_pre_hook(lambda *_: here.block(number, count)), block.register_forward_hook(ends)]
    for name, part in block.named_children():
        if name in _PARTS:
            handles.append(part.register_forward_pre_hook(lambda *_, said=_PARTS[name]: here.part(said)))
            handles.append(part.register_forward_hook(lambda *_: here.part("")))
    return handles
