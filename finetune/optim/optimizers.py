"""Optimizers: one configuration section each.

Defaults are those of CogVideoX's own training (betas 0.9 and 0.95, eps 1e-8, weight decay 1e-4). Weight decay falls on
matrices and convolutions alone: shrinking a bias, a norm's scale or a DoRA magnitude regularises nothing.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.core.errors import ConfigError, is_out_of_memory
from finetune.core.types import Strict

if TYPE_CHECKING:
    import torch
    from torch import nn

    from finetune.optim.low_precision import NamedParameters

Weights = Literal["master", "stochastic", "kahan"]

Groups = list[dict[str, Any]]

_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Strict):
    """What every kind has: a learning rate, and ``build``."""

    lr: float = Field(1e-4, ge=1e-12, le=100)
    """Base learning rate; ``lr_schedule`` scales it step by step."""
    weights: Weights = "master"
    """What keeps updates that are too small for a bf16 weight, in full fine-tuning: ``master``, an fp32 copy (4 bytes
    per weight); ``kahan``, the rounding error (2 bytes); ``stochastic``, rounding at random, which is right on average
    and keeps nothing. A LoRA's weights are fp32 and need none of them."""

    def build(self, params: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer over named parameters; those narrower than fp32 are updated as ``weights`` says.

        Raises:
            ConfigError: if the library behind this kind, or the device it needs, is absent, or it refuses a parameter.
        """
        from finetune.optim.low_precision import LowPrecisionOptimizer, needs_master

        named = list(params)
        if any(needs_master(parameter) for _, parameter in named):
            return LowPrecisionOptimizer(named, lambda proxies: self._build(self._groups(proxies)), self.weights)
        return self._build(self._groups(named))

    def build_in_place(self, params: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """As ``build``, without regard to ``weights``: for a strategy that keeps master copies of its own."""
        return self._build(self._groups(list(params)))

    def _groups(self, named: NamedParameters) -> Groups:
        matrices = [(name, parameter) for name, parameter in named if parameter.ndim >= 2]
        vectors = [(name, parameter) for name, parameter in named if parameter.ndim < 2]
        groups: Groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    @property
    def title(self) -> str:
        """How a message names it."""
        return str(self.kind)  # type: ignore[attr-defined]  # every member of the union has one

    @property
    def elementwise(self) -> bool:
        """Whether an element's update depends on that element alone, so that it may work on shares of parameters."""
        return False

    @abstractmethod
    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        """Make the library's optimizer over ready parameter groups."""


class _Adam(_Optimizer):
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, ge=1e-30, le=1)
    """Added to the denominator of the update."""
    weight_decay: float = Field(1e-4, ge=0, le=100)
    """Decoupled weight decay of matrices, per unit of learning rate; biases and norms are left alone."""

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}


class AdamW(_Adam):
    """torch's AdamW: 8 bytes of state per trainable parameter."""

    kind: Literal["adamw"] = "adamw"

    @property
    def elementwise(self) -> bool:
        """Yes."""
        return True

    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        import torch

        # Fused: the default on CUDA makes temporary copies as large as all parameters together.
        return torch.optim.AdamW(groups, **self._arguments, fused=True)


class AdamW8bit(_Adam):
    """bitsandbytes' AdamW: 2 bytes of state per trainable parameter, quantised in blocks of 256."""

    kind: Literal["adamw8bit"] = "adamw8bit"

    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = _import("bitsandbytes", self.kind).optim.AdamW8bit(groups, **self._arguments)
        return optimizer


class PagedAdamW8bit(_Adam):
    """``adamw8bit`` with its state in CUDA unified memory, which moves to the host when the card is full."""

    kind: Literal["paged_adamw8bit"] = "paged_adamw8bit"

    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        import torch

        bitsandbytes = _import("bitsandbytes", self.kind)
        # On a CPU bitsandbytes warns once and does not page.
        if not torch.cuda.is_available():
            raise ConfigError(
                "a paged optimizer keeps its state in CUDA unified memory, and there is no CUDA device",
                where=f"optimizer.kind: {self.kind}",
                fix="set optimizer.kind: adamw8bit (the same arithmetic, not paged)",
            )
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(groups, **self._arguments)
        return optimizer


