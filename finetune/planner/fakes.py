"""Models of true shape without a number in them: fake tensors on the CPU, which stands for device and host alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from finetune.cogvideox import load
from finetune.cogvideox.components import read_json
from finetune.cogvideox.load import make_room, on_meta
from finetune.memory.block_streaming import stream_text, text_placement
from finetune.memory.config import MemoryConfig, TextEncoder
from finetune.memory.quantized_linear import placement
from finetune.planner.memory_tracker import CPU, Allocation, MemoryTracker


@contextmanager
def fake_world() -> Iterator[MemoryTracker]:
    """Inside, tensors have shapes and no memory, and every number that is read off one is 1."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _conversions(), _no_gpu(), MemoryTracker(scalar=1.0) as ledger:
        yield ledger


@contextmanager
def _no_gpu() -> Iterator[None]:
    """Let nobody find the GPU that may be here: a buffer that is to be pinned must be a fake one."""
    real = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = real


@contextmanager
def _conversions() -> Iterator[None]:
    """Let ``Module.to`` give a fake parameter new storage, as it does to a real one.

    For fake tensors it exchanges two Python objects instead, which no weak reference may point to; ours do.
    """
    real = torch.utils.swap_tensors

    def assign(parameter: Tensor, converted: Tensor) -> None:
        same = parameter.untyped_storage()._cdata == converted.untyped_storage()._cdata
        if not (same and parameter.dtype == converted.dtype):
            parameter.data = converted.data

    torch.utils.swap_tensors = assign
    try:
        yield
    finally:
        torch.utils.swap_tensors = real


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer."""
    yield from module.parameters()
    yield from module.buffers()


def empty_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The VAE of a checkpoint's JSON, frozen and in evaluation mode."""
    from diffusers import AutoencoderKLCogVideoX

    with on_meta(dtype):
        vae: Any = AutoencoderKLCogVideoX.from_config(_config(folder, "vae"))
    make_room(vae, CPU)
    return vae.eval().requires_grad_(False)


def empty_text_encoder(folder: Path, dtype: torch.dtype, held: TextEncoder) -> tuple[Any, object]:
    """The T5 encoder of a checkpoint's JSON, held as ``memory.text_encoder`` says, and what has to live as long as it.

    Args:
        folder: of the checkpoint.
        dtype: of its weights.
        held: where and how.
    """
    from transformers import T5Config, T5EncoderModel

    with on_meta(dtype):
        encoder: Any = T5EncoderModel(T5Config.from_dict(_config(folder, "text_encoder")))
    if (form := text_placement(held)) is not None:
        form.prepare(encoder)
    make_room(encoder, CPU)
    encoder.eval().requires_grad_(False)
    return encoder, stream_text(encoder, CPU) if held == "streamed" else None


def empty_transformer(folder: Path, dtype: torch.dtype, memory: MemoryConfig, layers: int | None = None) -> Any:
    """The transformer of a checkpoint's JSON in evaluation mode.

    Args:
        folder: of the checkpoint.
        dtype: of its weights.
        memory: whose ``base`` says how it is held.
        layers: number of blocks; as the JSON says if None.
    """
    return load.empty_transformer(folder, dtype=dtype, device=CPU, placement=placement(memory.base), layers=layers)


def _config(folder: Path, component: str) -> dict[str, Any]:
    return dict(read_json(folder / component / "config.json"))


# -------- A module that runs many times on the same shapes: one run is rehearsed, the others leave the same traces.
#
# The VAE runs its coder once for every tile and every few frames, thousands of operations each time. All that differs
# is
# when.


@dataclass(frozen=True)
class _View:
    """One tensor that a run gave back."""

    piece: int
    """Which of the run's pieces it lies in."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Run:
    pieces: tuple[Allocation, ...]
    """With ticks from the run's begin."""
    ticks: int
    """How long it lasted."""
    output: tuple[object, ...]
    """Leaves of what it gave back, views in place of tensors."""
    spec: TreeSpec


@contextmanager
def rehearsed_once(ledger: MemoryTracker, module: nn.Module) -> Iterator[None]:
    """Inside, a run of ``module`` on tensors of shapes that it has seen is not made again, but entered as it was.

    A run that gives back its arguments or two views of one storage, or leaves something behind elsewhere, is made every
    time.

    Args:
        ledger: entered.
        module: whose result depends on nothing but its arguments, without gradients.
    """
    real, known = module.forward, dict[object, _Run | None]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = _signature((args, kwargs))
        if (run := known.get(key)) is not None:
            return _replay(ledger, run)
        if key in known:
            return real(*args, **kwargs)
        output, known[key] = _record(ledger, lambda: real(*args, **kwargs))
        return output

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _signature(arguments: object) -> object:
    leaves, spec = tree_flatten(arguments)
    shapes = [
        (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    ]
    return str(spec), tuple(shapes)


def _record(ledger: MemoryTracker, run: Callable[[], Any]) -> tuple[Any, _Run | None]:
    begin, first = ledger.tick, len(ledger.pieces)
    output = run()
    end = ledger.tick
    made = {id(piece): number for number, piece in enumerate(ledger.pieces[first:])}
    leaves, spec = tree_flatten(output)
    told: list[object] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            number = made.pop(id(ledger.piece_of(leaf)), None)
            if number is None:  # an argument, or two views of one storage
                return output, None
            told.append(_View(number, tuple(leaf.shape), leaf.stride(), leaf.dtype))
        else:
            told.append(leaf)
    pieces = tuple(piece.later(-begin) for piece in ledger.pieces[first:])
    left = {number for number, piece in enumerate(pieces) if piece.died > end - begin}
    if left != {leaf.piece for leaf in told if isinstance(leaf, _View)}:
        return output, None
    return output, _Run(pieces, end - begin, tuple(told), spec)


def _replay(ledger: MemoryTracker, run: _Run) -> Any:
    kept: dict[int, Tensor] = {}
    output = list(run.output)
    for place, leaf in enumerate(output):
        if isinstance(leaf, _View):
            output[place] = kept[leaf.piece] = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype)
    ledger.enter_again(run.pieces, run.ticks, kept)
    return tree_unflatten(output, run.spec)
