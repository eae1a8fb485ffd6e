"""adaLN weights that stay on the host: what they are applied to is known before the blocks run.

Every block turns the time embedding into twelve shifts, scales and gates with two linear layers: a seventh of 5B's
weights, for one vector per clip. Where they are frozen, the result follows from the timestep alone. It is computed on
the CPU, time embedding included, in the model's dtype and by the model's own operations: on a CPU bit for bit what the
model computes, on a GPU up to rounding (both within 1 % of the largest entry in bf16, 0.001 % in fp32).

Who knows a pass's timesteps on the host says so (``announced``), or they are read from the device, and the host waits
for it. All rows of a pass may be computed ahead in another thread (``prepare``). Otherwise a layer's are computed when
its block is queued. They are kept with their pass for the backward pass: several passes may be under way, each with
timesteps of its own.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from finetune.core.errors import ConfigError, TrainingError
from finetune.memory.checkpointing import blocks_of
from finetune.memory.host_buffers import (
    BufferLayout,
    device_buffer,
    flat_buffers,
    host_buffer,
    host_work,
    pin_to_host,
    unpin_from_host,
)

LABEL = "modulation"

_EMBEDDINGS = ("time_embedding", "ofs_embedding")


@dataclass(frozen=True)
class _Conditions:
    """What the time embedding is made of, as the host knows it."""

    timesteps: tuple[int, ...]
    ofs: float | None


@dataclass
class _Pass:
    """One forward pass of the model, and the backward pass that may follow."""

    conditioning: Tensor | None
    """What the adaLN layers are applied to, on the host, [B, E]; None where all rows were computed ahead."""
    staged: Tensor
    """Pinned memory from which the rows are copied, [layers, B, 6D]. torch's allocator of pinned memory gives it to
    nobody else before the copies are done."""
    rows: Tensor
    """On the device."""
    done: set[int] = field(default_factory=set)
    """Numbers of the layers whose rows are in ``rows``."""


class AdaLnOffload:
    """Runs the adaLN layers of a transformer's blocks on the host, from ``install`` to ``remove``.

    The modules stay where they are in the model, and so do their names; only what they compute is looked up.

    Args:
        transformer: a diffusers CogVideoX transformer.
        device: where it computes.
    """

    def __init__(self, transformer: nn.Module, device: torch.device) -> None:
        self._transformer: Any = transformer
        self._device = device
        self._norms: dict[str, Any] = {
            f"transformer_blocks.{index}.{name}": getattr(block, name)
            for index, block in enumerate(blocks_of(transformer))
            for name in ("norm1", "norm2")
        }
        self._linears: list[nn.Linear] = [norm.linear for norm in self._norms.values()]
        self._embeddings: dict[str, nn.Module] = {}
        self._signature = inspect.signature(type(transformer).forward)
        self._hook: Any = None
        self._coming: _Conditions | None = None
        """Of the next forward pass, where the host knows them."""
        self._ahead: dict[_Conditions, list[Tensor]] = defaultdict(list)
        """Rows of passes to come, pinned, [layers, B, 6D]."""
        self._lock = threading.Lock()
        """Between the thread that prepares and the one that takes, or removes."""
        self._announced: _Pass | None = None
        """The pass that has begun, and whose time embedding no block has seen yet."""
        self._passes: dict[int, tuple[StorageWeakRef, _Pass]] = {}

    def weights(self) -> list[Tensor]:
        """What stays on the host."""
        return [parameter for linear in self._linears for parameter in linear.parameters()]

    def install(self) -> None:
        """Move the layers' weights to the host, and take over what they compute.

        Raises:
            ConfigError: one of them trains or carries an adapter, or the time embedding in front of them does.
        """
        originals = {name: getattr(self._transformer, name) for name in _EMBEDDINGS}
        originals = {name: module for name, module in originals.items() if module is not None}
        _require_frozen({f"{name}.linear": norm.linear for name, norm in self._norms.items()} | originals)
        layouts = [BufferLayout.of(linear.parameters()) for linear in self._linears]
        buffers = flat_buffers([layout.nbytes for layout in layouts], pinned=False, what=LABEL)
        for linear, layout, flat in zip(self._linears, layouts, buffers, strict=True):
            _move(linear, layout.views(flat))
            pin_to_host(linear, linear.parameters())
        self._embeddings = {name: _copy_on_host(module) for name, module in originals.items()}
        for number, norm in enumerate(self._norms.values()):
            # As attributes of the instances: nothing that walks the model's modules, names or weights sees a change.
            norm.silu.forward = _unchanged
            norm.linear.forward = partial(self._rows, number)
        self._hook = self._transformer.register_forward_pre_hook(self._begin, with_kwargs=True)
        # As an attribute of the instance alone: what walks the model's modules does not see it.
        self._transformer.__dict__[_OFFLOAD] = self

    def remove(self, device: torch.device | None = None) -> None:
        """Give the layers back as they were, their weights on ``device``, or in ordinary host memory if None."""
        if self._hook is None:
            return
        self._transformer.__dict__.pop(_OFFLOAD, None)
        with self._lock:
            self._hook.remove()
            self._hook = None
            for norm in self._norms.values():
                del norm.silu.forward, norm.linear.forward
                unpin_from_host(norm.linear)
                _move(norm.linear, [torch.empty_like(p, device=device) for p in norm.linear.parameters()])
            self._embeddings, self._passes, self._announced, self._coming = {}, {}, None, None
            self._ahead.clear()

    # ------------------------------------------------------------------------------------------------- before a pass

    @contextmanager
    def announced(self, conditions: _Conditions) -> Iterator[None]:
        """The forward pass inside has these; a later one does not, also if this one never comes to be."""
        self._coming = conditions
        try:
            yield
        finally:
            self._coming = None

    def prepare(self, conditions: _Conditions) -> None:
        """Compute all rows of one pass to come that will have these; in any thread."""
        with self._lock, torch.no_grad(), host_work(LABEL):
            if self._hook is None:  # another memory state came in between
                return
            dtype, (timesteps, ofs) = self._linears[0].weight.dtype, _tensors_of(conditions)
            conditioning = self._conditioning(timesteps, None, ofs, dtype)
            staged = self._staged(conditioning)
            for linear, rows in zip(self._linears, staged, strict=True):
                rows.copy_(functional.linear(conditioning, linear.weight, linear.bias))
            self._ahead[conditions].append(staged)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: its rows, where they were computed ahead, or else its time embedding."""
        given = self._signature.bind(self._transformer, *args, **kwargs).arguments
        dtype = given["hidden_states"].dtype
        self._forget_passes()
        conditions, self._coming = self._coming, None
        if conditions is not None and (len(conditions.timesteps),) != given["timestep"].shape:
            conditions = None
        staged = None if conditions is None or dtype != self._linears[0].weight.dtype else self._take(conditions)
        conditioning = None
        if staged is None:
            with torch.no_grad(), host_work(LABEL):
                condition = given.get("timestep_cond")
                if conditions is not None:
                    timesteps, ofs = _tensors_of(conditions)
                else:
                    timesteps = _on_host(given["timestep"])
                    ofs = None if given.get("ofs") is None else _on_host(given["ofs"])
                condition = None if condition is None else _on_host(condition)
                conditioning = self._conditioning(timesteps, condition, ofs, dtype)
                staged = self._staged(conditioning)
        rows = BufferLayout.of([staged]).views(device_buffer(_nbytes(staged), self._device, LABEL))[0]
        self._announced = current = _Pass(conditioning, staged, rows)
        if conditioning is None:
            rows.copy_(staged, non_blocking=True)  # on the compute's own stream, as below
            current.done.update(range(len(self._linears)))

    def _conditioning(self, timesteps: Tensor, condition: Tensor | None, ofs: Tensor | None, dtype: Any) -> Tensor:
        """The time embedding, as ``CogVideoXTransformer3DModel.forward`` computes it, [B, E]; all on the host."""
        embedding = self._embeddings["time_embedding"](self._transformer.time_proj(timesteps).to(dtype), condition)
        if "ofs_embedding" in self._embeddings:
            embedding = embedding + self._embeddings["ofs_embedding"](self._transformer.ofs_proj(ofs).to(dtype))
        return functional.silu(embedding)

    def _staged(self, conditioning: Tensor) -> Tensor:
        """Pinned memory for all rows of a pass."""
        shape = (len(self._linears), conditioning.shape[0], self._linears[0].out_features)
        layout = BufferLayout.of([torch.empty(shape, dtype=conditioning.dtype, device="meta")])
        return layout.views(host_buffer(layout.nbytes, pinned=True, what=LABEL))[0]

    def _take(self, conditions: _Conditions) -> Tensor | None:
        with self._lock:
            ready = self._ahead.get(conditions)
            staged = ready.pop() if ready else None
            if not ready:
                self._ahead.pop(conditions, None)
        return staged

    def _rows(self, number: int, temb: Tensor) -> Tensor:
        """What layer ``number`` gives for a pass, [B, 6D] on the device.

        Args:
            number: of the layer, in the model's order.
            temb: the pass's time embedding, on the device, [B, E]. Only its memory tells which pass it is, forward or
                run again: its values are not read, and may not be there yet.
        """
        current = self._pass_of(temb)
        if number not in current.done and current.conditioning is not None:
            linear, staged = self._linears[number], current.staged[number]
            with torch.no_grad():
                with host_work(LABEL):
                    staged.copy_(functional.linear(current.conditioning, linear.weight, linear.bias))
                # On the compute's own stream: a few kB, in order with what reads them.
                current.rows[number].copy_(staged, non_blocking=True)
            current.done.add(number)
        # Apart from the rest of the buffer, which autograd would otherwise take for a change of these rows.
        return current.rows[number].data

    def _pass_of(self, temb: Tensor) -> _Pass:
        storage = temb.untyped_storage()
        known = self._passes.get(storage._cdata)
        if known is not None and not known[0].expired():  # type: ignore[no-untyped-call]
            return known[1]
        if self._announced is None:
            raise TrainingError(
                "a block was called with a time embedding that no forward pass of the transformer has made",
                where="memory.modulation: host",
                fix="call the transformer itself, or set memory.modulation: device",
            )
        # While the weak reference is held, no other storage gets this one's address.
        self._passes[storage._cdata] = (StorageWeakRef(storage), self._announced)  # type: ignore[no-untyped-call]
        current, self._announced = self._announced, None
        return current

    def _forget_passes(self) -> None:
        """Let go of passes of which no block will ask again: their time embedding is gone, or never reached a block."""
        for key, (reference, _) in list(self._passes.items()):
            if reference.expired():  # type: ignore[no-untyped-call]
                del self._passes[key]
        self._announced = None


