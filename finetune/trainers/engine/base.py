"""What the training loop asks of whatever spreads a model over processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """One way of running a model on one or several processes.

    A step is: ``micro_batch`` around the forward and ``backward`` of each of this process's micro-batches; after the
    last, ``clip`` and then ``step``. Between the two the gradients are the whole step's, the same on every process
    that holds the same parameter: this is where a bad step is found and left undone (``drop_gradients``).
    """

    @property
    def model(self) -> nn.Module:
        """What forward passes go through."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around one micro-batch; only in the ``last`` one of a step do processes exchange gradients."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar. Over a step, the gradient is the mean over processes of what each adds."""

    def clip(self, limit: float, *, scale: float = 1.0) -> float:
        """Divide the step's gradients by ``scale``, then clip them to a global L2 norm of ``limit``.

        Returns:
            The norm over all parameters of all processes, after ``scale`` and before clipping.
        """

    def step(self) -> None:
        """Update the weights and forget the gradients."""

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not to be taken."""
