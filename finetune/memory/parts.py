"""The parts that ``blocks.Blocks`` is put together from: how a block is computed, where its weights and inputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from finetune.memory.attention import AttentionTape

GradientSink = Callable[[int, Sequence[tuple[nn.Parameter, Tensor]]], None]
"""Takes the gradients of one block's parameters, by the block's index, in the backward pass."""


@dataclass(frozen=True)
class BlockInputs:
    """What a block is called with."""

    hidden: Tensor
    """Video tokens [B, S, D]."""
    encoder: Tensor
    """Text tokens [B, T, D]."""
    temb: Tensor
    """Time embedding [B, E]."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, float32 [S, head dim]; None for a model with other positions."""
    seed: int | None = None
    """Of this call's dropout masks, for a ``BlockMath`` that is ``seeded``; None where no dropout is active."""


@dataclass
class BlockGradients:
    """Gradients of a block's inputs and parameters; None where none was asked for."""

    hidden: Tensor | None
    encoder: Tensor | None
    temb: Tensor | None
    parameters: list[Tensor | None]


@dataclass(frozen=True)
class Wanted:
    """Which inputs of a block need a gradient."""

    hidden: bool
    encoder: bool
    temb: bool


class BlockMath(Protocol):
    """How one block is computed, forward and backward. Both are called without gradient recording."""

    seeded: bool
    """Whether dropout masks are drawn from ``BlockInputs.seed`` instead of the global generator."""

    def forward(self, block: nn.Module, inputs: BlockInputs, attention: AttentionTape) -> tuple[Tensor, Tensor]:
        """The block's outputs: video [B, S, D] and text [B, T, D]."""

    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        wanted: Wanted,
        attention: AttentionTape,
    ) -> BlockGradients:
        """Run the block again and give its gradients.

        Args:
            block: the block.
            inputs: as in the forward pass.
            grads: of the outputs; may be overwritten, nobody reads them afterwards.
            parameters: those that train, in the order in which their gradients are wanted.
            wanted: which inputs need a gradient.
            attention: what the forward pass kept.
        """


class Residency(Protocol):
    """Where the blocks' weights are. Every pass through a block is framed by these two."""

    def acquire(self, index: int, *, backward: bool) -> None:
        """After this, work that is queued on the current stream finds the block's weights on the device."""

    def release(self, index: int, *, backward: bool) -> None:
        """The work of this pass through the block is queued."""

    def invalidate(self) -> None:
        """Weights are written to, between passes. To be called before, so that no copy reads them, and after."""


class Boundaries(Protocol):
    """Where what enters a block waits for the backward pass."""

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> object:
        """Keep both; returns what ``get`` asks for."""

    def get(self, index: int, kept: Any) -> tuple[Tensor, Tensor]:
        """Both, on the device; called once for each ``put``, in reverse order."""

    def remove(self) -> None:
        """No more will be asked for, and passes may have been broken off: wait for copies that are under way."""


class Resident:
    """The ``Residency`` of weights that stay on the device."""

    def acquire(self, index: int, *, backward: bool) -> None:
        """See ``Residency``: nothing to do."""

    def release(self, index: int, *, backward: bool) -> None:
        """See ``Residency``: nothing to do."""

    def invalidate(self) -> None:
        """See ``Residency``: nothing to do."""


class KeptBoundaries:
    """The ``Boundaries`` that stay on the device."""

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Boundaries``."""
        return hidden, encoder

    def get(self, index: int, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See ``Boundaries``."""
        return kept

    def remove(self) -> None:
        """See ``Boundaries``: nothing to do."""
