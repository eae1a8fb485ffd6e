"""What a step does, counted: products by dtype, attention, bytes of everything else, kernels, waits and copies.

Counted on fake tensors as on real ones, one operation at a time as it is dispatched. An operation's bytes are what it
reads and writes once, with no credit for caches: for a custom operation that is its declared arguments and results, so
a fused kernel counts as what it is.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
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
    attention_backward_flops: float = 0.0
    """Of ``attention_flops``, those of backward passes."""
    thin_flops: float = 0.0
    """Of ``flops``, those of products in 16 bits that are so thin that they wait for memory (``THIN``)."""
    thin_bytes: float = 0.0
    """Of ``product_bytes``, theirs."""

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1.0)

    def __sub__(self, other: Work) -> Work:
        return self._with(other, -1.0)

    def __mul__(self, times: float) -> Work:
        return Work()._with(self, times)

    def _with(self, other: Work, times: float) -> Work:
        def summed(one: Any, two: Any) -> Any:
            if isinstance(one, Mapping):
                return {name: one.get(name, 0) + times * two.get(name, 0) for name in {**one, **two}}
            return one + times * two

        return Work(**{each.name: summed(getattr(self, each.name), getattr(other, each.name)) for each in fields(Work)})


THIN = 150.0
"""Operations per byte below which a product in 16 bits waits for memory: a card of today does 150 to 270 of them in the
time in which it reads a byte. A LoRA of rank 128 has 120, a layer of the model 800."""


class _Counts:
    """A ``Work`` in the making."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = defaultdict(float)
        self.flops: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    @property
    def work(self) -> Work:
        kernels = sum(self.names.values())
        return Work(flops=dict(self.flops), names=dict(self.names), kernels=kernels, **self.numbers)


class WorkCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched while it is entered; ``work`` has it afterwards.

    Args:
        phase: called at each operation for the name of what it belongs to, by which ``works`` keeps them apart.
    """

    def __init__(self, phase: Callable[[], str] = str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._phase = phase
        self._counts: dict[str, _Counts] = defaultdict(_Counts)

    @property
    def works(self) -> dict[str, Work]:
        """So far, by phase."""
        return {phase: counts.work for phase, counts in self._counts.items()}

    @property
    def work(self) -> Work:
        """So far, all phases together."""
        return sum(self.works.values(), Work())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, counts = func._schema.name.split("::")[1], self._counts[self._phase()]
        numbers = counts.numbers
        if name in _WAITS:
            numbers["waits"] += 1
        elif func.namespace != "prim" and not (_is_view(func) or name.startswith(_NOTHING)):
            counts.names[name] += 1
            moved = float(sum(_bytes(tensor) for tensor in _touched(func, args, kwargs or {}, result)))
            if name in _PRODUCTS:
                one, other = (args[index] for index in _PRODUCTS[name])
                flops = 2.0 * math.prod(one.shape[:-2]) * one.shape[-2] * one.shape[-1] * other.shape[-1]
                counts.flops[str(one.dtype).removeprefix("torch.")] += flops
                numbers["product_bytes"] += moved
                if one.dtype.itemsize == 2 and flops < THIN * moved:
                    numbers["thin_flops"] += flops
                    numbers["thin_bytes"] += moved
            elif "scaled_dot_product" in name and "attention" in name:
                q, k = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 4][:2]
                backward = "backward" in name
                batch, heads, length, width = q.shape
                flops = (5 if backward else 2) * 2.0 * batch * heads * length * k.shape[2] * width
                numbers["attention_flops"] += flops
                numbers["attention_backward_flops"] += flops * backward
            else:
                numbers["elementwise_bytes"] += moved
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