class TorchaoAdamW8bit(_Adam):
    """torchao's AdamW with 8-bit state; compiled at its first step, which takes some seconds."""

    kind: Literal["torchao_adamw8bit"] = "torchao_adamw8bit"

    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        library = _import("torchao.optim", self.kind, extra="torchao")
        optimizer: torch.optim.Optimizer = library.AdamW8bit(groups, **self._arguments)
        return optimizer


class CustomOptimizer(_Optimizer):
    """Any optimizer of ``torch.optim`` by name. Only that module: a configuration file must not be able to run code."""

    kind: Literal["custom"] = "custom"
    name: str
    """Such as ``torch.optim.Adafactor``."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its further arguments, such as ``{betas: [0.9, 0.99]}``; ``lr`` stands beside, not in here."""

    @model_validator(mode="after")
    def _exists_and_takes_kwargs(self) -> CustomOptimizer:
        known = _torch_optimizers()
        if self.name not in known:
            raise ValueError(f"unknown optimizer {self.name!r}{_did_you_mean(self.name, known)}")
        takes = [name for name in inspect.signature(known[self.name]).parameters if name not in ("params", "lr")]
        for name in self.kwargs:
            if name == "lr":
                raise ValueError("give the learning rate as optimizer.lr, not inside kwargs")
            if name not in takes:
                raise ValueError(f"{self.name} takes no {name!r}{_did_you_mean(name, takes)}")
        return self

    @property
    def title(self) -> str:
        """The class."""
        return self.name

    @property
    def elementwise(self) -> bool:
        """Known of torch's own classes; one that torch adds is taken not to be."""
        return self.name.rpartition(".")[2] in _ELEMENTWISE

    def _groups(self, named: NamedParameters) -> Groups:
        if "weight_decay" in inspect.signature(_torch_optimizers()[self.name]).parameters:
            return super()._groups(named)
        return [{"params": named}]

    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in self.kwargs.items()}
        try:
            return _torch_optimizers()[self.name](groups, lr=self.lr, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"{self.name} refuses: {error}", where="optimizer", fix="see its documentation"
            ) from error


OptimizerConfig = Annotated[
    AdamW | AdamW8bit | PagedAdamW8bit | TorchaoAdamW8bit | CustomOptimizer, Field(discriminator="kind")
]

_ELEMENTWISE = frozenset(
    {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
)
"""Of ``torch.optim``; Adafactor and Muon look at rows, columns or whole matrices."""


def _torch_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The usable classes of ``torch.optim`` by dotted name."""
    import torch

    # LBFGS wants to call the loss again within a step, and SparseAdam wants sparse gradients; this loop has neither.
    unusable = {"Optimizer", "LBFGS", "SparseAdam"}
    return {
        f"torch.optim.{name}": member
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member) and issubclass(member, torch.optim.Optimizer) and name not in unusable
    }


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    lowered = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]!r}?" if close else f"; there are: {', '.join(names)}"


def _import(module: str, kind: str, *, extra: str = "") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = f"'cogvideox-finetune[{extra}]'" if extra else module
        raise ConfigError(
            f"{module} cannot be imported: {error}",
            where=f"optimizer.kind: {kind}",
            fix=f"pip install {package}, or set optimizer.kind: adamw",
        ) from error


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group; torchao keeps it in a tensor that its compiled step reads."""
    from torch import Tensor

    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def begin(optimizer: torch.optim.Optimizer, *, seed: int, step: int) -> None:
    """Say which optimizer step the next updates belong to: random numbers in them are drawn by it.

    Args:
        optimizer: what ``build`` made.
        seed: of the run.
        step: from 0.
    """
    from finetune.optim.low_precision import LowPrecisionOptimizer, StochasticRounding

    if isinstance(optimizer, LowPrecisionOptimizer) and isinstance(optimizer.policy, StochasticRounding):
        optimizer.policy.seed_and_step = (seed, step)
