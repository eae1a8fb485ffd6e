"""What a step does, counted: products by dtype, attention, bytes of everything else, kernels, waits and copies.

Counted on fake tensors as on real ones, one operation at a time as it is dispatched. An operation's bytes are what it
reads and writes once, with no credit for caches: for a custom operation that is its declared arguments and results, so
a fused kernel counts as what it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "_scaled_mm": (0, 1)}
"""Name -> which arguments are multiplied."""

_NOTHING = (
    *("empty", "new_empty", "detach", "_unsafe_view", "lift", "alias", "set_", "resize_"),
    *("record_stream", "_record_function"),
)
"""What launches no kernel; views are known by their schema."""

_WAITS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")
"""What reads a number off the device: the host waits for all that was launched before."""


@dataclass(frozen=True)
class Work:
    """What was done. Works of parts add up, and multiply by how often a part is done."""

    flops: Mapping[str, float] = field(default_factory=dict)
    """Of matrix products, by dtype, such as ``bfloat16``."""
    attention_flops: float = 0.0
    product_bytes: float = 0.0
    elementwise_bytes: float = 0.0
    """Read and written by all other kernels."""
    kernels: float = 0.0
    waits: float = 0.0
    """Times that the host waits for the device."""
    names: Mapping[str, float] = field(default_factory=dict)
    """Kernels by operation."""

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1.0)

    def __sub__(self, other: Work) -> Work:
        return self._with(other, -1.0)

    def __mul__(self, times: float) -> Work:
        return Work()._with(self, times)

    def _with(self, other: Work, times: float) -> Work:
        def summed(one: Mapping[str, float], two: Mapping[str, float]) -> dict[str, float]:
            return {name: one.get(name, 0) + times * two.get(name, 0) for name in {**one, **two}}

        return Work(
            summed(self.flops, other.flops),
            self.attention_flops + times * other.attention_flops,
            self.product_bytes + times * other.product_bytes,
            self.elementwise_bytes + times * other.elementwise_bytes,
            self.kernels + times * other.kernels,
            self.waits + times * other.waits,
            summed(self.names, other.names),
        )


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched while it is entered; ``work`` has it afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flops: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._attention = self._product_bytes = self._elementwise_bytes = 0.0
        self._waits = 0

    @property
    def work(self) -> Work:
        """So far."""
        return Work(
            dict(self._flops),
            self._attention,
            self._product_bytes,
            self._elementwise_bytes,
            sum(self._names.values()),
            self._waits,
            dict(self._names),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in _WAITS:
            self._waits += 1
        elif func.namespace != "prim" and not (_is_view(func) or name.startswith(_NOTHING)):
            self._names[name] += 1
            moved = float(sum(_bytes(tensor) for tensor in _touched(func, args, kwargs or {}, result)))
            if name in _PRODUCTS:
                one, other = (args[index] for index in _PRODUCTS[name])
                batch = math.prod(one.shape[:-2])
                self._flops[str(one.dtype).removeprefix("torch.")] += (
                    2.0 * batch * one.shape[-2] * one.shape[-1] * other.shape[-1]
                )
                self._product_bytes += moved
            elif "scaled_dot_product" in name and "attention" in name:
                q = next(arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 4)
                k = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 4][1]
                products = 5 if "backward" in name else 2
                batch, heads, length, width = q.shape
                self._attention += products * 2.0 * batch * heads * length * k.shape[2] * width
            else:
                self._elementwise_bytes += moved
        return result


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _touched(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Iterable[Tensor]:
    """Tensors that an operation reads, and those that it writes; one that it changes in place counts for both, unless
    it is named ``out`` or ``out_...``, as what is only written to is by torch's custom.
    """
    if not func._schema.name.startswith("aten::new_"):  # of which the argument is a model, and is not read
        yield from _tensors([*args, *kwargs.values()])
    for argument, declared in zip(args, func._schema.arguments, strict=False):
        if _is_written(declared) and not (declared.name == "out" or declared.name.startswith("out_")):
            yield from _tensors([argument])
    for returned, value in zip(func._schema.returns, result if isinstance(result, tuple) else (result,), strict=False):
        if returned.alias_info is None:
            yield from _tensors([value])


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """Of the elements that are there: an expanded tensor's are read from one place."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()
