"""A module that runs many times on the same shapes: one run is rehearsed, the others leave the same traces.

The VAE runs its coder once for every tile and every few frames, thousands of operations each time. All that differs is
when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from finetune.planning.ledger import Ledger, Piece


@dataclass(frozen=True)
class _View:
    """One tensor that a run gave back."""

    piece: int
    """Which of the run's pieces it lies in."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Run:
    pieces: tuple[Piece, ...]
    """With ticks from the run's begin."""
    ticks: int
    """How long it lasted."""
    output: tuple[object, ...]
    """Leaves of what it gave back, views in place of tensors."""
    spec: TreeSpec


@contextmanager
def rehearsed_once(ledger: Ledger, module: nn.Module) -> Iterator[None]:
    """Inside, a run of ``module`` on tensors of shapes that it has seen is not made again, but entered as it was.

    A run that gives back its arguments or two views of one storage, or leaves something behind elsewhere, is made every
    time.

    Args:
        ledger: entered.
        module: whose result depends on nothing but its arguments, without gradients.
    """
    real, known = module.forward, dict[object, _Run | None]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = _signature((args, kwargs))
        if (run := known.get(key)) is not None:
            return _replay(ledger, run)
        if key in known:
            return real(*args, **kwargs)
        output, known[key] = _record(ledger, lambda: real(*args, **kwargs))
        return output

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _signature(arguments: object) -> object:
    leaves, spec = tree_flatten(arguments)
    shapes = [
        (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    ]
    return str(spec), tuple(shapes)


def _record(ledger: Ledger, run: Callable[[], Any]) -> tuple[Any, _Run | None]:
    begin, first = ledger.tick, len(ledger.pieces)
    output = run()
    end = ledger.tick
    made = {id(piece): number for number, piece in enumerate(ledger.pieces[first:])}
    leaves, spec = tree_flatten(output)
    told: list[object] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            number = made.pop(id(ledger.piece_of(leaf)), None)
            if number is None:  # an argument, or two views of one storage
                return output, None
            told.append(_View(number, tuple(leaf.shape), leaf.stride(), leaf.dtype))
        else:
            told.append(leaf)
    pieces = tuple(piece.later(-begin) for piece in ledger.pieces[first:])
    left = {number for number, piece in enumerate(pieces) if piece.died > end - begin}
    if left != {leaf.piece for leaf in told if isinstance(leaf, _View)}:
        return output, None
    return output, _Run(pieces, end - begin, tuple(told), spec)


def _replay(ledger: Ledger, run: _Run) -> Any:
    kept: dict[int, Tensor] = {}
    output = list(run.output)
    for place, leaf in enumerate(output):
        if isinstance(leaf, _View):
            output[place] = kept[leaf.piece] = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype)
    ledger.enter_again(run.pieces, run.ticks, kept)
    return tree_unflatten(output, run.spec)
