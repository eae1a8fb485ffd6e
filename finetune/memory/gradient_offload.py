"""Gradient release: what moves between device and host when gradients are let go of block by block.

``parallel.gradient_release`` says in what order these are used. A *unit* is what is updated at once: a block of the
transformer, or everything outside the blocks.
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
    flat_buffers,
    host_buffer,
    label_buffer,
    label_of,
)
from finetune.memory.runner import BlockRunner

GRADIENTS = "host gradients"

OPTIMIZER = "host optimizer"

Units = list[dict[str, nn.Parameter]]

_BLOCK = re.compile(r"\btransformer_blocks\.(\d+)\.")


def units_of(parameters: Mapping[str, nn.Parameter]) -> Units:
    """Parameters by name, unit by unit: blocks in their order, then what is outside of them, if anything is."""
    blocks: dict[int, dict[str, nn.Parameter]] = {}
    outside: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        match = _BLOCK.search(name)
        unit = blocks.setdefault(int(match.group(1)), {}) if match else outside
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
    """

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._sent: list[Tensor] = []
        self._end: StreamEvent = None

    def send(self, gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> StreamEvent:
        """Queue the copies; returns their end."""
        self._stream.wait(self._end)
        ready = self._stream.compute()
        for gradient, target in zip(gradients, targets, strict=True):
            self._end = self._stream.copy(target, gradient, after=[ready])
        self._sent = list(gradients)
        return self._end

    def clear(self) -> None:
        """Let go of what was sent; the compute waits for its copies."""
        self._stream.wait(self._end)
        self._sent = []


class HostGradients:
    """A step's gradients in host memory: 2 bytes per bf16 weight, pinned.

    Args:
        units: what trains.
        stream: what copies.
    """

    def __init__(self, units: Units, stream: CopyStream) -> None:
        self._stream = stream
        self._offload = GradientOffload(stream)
        self._layouts = [BufferLayout.of(unit.values()) for unit in units]
        self._flats = list(flat_buffers([layout.nbytes for layout in self._layouts], pinned=True, what=GRADIENTS))
        self._names = [list(unit) for unit in units]
        self._views: dict[str, tuple[int, Tensor]] = {}
        """Unit and buffer of every gradient."""
        for index, (names, layout, flat) in enumerate(zip(self._names, self._layouts, self._flats, strict=True)):
            self._views |= {name: (index, view) for name, view in zip(names, layout.views(flat), strict=True)}
        self._arrived: list[StreamEvent] = [None] * len(units)

    def put(self, gradients: Mapping[str, Tensor]) -> None:
        """Copy gradients, all of one unit, while the device goes on."""
        end = self._offload.send(list(gradients.values()), [self._views[name][1] for name in gradients])
        for name in gradients:
            self._arrived[self._views[name][0]] = end

    def end_step(self) -> None:
        """No more will come in this step."""
        self._offload.clear()

    def read(self, name: str) -> Tensor:
        """A gradient, once it has arrived; the buffer itself."""
        index, view = self._views[name]
        self._stream.finish(self._arrived[index])
        return view

    def apply_updates(self, device: torch.device, update: Callable[[dict[str, Tensor]], None]) -> None:
        """Bring every unit's gradients back to ``device`` and call ``update``; the next unit's come meanwhile."""
        size = max(layout.nbytes for layout in self._layouts)
        buffers = [device_buffer(size, device, "returned gradients") for _ in range(2)]
        free: list[StreamEvent] = [self._stream.compute()] * 2

        def fetch(index: int) -> StreamEvent:
            flat = self._flats[index]
            return self._stream.copy(buffers[index % 2][: flat.numel()], flat, after=[free[index % 2]])

        following = fetch(0)
        for index, (names, layout) in enumerate(zip(self._names, self._layouts, strict=True)):
            current, following = following, fetch(index + 1) if index + 1 < len(self._flats) else None
            self._stream.wait(current)
            update(dict(zip(names, layout.views(buffers[index % 2]), strict=True)))
            free[index % 2] = self._stream.compute()


class HostWeights:
    """Host tensors behind a model's weights, which an optimizer trains there, and their way back to the model.

    A weight that streams lives on the host anyway: then that is the tensor that is trained, and nothing is copied back.

    Args:
        units: what trains, with the values to start from.
        stream: what copies.
        runner: what runs the blocks, if they do not run by themselves.
    """

    def __init__(self, units: Units, stream: CopyStream, runner: BlockRunner | None) -> None:
        self._stream = stream
        self._model = {name: parameter for unit in units for name, parameter in unit.items()}
        self._end: StreamEvent = None
        self._use(runner)
        copied = [{name: p for name, p in unit.items() if name not in self._streamed} for unit in units]
        layouts = [BufferLayout.of(unit.values()) for unit in copied]
        buffers = flat_buffers([layout.nbytes for layout in layouts], pinned=True, what=OPTIMIZER)
        tensors = dict(self._streamed)
        for unit, layout, flat in zip(copied, layouts, buffers, strict=True):
            tensors |= zip(unit, layout.views(flat), strict=True)
            for name, parameter in unit.items():
                tensors[name].copy_(parameter.detach())
        self.trained = {name: nn.Parameter(tensors[name]) for name in self._model}
        """Host tensors by name, in the order of the units."""

    def follow(self, runner: BlockRunner | None) -> None:
        """Take note of another memory state of the model, whose weights may have begun to stream."""
        if runner is not self._runner:
            self._use(runner)
            for name, home in self._streamed.items():
                self.trained[name].data = home  # the same values: the model's

    def _use(self, runner: BlockRunner | None) -> None:
        self._runner = runner
        weights = None if runner is None else runner.weights
        homes = (
            {name: weights.home(p) for name, p in self._model.items()} if isinstance(weights, BlockStreaming) else {}
        )
        self._streamed = {name: home for name, home in homes.items() if home is not None}

    def copy_to_model(self, names: Iterable[str], *, after: StreamEvent) -> None:
        """Queue copies of updated weights into the model; ``after`` is the end of the last work that reads the old."""
        # Where the model computes on the host as well, the update itself is compute that the copy follows.
        ready = [after, self._stream.compute()]
        for name in names:
            if name not in self._streamed:
                self._end = self._stream.copy(self._model[name].detach(), self.trained[name].detach(), after=ready)

    def begin_update(self) -> None:
        """All of them are about to be written to, those that stream too."""
        if self._runner is not None:
            self._runner.weights.invalidate()

    def end_update(self) -> None:
        """Let the compute wait for what was copied to the model, and streamed weights be copied anew."""
        self._stream.wait(self._end)
        if self._runner is not None:
            self._runner.weights.invalidate()


class DoubleBuffer:
    """Two host buffers through which gradients reach a worker, who updates one unit while the next is computed.

    Args:
        units: what trains.
        stream: what copies.
        threaded: whether the worker is a thread. Without one every update is done at once, by the caller.
    """

    def __init__(self, units: Units, stream: CopyStream, *, threaded: bool) -> None:
        # A norm per gradient travels along, in float64 as the widest there is.
        norms = [torch.empty(len(unit), dtype=torch.float64) for unit in units]
        sizes = [BufferLayout.of([*unit.values(), norm]).nbytes for unit, norm in zip(units, norms, strict=True)]
        self._flats = [host_buffer(max(sizes), pinned=True, what=GRADIENTS) for _ in range(2)]
        self._busy: list[Future[None] | None] = [None, None]
        self._offload = GradientOffload(stream)
        self._stream = stream
        self._turn = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="optimizer") if threaded else None

    def send(
        self,
        gradients: Mapping[str, Tensor],
        norms: Tensor,
        update: Callable[[dict[str, Tensor], list[float]], None],
    ) -> None:
        """Copy gradients and their norms to the host and have the worker call ``update`` with them.

        Raises:
            BaseException: what an earlier update raised.
        """
        turn, self._turn = self._turn, 1 - self._turn
        self._wait(turn)
        sources = [*gradients.values(), norms.double()]
        *views, numbers = BufferLayout.of(sources).views(self._flats[turn])
        end = self._offload.send(sources, [*views, numbers])
        arrived = dict(zip(gradients, views, strict=True))

        def work() -> None:
            self._stream.finish(end)
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
        self._offload.clear()
        for turn in (self._turn, 1 - self._turn):  # the older one first
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        busy, self._busy[turn] = self._busy[turn], None
        if busy is not None:
            busy.result()


def label_optimizer_tensors(tensors: Iterable[Any]) -> None:
    """Register an optimizer's tensors as host memory."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and label_of(tensor.untyped_storage()) is None:
            label_buffer(tensor, OPTIMIZER, host=True)
