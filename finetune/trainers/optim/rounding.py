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

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.streams import address

Weights = Literal["master", "stochastic", "kahan"]


class Keeping(Protocol):
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


class Masters:
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


class Stochastic:
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
        generator = torch.Generator(parameter.device).manual_seed(address(seed, "rounding", step, name))
        parameter.copy_(round_stochastically_(shell.data, generator))
        shell.data = _placeholder(parameter)


KEEPINGS: dict[Weights, type[Keeping]] = {"master": Masters, "stochastic": Stochastic, "kahan": Kahan}


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
