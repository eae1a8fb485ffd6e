"""What a training asks of whatever spreads a model over processes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.trainers.checkpoint import LoadedCheckpoint
from finetune.trainers.optim import OptimizerConfig, OptimizerState


class Engine(Protocol):
    """One way of running a model on one or several processes.

    Made around the module, before there is an optimizer; ``start`` puts the weights in place and makes one. A step is:
    ``micro_batch`` around the forward and ``backward`` of each of this process's micro-batches; after the last,
    ``clip`` and then ``step``. Between the two the gradients are the whole step's: this is where a bad step is found
    and left undone (``drop_gradients``).
    """

    name: str
    """For people, such as ``DDP``."""
    lockstep: bool
    """Whether every forward pass communicates, also outside training: then all processes must make equally many."""
    sharded: bool
    """Whether ``weights`` and ``optimizer_state`` give parts of the whole, to be saved by all processes together."""

    @property
    def model(self) -> nn.Module:
        """What forward passes go through."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What trains, by name, as the optimizer sees it: this process's share of each parameter, or all of it."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """After ``start``."""

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        """Make the optimizer, over the weights of a checkpoint if one is continued.

        Raises:
            ConfigError: if this engine cannot train with this optimizer.
            CheckpointError: if the checkpoint belongs to another model, method or optimizer.
        """

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around one micro-batch; in the ``last`` one of a step, at the latest, processes exchange gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar. Over a step, the gradient is the mean over processes of what each adds."""

    def clip(self, limit: float, *, scale: float = 1.0) -> float:
        """Divide the step's gradients by ``scale``, then clip them to a global L2 norm of ``limit``.

        Returns:
            The norm over all parameters of all processes, after ``scale`` and before clipping; the same number on
            every process.
        """

    def step(self) -> None:
        """Update the weights and forget the gradients."""

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not to be taken."""

    def replicas(self) -> Mapping[str, Tensor]:
        """Tensors that every process must hold alike at this point: after ``clip``, weights and gradients by name."""

    def precise(self) -> Mapping[str, Tensor]:
        """The tensor that the optimizer updates behind each of ``parameters``: its master copy, or itself."""

    def weights(self) -> Mapping[str, Tensor]:
        """What trains, by name, to be saved."""

    def optimizer_state(self) -> OptimizerState:
        """What the optimizer has accumulated, to be saved."""

    def shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors``, formed like ``parameters``, to be saved beside them."""

    def read(self, saved: LoadedCheckpoint, part: str) -> Mapping[str, Tensor] | None:
        """One part of a checkpoint, formed like ``parameters``; None where the checkpoint has no such part."""
