"""Gradient release: what moves between device and host when gradients are let go of block by block.

The pieces of ``parallel.gradient_release``, which says in what order they are used. A *unit* is what is updated at
once: a block of the transformer, or everything outside the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from finetune.memory.block_streaming import BlockStreaming
from finetune.memory.host_buffers import (
    BufferLayout,
    CopyStream,
    StreamEvent,
    device_buffer,
    flat_buffer,
    host_buffer,
    label_buffer,
    label_of,
)
from finetune.memory.runner import Blocks

GRADIENTS = "host gradients"

OPTIMIZER = "host optimizer"

Units = list[dict[str, nn.Parameter]]

_BLOCK = re.compile(r"\btransformer_blocks\.(\d+)\.")


def units_of(parameters: Mapping[str, nn.Parameter]) -> Units:
    """Parameters by name, unit by unit: blocks in their order, then what is outside of them, if anything is."""
    blocks: dict[int, dict[str, nn.Parameter]] = {}
    outside: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        found = _BLOCK.search(name)
        unit = blocks.setdefault(int(found.group(1)), {}) if found else outside
        unit[name] = parameter
    return [blocks[index] for index in sorted(blocks)] + ([outside] if outside else [])


def norm_of(gradient: Tensor) -> Tensor:
    """L2 norm of one gradient, accumulated and returned in at least float32; on its device."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norm