_OFFLOAD = "_adaln_offload"


def announced(
    transformer: nn.Module, timesteps: tuple[int, ...] | None, ofs: float | None
) -> AbstractContextManager[None]:
    """Around a forward pass of a transformer: which timesteps it has, so that nobody asks the device for them; where
    its adaLN layers are not on the host, nothing is done.

    Args:
        transformer: in whatever memory state.
        timesteps: of its batch; None where only the device knows them.
        ofs: what its offset embedding is given, if it has one.
    """
    offload: AdaLnOffload | None = transformer.__dict__.get(_OFFLOAD)
    if offload is None or timesteps is None:
        return nullcontext()
    return offload.announced(_Conditions(timesteps, ofs))


def prepare(transformer: nn.Module, timesteps: tuple[int, ...] | None, ofs: float | None) -> None:
    """Compute ahead what a forward pass that is ``announced`` later will need; in any thread, arguments as there."""
    offload: AdaLnOffload | None = transformer.__dict__.get(_OFFLOAD)
    if offload is not None and timesteps is not None:
        offload.prepare(_Conditions(timesteps, ofs))


def _tensors_of(conditions: _Conditions) -> tuple[Tensor, Tensor | None]:
    """As the model is given them."""
    return torch.tensor(conditions.timesteps), None if conditions.ofs is None else torch.tensor([conditions.ofs])


