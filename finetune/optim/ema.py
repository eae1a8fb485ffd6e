"""An exponential moving average of what trains, through diffusers' ``EMAModel``.

The average is kept in float32 on the device of the weights, over the fp32 masters where a bf16 model has them:
averaging bf16 weights with a decay of 0.999 would round nearly every update away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn


class Ema:
    """The average of named parameters.

    Args:
        parameters: what the model computes with, by name.
        precise: the most precise tensor there is of each parameter: its master copy, or the parameter itself.
        decay: the long-run decay; diffusers warms it up as min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], precise: Mapping[str, Tensor], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = dict(parameters)
        self._precise = [precise[name] for name in self._parameters]
        # Copies in float32 also of weights that have no such copy behind them (optimizer.weights: stochastic, kahan).
        self._average: Any = EMAModel([tensor.detach().float() for tensor in self._precise], decay=decay)

    def step(self) -> None:
        """Take one optimizer step's weights into the average."""
        self._average.step(self._precise)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32."""
        return dict(zip(self._parameters, self._average.shadow_params, strict=True))

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from ``state`` after ``steps`` optimizer steps; names were checked with the trainable weights."""
        for name, shadow in zip(self._parameters, self._average.shadow_params, strict=True):
            shadow.copy_(state[name])
        self._average.optimization_step = steps

    @contextmanager
    def applied(self, writing: Callable[[], AbstractContextManager[object]] = nullcontext) -> Iterator[None]:
        """The model computes with the average inside, and with exactly its own weights again after.

        Args:
            writing: entered around both exchanges; see ``memory.rewriting_weights``.
        """
        # On the CPU: after full fine-tuning a copy is as large as the model.
        own = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters.values()]
        with writing():
            self._write(self._average.shadow_params)
        try:
            yield
        finally:
            with writing():
                self._write(own)

    def _write(self, tensors: Iterable[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters.values(), tensors, strict=True):
            parameter.data.copy_(tensor)