class GradientOffload:
    """Copies of gradients to the host, one group under way at a time.

    The device's tensors are kept until their copy is done, and the compute waits for that before the next group: so at
    most two groups are on the device, one on its way and one just computed.

    Args:
        lane: what copies.
    """

    def __init__(self, lane: CopyStream) -> None:
        self._lane = lane
        self._sent: list[Tensor] = []
        self._mark: StreamEvent = None

    def send(self, gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> StreamEvent:
        """Queue the copies; returns their end."""
        self._lane.wait(self._mark)
        ready = self._lane.compute()
        for gradient, target in zip(gradients, targets, strict=True):
            self._mark = self._lane.copy(target, gradient, after=[ready])
        self._sent = list(gradients)
        return self._mark

    def clear(self) -> None:
        """Let go of what was sent; the compute waits for its copies."""
        self._lane.wait(self._mark)
        self._sent = []


class HostGradients:
    """A step's gradients in host memory: 2 bytes per bf16 weight, pinned.

    Args:
        units: what trains.
        lane: what copies.
    """

    def __init__(self, units: Units, lane: CopyStream) -> None:
        self._lane = lane
        self._layouts = [BufferLayout.of(unit.values()) for unit in units]
        self._flats = list(flat_buffer([layout.nbytes for layout in self._layouts], pinned=True, what=GRADIENTS))
        self._outbox = GradientOffload(lane)
        self._at: dict[str, tuple[int, Tensor]] = {}
        for index, (unit, layout, flat) in enumerate(zip(units, self._layouts, self._flats, strict=True)):
            self._at |= {name: (index, view) for name, view in zip(unit, layout.views(flat), strict=True)}
        self._names = [list(unit) for unit in units]
        self._arrived: list[StreamEvent] = [None] * len(units)

    def put(self, named: Mapping[str, Tensor]) -> None:
        """Copy gradients, all of one unit, while the device goes on."""
        mark = self._outbox.send(list(named.values()), [self._at[name][1] for name in named])
        for name in named:
            self._arrived[self._at[name][0]] = mark

    def sent(self) -> None:
        """No more will come in this step."""
        self._outbox.clear()

    def read(self, name: str) -> Tensor:
        """A gradient, once it has arrived; the buffer itself."""
        index, view = self._at[name]
        self._lane.finish(self._arrived[index])
        return view

    def sweep(self, device: torch.device, update: Callable[[dict[str, Tensor]], None]) -> None:
        """Bring every unit's gradients back to ``device`` and call ``update``; the next unit's come meanwhile."""
        size = max(layout.nbytes for layout in self._layouts)
        buffers = [device_buffer(size, device, "returned gradients") for _ in range(2)]
        free: list[StreamEvent] = [self._lane.compute()] * 2
        number = len(self._flats)

        def fetch(index: int) -> StreamEvent:
            flat = self._flats[index]
            return self._lane.copy(buffers[index % 2][: flat.numel()], flat, after=[free[index % 2]])

        coming = fetch(0)
        for index in range(number):
            here, coming = coming, fetch(index + 1) if index + 1 < number else None
            self._lane.wait(here)
            views = self._layouts[index].views(buffers[index % 2])
            update(dict(zip(self._names[index], views, strict=True)))
            free[index % 2] = self._lane.compute()


class HostWeights:
    """Host tensors behind a model's weights, which an optimizer trains there, and their way back to the model.

    A weight that streams lives on the host anyway: then that is the tensor that is trained, and nothing is copied back.

    Args:
        units: what trains, with the values to start from.
        lane: what copies.
        blocks: what runs the blocks, if they do not run by themselves.
    """

    def __init__(self, units: Units, lane: CopyStream, blocks: Blocks | None) -> None:
        self._lane = lane
        self._model = {name: parameter for unit in units for name, parameter in unit.items()}
        self._homes: dict[str, Tensor] = {}
        self._blocks: Blocks | None = None
        self._mark: StreamEvent = None
        self.trained: dict[str, nn.Parameter] = {}
        """Host tensors by name, in the order of the units."""
        self._see(blocks)
        kept = [{name: p for name, p in unit.items() if name not in self._homes} for unit in units]
        layouts = [BufferLayout.of(unit.values()) for unit in kept]
        pieces = flat_buffer([layout.nbytes for layout in layouts], pinned=True, what=OPTIMIZER)
        found = dict(self._homes)
        for unit, layout, piece in zip(kept, layouts, pieces, strict=True):
            found |= zip(unit, layout.views(piece), strict=True)
        for name, parameter in self._model.items():
            if name not in self._homes:
                found[name].copy_(parameter.detach())
            self.trained[name] = nn.Parameter(found[name])

    def follow(self, blocks: Blocks | None) -> None:
        """Take note of another memory state of the model, whose weights may have begun to stream."""
        if blocks is not self._blocks:
            self._see(blocks)
            for name, home in self._homes.items():
                self.trained[name].data = home  # the same values: the model's

    def _see(self, blocks: Blocks | None) -> None:
        self._blocks, self._homes = blocks, {}
        if blocks is None or not isinstance(blocks.weights, BlockStreaming):
            return
        for name, parameter in self._model.items():
            try:
                self._homes[name] = blocks.weights.home(parameter)
            except KeyError:
                continue

    def publish(self, names: Iterable[str], *, after: StreamEvent) -> None:
        """Queue copies of updated weights into the model; ``after`` is the end of the last work that reads the old."""
        # Where the model computes on the host as well, the update itself is compute that the copy follows.
        ready = [after, self._lane.compute()]
        for name in names:
            if name not in self._homes:
                self._mark = self._lane.copy(self._model[name].detach(), self.trained[name].detach(), after=ready)

    def begin(self) -> None:
        """All of them are about to be written to, those that stream too."""
        if self._blocks is not None:
            self._blocks.weights.invalidate()

    def finish(self) -> None:
        """Let the compute wait for what was published, and streamed weights be copied anew."""
        self._lane.wait(self._mark)
        if self._blocks is not None:
            self._blocks.weights.invalidate()


class DoubleBuffer:
    """Two host buffers through which gradients reach a worker, who updates one unit while the next is computed.

    Args:
        units: what trains.
        lane: what copies.
        threaded: whether the worker is a thread. Without one every update is done at once, by the caller.
    """

    def __init__(self, units: Units, lane: CopyStream, *, threaded: bool) -> None:
        # A norm per gradient travels along, in float64 as the widest there is.
        largest = max(BufferLayout.of([*unit.values(), _norms(len(unit))]).nbytes for unit in units)
        self._flats = [host_buffer(largest, pinned=True, what=GRADIENTS) for _ in range(2)]
        self._busy: list[Future[None] | None] = [None, None]
        self._outbox = GradientOffload(lane)
        self._lane = lane
        self._turn = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="optimizer") if threaded else None

    def send(
        self, named: Mapping[str, Tensor], norms: Tensor, update: Callable[[dict[str, Tensor], list[float]], None]
    ) -> None:
        """Copy gradients and their norms to the host and have the worker call ``update`` with them.

        Raises:
            BaseException: what an earlier update raised.
        """
        turn, self._turn = self._turn, 1 - self._turn
        self._wait(turn)
        sources = [*named.values(), norms.double()]
        *views, numbers = BufferLayout.of(sources).views(self._flats[turn])
        mark = self._outbox.send(sources, [*views, numbers])
        arrived = dict(zip(named, views, strict=True))

        def work() -> None:
            self._lane.finish(mark)
            update(arrived, numbers.tolist())

        if self._worker is None:
            work()
        else:
            self._busy[turn] = self._worker.submit(work)

    def finish(self) -> None:
        """Wait for the worker.

        Raises:
            BaseException: what an update raised.
        """
        self._outbox.clear()
        for turn in (self._turn, 1 - self._turn):  # the older one first
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        busy, self._busy[turn] = self._busy[turn], None
        if busy is not None:
            busy.result()


def tag_states(tensors: Iterable[Any]) -> None:
    """Register an optimizer's tensors as host memory."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and label_of(tensor.untyped_storage()) is None:
            label_buffer(tensor, OPTIMIZER, host=True)


def _norms(number: int) -> Tensor:
    return torch.empty(number, dtype=torch.float64)
