"""Models of true shape without a number in them: fake tensors on the CPU, which stands for device and host alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import cogvideox
from finetune.cogvideox.weights import make_room, on_meta
from finetune.facts import read_json
from finetune.memory import MemoryConfig
from finetune.memory.quantize import TextEncoder, placement
from finetune.memory.text_encoder import stream_text, text_placement
from finetune.planning.ledger import CPU, Ledger


@contextmanager
def fake_world() -> Iterator[Ledger]:
    """Inside, tensors have shapes and no memory, and every number that is read off one is 1."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _conversions(), _no_gpu(), Ledger(scalar=1.0) as ledger:
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
    return cogvideox.empty_transformer(folder, dtype=dtype, device=CPU, placement=placement(memory.base), layers=layers)


def _config(folder: Path, component: str) -> dict[str, Any]:
    return dict(read_json(folder / component / "config.json"))
