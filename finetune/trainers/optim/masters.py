"""Float32 copies of parameters that are too narrow to be trained in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NamedParameters = list[tuple[str, nn.Parameter]]

_MEMBERS = ("params", "param_names")
"""Entries of a parameter group that say who belongs to it; the others are its settings."""


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of fp32 copies, for parameters too narrow to add small updates to.

    In bfloat16 a weight cannot change by less than about 1/256 of itself, which is more than most updates. Each
    parameter narrower than fp32 therefore has a float32 master that the inner optimizer trains; after every step the
    parameter is its master, rounded to nearest. Gradients stay in the parameter's dtype; clipping sees them as usual.

    Args:
        named: names and parameters, with the values to start from: a parameter that is written to later, other than by
            ``step``, is overwritten by its master at the next one.
        build: makes the inner optimizer over (name, master) pairs; wider parameters are their own masters.
        chunk_elements: how many gradient elements are widened to fp32 at a time. It bounds the extra memory (1 GiB by
            default), and changes nothing else: all optimizers here treat each parameter by itself.
    """

    def __init__(
        self,
        named: NamedParameters,
        build: Callable[[NamedParameters], torch.optim.Optimizer],
        chunk_elements: int = 1 << 28,
    ) -> None:
        self.inner = build([(name, nn.Parameter(p.detach().float()) if is_narrow(p) else p) for name, p in named])
        self._chunk_elements = chunk_elements
        parameters = dict(named)
        groups = [
            {**_settings(group), "params": [(name, parameters[name]) for name in group["param_names"]]}
            for group in self.inner.param_groups
        ]
        super().__init__(groups, dict(self.inner.defaults))

    def members(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, parameter, master) of everything that trains; a wide parameter is its own master."""
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            yield from zip(outer["param_names"], outer["params"], inner["params"], strict=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and leave the gradients as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_settings(outer))  # the learning rate above all
        pending = [(p, master, p.grad) for _, p, master in self.members() if p.grad is not None]
        for parameter, _, _ in pending:
            parameter.grad = None  # the inner optimizer must see one chunk at a time, also of its own masters
        for chunk in self._chunks(pending):
            for parameter, master, gradient in chunk:
                if master.device != parameter.device:  # the model was moved after the optimizer was built
                    master.data = master.data.to(parameter.device)
                master.grad = gradient.to(master.dtype)
            self.inner.step()
            for parameter, master, _ in chunk:
                if master is not parameter:
                    parameter.copy_(master)
                master.grad = None
        for parameter, _, gradient in pending:
            parameter.grad = gradient
        return loss

    def _chunks(
        self, pending: list[tuple[nn.Parameter, nn.Parameter, Tensor]]
    ) -> Iterator[list[tuple[nn.Parameter, nn.Parameter, Tensor]]]:
        chunk: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []
        elements = 0
        for member in pending:
            if chunk and elements + member[0].numel() > self._chunk_elements:
                yield chunk
                chunk, elements = [], 0
            chunk.append(member)
            elements += member[0].numel()
        if chunk:
            yield chunk

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and the fp32 copies by name; not copies of them."""
        masters = {name: master.detach() for name, parameter, master in self.members() if master is not parameter}
        return {"inner": self.inner.state_dict(), "masters": masters}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, on whatever device the parameters are now (accelerate does this once)."""
        for name, parameter, master in self.members():
            if master is not parameter:
                master.data = state_dict["masters"][name].to(parameter.device)
        self.inner.load_state_dict(state_dict["inner"])


def is_narrow(parameter: Tensor) -> bool:
    """Whether a parameter has fewer bits than float32."""
    return parameter.dtype.itemsize < torch.float32.itemsize


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _MEMBERS}
