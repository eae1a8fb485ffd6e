"""How a bfloat16 weight takes updates smaller than its own spacing: three ways, with what they keep between steps.

A weight of 8 significant bits cannot change by less than about 1/256 of itself, and most updates are smaller. In each
of the ways here the optimizer updates a float32 tensor; they differ in where it comes from and in what is left of it:

=============== ============================== ===================== ==============================================
``master``      a float32 copy, kept           4 bytes per weight    the weight is the copy, rounded to nearest
``kahan``       weight + compensation          2 bytes per weight    what rounding took away is added the next time
``stochastic``  the weight                     nothing               rounded up or down at random, right on average
=============== ============================== ===================== ==============================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.core.errors import ConfigError
from finetune.core.rng import seed_for
from finetune.optim.optimizers import Weights


class MasterWeightPolicy:
    """What stands behind a parameter of 16 bits between two steps, and how it becomes the float32 tensor of one: here
    nothing, and the parameter itself.
    """

    kind: Weights
    label = ""
    """Names its tensors in a checkpoint."""

    def __init__(self) -> None:
        self.saved: dict[str, Tensor] = {}
        """What it keeps, by parameter name."""

    def fp32_proxy(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """The float32 parameter that the optimizer knows, and keys its state to; empty between steps."""
        return nn.Parameter(_placeholder(parameter))

    def to_fp32(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        """Give ``proxy`` its values, before an update."""
        proxy.data = parameter.detach().float()

    def round_back(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        """Round the updated values into ``parameter``."""
        raise NotImplementedError


class Fp32Masters(MasterWeightPolicy):
    """A float32 copy of every parameter, which is its proxy."""

    kind = "master"
    label = "master"

    def fp32_proxy(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        master = nn.Parameter(parameter.detach().float())
        self.saved[name] = master
        return master

    def to_fp32(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        if proxy.device != parameter.device:  # the model was moved after the optimizer was built
            proxy.data = proxy.data.to(parameter.device)

    def round_back(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        parameter.copy_(proxy)


class Kahan(MasterWeightPolicy):
    """What rounding took away, in the parameter's own dtype (Kahan's compensated summation).

    Weight and compensation together hold the float32 value to about 16 bits: rounding moves it by at most
    2^-16 of the weight in a step (2^-22 in float16).
    """

    kind = "kahan"
    label = "compensation"

    def fp32_proxy(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        self.saved[name] = torch.zeros_like(parameter, requires_grad=False)
        return super().fp32_proxy(name, parameter)

    def to_fp32(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        if self.saved[name].device != parameter.device:
            self.saved[name] = self.saved[name].to(parameter.device)
        proxy.data = parameter.detach().float().add_(self.saved[name])

    def round_back(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        parameter.copy_(proxy)
        self.saved[name].copy_(proxy.data.sub_(parameter))
        proxy.data = _placeholder(parameter)


class StochasticRounding(MasterWeightPolicy):
    """A value between two bfloat16 numbers becomes the upper one as often as it is near to it.

    The noise is a function of (seed, step, parameter name), on the parameter's device: one number per weight is too
    many to draw on the CPU and copy, so other than elsewhere a seed means other noise on another kind of device.
    """

    kind = "stochastic"

    def __init__(self) -> None:
        super().__init__()
        self.seed_and_step: tuple[int, int] | None = None
        """Of the next update."""

    def fp32_proxy(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """As ever.

        Raises:
            ConfigError: if the parameter is not bfloat16, whose bits are the upper half of float32's.
        """
        if parameter.dtype != torch.bfloat16:
            raise ConfigError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}; stochastic rounding is for bfloat16",
                where="optimizer.weights: stochastic",
                fix="set model.dtype: bf16, or optimizer.weights: master",
            )
        return super().fp32_proxy(name, parameter)

    def round_back(self, name: str, parameter: nn.Parameter, proxy: nn.Parameter) -> None:
        if self.seed_and_step is None:
            raise RuntimeError("stochastic rounding draws by seed and step: call optimizers.begin before an update")
        seed, step = self.seed_and_step
        generator = torch.Generator(parameter.device).manual_seed(seed_for(seed, "rounding", step, name))
        parameter.copy_(round_stochastically_(proxy.data, generator))
        proxy.data = _placeholder(parameter)


MASTER_WEIGHT_POLICIES: dict[Weights, type[MasterWeightPolicy]] = {
    policy.kind: policy for policy in (Fp32Masters, StochasticRounding, Kahan)
}


def round_stochastically_(values: Tensor, generator: torch.Generator) -> Tensor:
    """Replace each value by one of its two neighbours in bfloat16, such that its mean is the value itself.

    bfloat16 is the upper half of float32's bits: uniform noise below that half carries into it with just the
    probability that the lower half stands for. Infinities stay; values beyond the largest bfloat16 may become one.

    Args:
        values: float32, contiguous, any shape; overwritten.
        generator: on their device.

    Returns:
        ``values``, which conversion to bfloat16 does not change any more.
    """
    words = -(-values.numel() // 4)
    # Four draws of 16 bits from one of 64, of which every bit is used: a quarter of the time of one draw each.
    noise = torch.empty(words, dtype=torch.int64, device=values.device).random_(-(2**63), None, generator=generator)
    bits = values.view(torch.int32)
    # The noise is signed, [-2^15, 2^15): half the range above makes it [0, 2^16).
    bits.add_(1 << 15).add_(noise.view(torch.int16)[: values.numel()].view(values.shape))
    bits.bitwise_and_(-(1 << 16))
    return values


def needs_master(parameter: Tensor) -> bool:
    """Whether a parameter has fewer bits than float32."""
    return parameter.dtype.itemsize < torch.float32.itemsize


def _placeholder(parameter: Tensor) -> Tensor:
    """A float32 tensor of the parameter's shape that occupies four bytes: what an optimizer sees between steps."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)