def _nbytes(tensor: Tensor) -> int:
    return BufferLayout.of([tensor]).nbytes


def _require_frozen(modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if trains or (name.endswith(".linear") and type(module) is not nn.Linear):
            raise ConfigError(
                f"{name} {'trains' if trains else 'is not a plain linear layer'}, so the adaLN layers' result cannot be"
                " computed ahead",
                where="memory.modulation: host",
                fix="set memory.modulation: device, or choose method.targets without adaLN or time embeddings",
            )


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _copy_on_host(module: nn.Module) -> nn.Module:
    """A copy of a module that computes on the host."""
    layout = BufferLayout.of(module.parameters())
    views = layout.views(host_buffer(layout.nbytes, pinned=False, what=LABEL))
    copies: dict[int, Any] = {}
    for parameter, view in zip(module.parameters(), views, strict=True):
        view.copy_(parameter.data)
        copies[id(parameter)] = nn.Parameter(view, requires_grad=False)
    # As if they were copied already: by itself, deepcopy would allocate on the device.
    return copy.deepcopy(module, copies)


def _move(module: nn.Module, targets: list[Tensor]) -> None:
    """Move a module's parameters into other memory."""
    for parameter, target in zip(module.parameters(), targets, strict=True):
        target.data.copy_(parameter.data)
        parameter.data = target.data
