"""Models of true shape without a number in them: fake tensors on the CPU, which stands for device and host alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox import load
from finetune.cogvideox.components import read_json
from finetune.cogvideox.load import make_room, on_meta
from finetune.memory.block_streaming import stream_text, text_placement
from finetune.memory.config import MemoryConfig, TextEncoder
from finetune.memory.quantized_linear import placement
from finetune.planner.memory_tracker import CPU, MemoryTracker


@contextmanager
def fake_world() -> Iterator[MemoryTracker]:
    """Inside, tensors have shapes and no memory, every number that is read off one is 1, and no GPU is found.

    ``Module.to`` exchanges two Python objects for a fake parameter, which no weak reference may point to; ours do. So
    it is made to give the parameter new storage, as it does to a real one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def assign(parameter: Tensor, converted: Tensor) -> None:
        same = parameter.untyped_storage()._cdata == converted.untyped_storage()._cdata
        if not (same and parameter.dtype == converted.dtype):
            parameter.data = converted.data

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _replaced(torch.utils, "swap_tensors", assign),
        _replaced(torch.cuda, "is_available", lambda: False),  # a buffer that is to be pinned must be a fake one
        MemoryTracker(scalar=1.0) as tracker,
    ):
        yield tracker


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer."""
    yield from module.parameters()
    yield from module.buffers()


def empty_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The VAE of a checkpoint's JSON, frozen and in evaluation mode."""
    from diffusers import AutoencoderKLCogVideoX

    with on_meta(dtype):
        vae: Any = AutoencoderKLCogVideoX.from_config(read_json(folder / "vae" / "config.json"))
    make_room(vae, CPU)
    return vae.eval().requires_grad_(False)


def empty_text_encoder(folder: Path, dtype: torch.dtype, where: TextEncoder) -> tuple[Any, object]:
    """The T5 encoder of a checkpoint's JSON, held as ``memory.text_encoder`` says, and what has to live as long as it.

    Args:
        folder: of the checkpoint.
        dtype: of its weights.
        where: ``memory.text_encoder``.
    """
    from transformers import T5Config, T5EncoderModel

    with on_meta(dtype):
        encoder: Any = T5EncoderModel(T5Config.from_dict(dict(read_json(folder / "text_encoder" / "config.json"))))
    if (form := text_placement(where)) is not None:
        form.prepare(encoder)
    make_room(encoder, CPU)
    encoder.eval().requires_grad_(False)
    return encoder, stream_text(encoder, CPU) if where == "streamed" else None


def empty_transformer(folder: Path, dtype: torch.dtype, memory: MemoryConfig, layers: int | None = None) -> Any:
    """The transformer of a checkpoint's JSON in evaluation mode.

    Args:
        folder: of the checkpoint.
        dtype: of its weights.
        memory: whose ``base`` says how it is held.
        layers: number of blocks; as the JSON says if None.
    """
    return load.empty_transformer(folder, dtype=dtype, device=CPU, placement=placement(memory.base), layers=layers)
