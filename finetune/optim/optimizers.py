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
from functools import cache
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

_SCALE = "lr_scale"
"""A group's entry: what its learning rate is multiplied by."""

_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Strict):
    """What every kind has: a learning rate, and ``build``."""

    lr: float = Field(1e-4, ge=1e-12, le=100)
    """Base learning rate; ``lr_schedule`` scales it step by step."""
    weights: Weights = "master"
    """What keeps updates that are too small for a bf16 weight, in full fine-tuning: ``master``, an fp32 copy (4 bytes
    per weight); ``kahan``, the rounding error (2 bytes); ``stochastic``, rounding at random, which is right on average
    and keeps nothing. A LoRA's weights are fp32 and need none of them."""
    lr_scales: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default_factory=dict, max_length=1_000)
    """Learning rates relative to ``lr``, by a part of the parameter's name; the first part that fits decides. LoRA+
    (Hayou et al. 2024) is ``{lora_B: 16}``; ``{transformer_blocks.0.: 0.1}`` slows the first block down."""

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

    def _groups(self, named: NamedParameters, *, decays: bool = True) -> Groups:
        """Parameters by their learning rate, and by whether weight decay falls on them.

        Args:
            named: what trains.
            decays: whether the optimizer knows weight decay.

        Raises:
            ConfigError: if a part of a name in ``lr_scales`` is in none.
        """
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        unused = dict(self.lr_scales)
        for name, parameter in named:
            part = next((part for part in self.lr_scales if part in name), "")
            unused.pop(part, None)
            scale, exempt = self.lr_scales.get(part, 1.0), decays and parameter.ndim < 2
            options = ({"weight_decay": 0.0} if exempt else {}) | ({} if scale == 1 else {_SCALE: scale})
            groups.setdefault((scale, exempt), {"params": [], **options})["params"].append((name, parameter))
        if unused:
            raise ConfigError(
                f"no parameter that trains has {', '.join(map(repr, unused))} in its name; one is {named[0][0]}",
                where="optimizer.lr_scales",
                fix="name a part of a parameter's name, such as lora_B or attn1.to_q",
            )
        return sorted(groups.values(), key=lambda group: "weight_decay" in group)

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
        library = _import("bitsandbytes", self.kind).optim.AdamW8bit
        optimizer: torch.optim.Optimizer = _queued(library)(groups, **self._arguments)
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
    """Any optimizer of ``torch.optim``, or of the package pytorch_optimizer, which has Prodigy, CAME, Lion and a
    hundred more, by its import path. Of no other: a configuration file must not be able to run code.
    """

    kind: Literal["custom"] = "custom"
    name: str
    """Such as ``torch.optim.Adafactor``, or ``pytorch_optimizer.Prodigy`` (the extra ``optimizers``)."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its further arguments, such as ``{betas: [0.9, 0.99]}``; ``lr`` stands beside, not in here."""

    @model_validator(mode="after")
    def _exists_and_takes_kwargs(self) -> CustomOptimizer:
        known = _classes(self.name)
        if self.name not in known:
            raise ValueError(f"unknown optimizer {self.name!r}{_did_you_mean(self.name, known)}")
        takes = [name for name in inspect.signature(known[self.name]).parameters if name not in ("params", "lr")]
        for name in self.kwargs:
            if name == "lr":
                raise ValueError("give the learning rate as optimizer.lr, not inside kwargs")
            if name not in takes:
                raise ValueError(f"{self.name} takes no {name!r}{_did_you_mean(name, takes)}")
        if not self.in_torch:
            from finetune.optim.state import why_not_resumable

            if reason := why_not_resumable(lambda named: self._build([{"params": named}])):
                raise ValueError(f"{self.name} cannot be used here: {reason}")
        return self

    @property
    def in_torch(self) -> bool:
        """Whether it is one of torch's own, each of which updates a parameter by its own gradient alone."""
        return self.name.startswith("torch.optim.")

    @property
    def takes_vectors(self) -> bool:
        """Whether a bias or a norm may train; torch's Muon takes matrices alone."""
        return self.name != "torch.optim.Muon"

    @property
    def title(self) -> str:
        """The class."""
        return self.name

    @property
    def elementwise(self) -> bool:
        """Known of torch's own classes; one that torch adds is taken not to be."""
        return self.in_torch and self.name.rpartition(".")[2] in _ELEMENTWISE

    def _groups(self, named: NamedParameters, *, decays: bool = True) -> Groups:
        return super()._groups(
            named, decays="weight_decay" in inspect.signature(_classes(self.name)[self.name]).parameters
        )

    def _build(self, groups: Groups) -> torch.optim.Optimizer:
        kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in self.kwargs.items()}
        try:
            return _classes(self.name)[self.name](groups, lr=self.lr, **kwargs)
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


@cache
def _queued(library: Any) -> Any:
    """An optimizer of bitsandbytes that only queues its updates.

    The library's own ``step`` waits for the whole device after every parameter, copies of other streams included:
    hundreds of times a step, and gradients that come back from the host do not overlap with updates. Nothing here needs
    it: what is paged, and would, is left as it is.
    """

    def step(self: Any, closure: None = None) -> None:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.update_step(group, parameter, group_index, index)

    import torch

    return type(library.__name__, (library,), {"step": torch.no_grad()(step), "__module__": library.__module__})


_UNUSABLE = {"Optimizer", "LBFGS", "SparseAdam"}
"""Of ``torch.optim``: a base class; one that calls the loss again within a step; one for sparse gradients."""


def _classes(name: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The usable classes by import path, of the package that ``name`` is of; of torch where it is of none known."""
    import torch

    package = "pytorch_optimizer" if name.startswith("pytorch_optimizer.") else "torch.optim"
    module = torch.optim if package == "torch.optim" else _import(package, "custom", extra="optimizers")
    return {
        f"{package}.{name}": member
        for name, member in vars(module).items()
        if inspect.isclass(member) and issubclass(member, torch.optim.Optimizer) and name not in _UNUSABLE
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
    """Set the learning rate of every group, as ``lr_scales`` scale it; torchao keeps it in a tensor that its compiled
    step reads.
    """
    from torch import Tensor

    for group in optimizer.param_groups:
        scaled = lr * group.get(_SCALE, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


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
