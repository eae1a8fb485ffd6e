"""An optimizer for parameters that are too narrow to be trained in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.trainers.optim.rounding import KEEPINGS, Keeping, Stochastic, Weights, is_narrow

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
        self.keeping: Keeping = KEEPINGS[weights]()
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
        if isinstance(self.keeping, Stochastic):
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