# ------------------------------------------------------------------------------------------------------- the optimizer

NamedParameters = list[tuple[str, nn.Parameter]]

_MEMBERS = ("params", "param_names")
"""Entries of a parameter group that say who belongs to it; the others are its settings."""


class _Trained(NamedTuple):
    name: str
    parameter: nn.Parameter
    proxy: nn.Parameter
    """What the inner optimizer trains; the parameter itself where that is float32."""


class LowPrecisionOptimizer(torch.optim.Optimizer):
    """An optimizer in float32 of parameters of 16 bits.

    For each parameter narrower than float32 the inner optimizer trains a float32 proxy, to which its state belongs. In
    a step proxies are filled chunk by chunk, updated, and rounded back into their parameters. Gradients stay in the
    parameter's dtype; clipping sees them as usual.

    Args:
        named: names and parameters, with the values to start from.
        build: makes the inner optimizer over (name, proxy) pairs; float32 parameters are their own proxies.
        weights: what is kept of a parameter's float32 value between steps. Under ``master`` a parameter that is written
            to later, other than by ``step``, is overwritten by its master at the next one.
        chunk_elements: how many elements are float32 at a time. It bounds the extra memory (per element 4 bytes of
            gradient; 10 in all where there is no master), and changes nothing else: all optimizers here treat each
            parameter by itself.
    """

    def __init__(
        self,
        named: NamedParameters,
        build: Callable[[NamedParameters], torch.optim.Optimizer],
        weights: Weights = "master",
        chunk_elements: int = 1 << 26,
    ) -> None:
        self.policy = MASTER_WEIGHT_POLICIES[weights]()
        self.inner = build([(name, self.policy.fp32_proxy(name, p) if needs_master(p) else p) for name, p in named])
        self._chunk_elements = chunk_elements
        parameters = dict(named)
        groups = [
            {**_settings(group), "params": [(name, parameters[name]) for name in group["param_names"]]}
            for group in self.inner.param_groups
        ]
        super().__init__(groups, dict(self.inner.defaults))

    def members(self) -> Iterator[_Trained]:
        """Everything that trains."""
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            yield from map(_Trained, outer["param_names"], outer["params"], inner["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a loss is not computed again here
        """Update every parameter that has a gradient, and leave the gradients as they are."""
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_settings(outer))  # the learning rate above all
        pending = [(member, member.parameter.grad) for member in self.members() if member.parameter.grad is not None]
        for member, _ in pending:
            member.parameter.grad = None  # the inner optimizer must see one chunk at a time, also of its own proxies
        for chunk in self._chunks(pending):
            for (name, parameter, proxy), gradient in chunk:
                if proxy is not parameter:
                    self.policy.to_fp32(name, parameter, proxy)
                proxy.grad = gradient.to(proxy.dtype)
            self.inner.step()
            for (name, parameter, proxy), _ in chunk:
                proxy.grad = None
                if proxy is not parameter:
                    self.policy.round_back(name, parameter, proxy)
        for member, gradient in pending:
            member.parameter.grad = gradient

    def _chunks(self, pending: list[tuple[_Trained, Tensor]]) -> Iterator[list[tuple[_Trained, Tensor]]]:
        chunk: list[tuple[_Trained, Tensor]] = []
        elements = 0
        for member, gradient in pending:
            if chunk and elements + gradient.numel() > self._chunk_elements:
                yield chunk
                chunk, elements = [], 0
            chunk.append((member, gradient))
            elements += gradient.numel()
        if chunk:
            yield chunk


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _MEMBERS}
