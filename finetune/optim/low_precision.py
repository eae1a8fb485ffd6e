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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.core.errors import ConfigError
from finetune.core.rng import seed_for
from finetune.optim.optimizers import Weights


class MasterWeightPolicy(Protocol):
    """What stands behind a narrow parameter between two steps, and how it becomes the float32 tensor of one."""

    kind: Weights
    label: str
    """Names its tensors in a checkpoint."""
    kept: dict[str, Tensor]
    """What it keeps, by parameter name."""

    def shell(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """The float32 parameter that the optimizer knows, and keys its state to."""

    def widen(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """Give ``shell`` its values, before an update."""

    def narrow(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """Round the updated values into ``parameter``."""


class Fp32Masters:
    """``Keeping`` a float32 copy of every narrow parameter."""

    kind: Weights = "master"
    label = "master"

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def shell(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """See ``Keeping``."""
        master = nn.Parameter(parameter.detach().float())
        self.kept[name] = master
        return master

    def widen(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """See ``Keeping``."""
        if shell.device != parameter.device:  # the model was moved after the optimizer was built
            shell.data = shell.data.to(parameter.device)

    def narrow(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """See ``Keeping``."""
        parameter.copy_(shell)


class Kahan:
    """``Keeping`` what rounding took away, in the parameter's own dtype (Kahan's compensated summation).

    Weight and compensation together hold the float32 value to about 16 bits: rounding moves it by at most
    2^-16 of the weight in a step (2^-22 in float16).
    """

    kind: Weights = "kahan"
    label = "compensation"

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def shell(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """See ``Keeping``."""
        self.kept[name] = torch.zeros_like(parameter, requires_grad=False)
        return nn.Parameter(_placeholder(parameter))

    def widen(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """See ``Keeping``."""
        if self.kept[name].device != parameter.device:
            self.kept[name] = self.kept[name].to(parameter.device)
        shell.data = parameter.detach().float().add_(self.kept[name])

    def narrow(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """See ``Keeping``."""
        parameter.copy_(shell)
        self.kept[name].copy_(shell.data.sub_(parameter))
        shell.data = _placeholder(parameter)


class StochasticRounding:
    """``Keeping`` nothing: a value between two bfloat16 numbers becomes the upper one as often as it is near to it.

    The noise is a function of (seed, step, parameter name), on the parameter's device: one number per weight is too
    many to draw on the CPU and copy, so other than elsewhere a seed means other noise on another kind of device.
    """

    kind: Weights = "stochastic"
    label = ""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.at: tuple[int, int] | None = None
        """Seed and optimizer step of the next update."""

    def shell(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """See ``Keeping``.

        Raises:
            ConfigError: if the parameter is not bfloat16, whose bits are the upper half of float32's.
        """
        if parameter.dtype != torch.bfloat16:
            raise ConfigError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}; stochastic rounding is for bfloat16",
                where="optimizer.weights: stochastic",
                fix="set model.dtype: bf16, or optimizer.weights: master",
            )
        return nn.Parameter(_placeholder(parameter))

    def widen(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """See ``Keeping``."""
        shell.data = parameter.detach().float()

    def narrow(self, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
        """See ``Keeping``."""
        if self.at is None:
            raise RuntimeError("stochastic rounding draws by seed and step: call optim.begin before an update")
        seed, step = self.at
        generator = torch.Generator(parameter.device).manual_seed(seed_for(seed, "rounding", step, name))
        parameter.copy_(round_stochastically_(shell.data, generator))
        shell.data = _placeholder(parameter)


MASTER_WEIGHT_POLICIES: dict[Weights, type[MasterWeightPolicy]] = {
    "master": Fp32Masters,
    "stochastic": StochasticRounding,
    "kahan": Kahan,
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


def is_narrow(parameter: Tensor) -> bool:
    """Whether a parameter has fewer bits than float32."""
    return parameter.dtype.itemsize < torch.float32.itemsize


def _placeholder(parameter: Tensor) -> Tensor:
    """A float32 tensor of the parameter's shape that occupies four bytes: what an optimizer sees between steps."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)


# -------- An optimizer for parameters that are too narrow to be trained in place.

NamedParameters = list[tuple[str, nn.Parameter]]

_MEMBERS = ("params", "param_names")
"""Entries of a parameter group that say who belongs to it; the others are its settings."""


class NarrowWeights(torch.optim.Optimizer):
    """An optimizer in float32 of parameters that are narrower; see ``rounding`` for why, and for the ways.

    For each parameter narrower than fp32 the inner optimizer trains a float32 one (its *shell*), to which its state
    belongs. In a step shells are filled chunk by chunk, updated, and rounded back into their parameters. Gradients stay
    in the parameter's dtype; clipping sees them as usual.

    Args:
        named: names and parameters, with the values to start from.
        build: makes the inner optimizer over (name, shell) pairs; wider parameters are their own shells.
        weights: what is kept of a parameter's float32 value between steps. Under ``master`` a parameter that is written
            to later, other than by ``step``, is overwritten by its master at the next one.
        chunk_elements: how many elements are widened to fp32 at a time. It bounds the extra memory (per element 4 bytes
            of gradient; 10 in all where there is no master), and changes nothing else: all optimizers here treat each
            parameter by itself.
    """

    def __init__(
        self,
        named: NamedParameters,
        build: Callable[[NamedParameters], torch.optim.Optimizer],
        weights: Weights = "master",
        chunk_elements: int = 1 << 26,
    ) -> None:
        self.keeping: MasterWeightPolicy = MASTER_WEIGHT_POLICIES[weights]()
        self.inner = build([(name, self.keeping.shell(name, p) if is_narrow(p) else p) for name, p in named])
        self._chunk_elements = chunk_elements
        parameters = dict(named)
        groups = [
            {**_settings(group), "params": [(name, parameters[name]) for name in group["param_names"]]}
            for group in self.inner.param_groups
        ]
        super().__init__(groups, dict(self.inner.defaults))

    def members(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, parameter, shell) of everything that trains; a wide parameter is its own shell."""
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            yield from zip(outer["param_names"], outer["params"], inner["params"], strict=True)

    def begin(self, seed: int, step: int) -> None:
        """Say which optimizer step the next updates belong to; several updates may, of different parameters."""
        if isinstance(self.keeping, StochasticRounding):
            self.keeping.at = (seed, step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and leave the gradients as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_settings(outer))  # the learning rate above all
        pending = [(name, p, shell, p.grad) for name, p, shell in self.members() if p.grad is not None]
        for _, parameter, _, _ in pending:
            parameter.grad = None  # the inner optimizer must see one chunk at a time, also of its own shells
        for chunk in self._chunks(pending):
            for name, parameter, shell, gradient in chunk:
                if shell is not parameter:
                    self.keeping.widen(name, parameter, shell)
                shell.grad = gradient.to(shell.dtype)
            self.inner.step()
            for name, parameter, shell, _ in chunk:
                shell.grad = None
                if shell is not parameter:
                    self.keeping.narrow(name, parameter, shell)
        for _, parameter, _, gradient in pending:
            parameter.grad = gradient
        return loss

    def _chunks(
        self, pending: list[tuple[str, nn.Parameter, nn.Parameter, Tensor]]
    ) -> Iterator[list[tuple[str, nn.Parameter, nn.Parameter, Tensor]]]:
        chunk: list[tuple[str, nn.Parameter, nn.Parameter, Tensor]] = []
        elements = 0
        for member in pending:
            if chunk and elements + member[1].numel() > self._chunk_elements:
                yield chunk
                chunk, elements = [], 0
            chunk.append(member)
            elements += member[1].numel()
        if chunk:
            yield chunk

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and what is kept of each parameter, by name; not copies of them."""
        kept = {name: tensor.detach() for name, tensor in self.keeping.kept.items()}
        return {"inner": self.inner.state_dict(), "kept": kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, on whatever device the parameters are now (accelerate does this once)."""
        for name, parameter, _ in self.members():
            if name in self.keeping.kept:
                self.keeping.kept[name].data = state_dict["kept"][name].to(parameter.device)
        self.inner.load_state_dict(state_dict["inner"])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _MEMBERS}
