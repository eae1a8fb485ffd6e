"""What of a model is on the GPU while videos are sampled, how much memory that takes, and what fits a budget.

None of the ways to offload changes what is computed. They are diffusers' own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.cogvideox.components import read_json
from finetune.cogvideox.load import empty_transformer, meta_text_encoder, on_meta
from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import ConfigError
from finetune.core.gpu import to_gib, usable
from finetune.core.types import Bucket
from finetune.inference.generate import DECODED_BYTES_PER_PIXEL, decodes_in_tiles
from finetune.inference.quantization import SCHEMES, Quantization, is_quantised

Offload = Literal["none", "model", "group", "sequential"]
"""What waits in host memory: nothing; the module that does not compute now; all of the transformer's blocks but two;
all layers but two. Ordered from the fastest to the slowest."""

OFFLOADS: tuple[Offload, ...] = ("none", "model", "group", "sequential")


@dataclass(frozen=True)
class Placement:
    """How a model is held."""

    offload: Offload = "none"
    stream_text: bool = False
    """T5's blocks wait in host memory, and two at a time are on the GPU."""
    quantization: Quantization | None = None
    """Of the transformer."""
    text_quantization: Quantization | None = None
    compile: bool = False
    """Compile the transformer's blocks, which are one program."""

    def faults(self) -> Iterator[ConfigError]:
        """What does not go together."""
        where = f"--offload {self.offload}"
        if self.offload in ("group", "sequential") and self.quantization and not SCHEMES[self.quantization].leaves:
            what = f"layers in {self.quantization} do not move by themselves"
            yield ConfigError(what, where=where, fix="give --offload model, or --quantize int8")
        if self.compile and self.offload == "sequential":
            what = "what moves every layer by itself cannot be compiled"
            yield ConfigError(what, where=f"--compile, {where}", fix="leave one of them out")


@dataclass(frozen=True)
class Sampling:
    """What decides how much memory a model takes, beside how it is placed."""

    folder: Path
    """Of the model's JSON; no weight is read."""
    spec: ModelSpec
    bucket: Bucket
    dtype: torch.dtype
    guided: bool = True
    """Two passes in one batch."""
    adapter_bytes: int = 0
    processes: int = 1
    """That share each pass."""


# ----------------------------------------------------------------------------------------------------------- predicting

_ACTIVATIONS = {True: 13.3, False: 12.3}
"""Most that a block holds besides weights, in tensors of its input's size; with rotary tables and without. Counted on
diffusers' code over fake tensors, 12.1 for 2B and 13.0 to 13.3 for the other four models."""

_TEXT_ACTIVATIONS = 64 * 2**20
"""Of T5 over one prompt, in bf16."""

_DECODED_TILES = round(3.7 * 2**30)
"""Of decoding in tiles at two bytes per activation, beside the VAE's weights and the video; counted likewise."""


def peaks(sampling: Sampling, placement: Placement) -> dict[str, int]:
    """Most bytes of tensors that are on the device at a time, by what is done: arithmetic, nothing runs.

    Left out: what a card holds beside tensors (``core.gpu.usable``), and the image that image-to-video encodes.
    """
    transformer, text, vae = _read_weights(sampling, placement)
    adapters = sampling.adapter_bytes
    held = {
        "none": transformer.total + adapters + vae,
        "model": transformer.total + adapters,
        # One block, or layer, computes while the next arrives.
        "group": transformer.outside + 2 * transformer.block + adapters + vae,
        "sequential": 2 * transformer.layer + adapters,
    }[placement.offload]
    beside = {"none": held, "model": vae, "group": adapters + vae, "sequential": adapters + vae}[placement.offload]
    encoder = text.outside + 2 * text.block if placement.stream_text else text.total
    return {
        "encoding the prompts": encoder + _TEXT_ACTIVATIONS * sampling.dtype.itemsize // 2,
        "denoising": held + _activations(sampling) + (transformer.layer if placement.quantization else 0),
        "decoding": beside + _decoded(sampling.bucket, sampling.dtype),
    }


def _decoded(bucket: Bucket, dtype: torch.dtype) -> int:
    pixels = bucket.height * bucket.width * dtype.itemsize
    if decodes_in_tiles(bucket, dtype):
        return _DECODED_TILES * dtype.itemsize // 2 + 3 * bucket.frames * pixels
    return DECODED_BYTES_PER_PIXEL * pixels // 2


def _activations(sampling: Sampling) -> int:
    spec = sampling.spec
    tokens = (2 if sampling.guided else 1) * spec.tokens(sampling.bucket)
    width = spec.num_attention_heads * spec.attention_head_dim
    units = _ACTIVATIONS[spec.use_rotary] / sampling.processes
    return round(units * tokens * width * sampling.dtype.itemsize)


@dataclass(frozen=True)
class _Weights:
    """Bytes of a module: all of it, its largest block and layer, and what is in no block."""

    total: int
    block: int
    layer: int
    outside: int


def _weights(tensors: Mapping[str, float], blocks: str) -> _Weights:
    """Of bytes by name; ``blocks`` is the name of the list of blocks."""
    by_block, by_layer, outside = Counter[str](), Counter[str](), 0.0
    for name, nbytes in tensors.items():
        by_layer[name.rpartition(".")[0]] += ceil(nbytes)
        if name.startswith(f"{blocks}."):
            by_block[name.removeprefix(f"{blocks}.").partition(".")[0]] += ceil(nbytes)
        else:
            outside += nbytes
    total = round(sum(tensors.values()))
    return _Weights(total, max(by_block.values()), max(by_layer.values()), round(outside))


@cache
def _empty_models(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, int]:
    """Transformer and T5 without content, and the bytes of the VAE."""
    from diffusers import AutoencoderKLCogVideoX

    with on_meta(dtype):
        vae = AutoencoderKLCogVideoX.from_config(read_json(folder / "vae" / "config.json"))
    transformer = empty_transformer(folder, dtype=dtype, device="meta")
    return transformer, meta_text_encoder(folder, dtype), sum(tensor.nbytes for tensor in vae.parameters())


def _read_weights(sampling: Sampling, placement: Placement) -> tuple[_Weights, _Weights, int]:
    transformer, text, vae = _empty_models(sampling.folder, sampling.dtype)
    scheme = placement.quantization
    denoiser: dict[str, float] = {}
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        fewer = scheme is not None and is_quantised(scheme, name, tensor)
        denoiser[name] = tensor.numel() * SCHEMES[scheme].bytes_per_weight if scheme and fewer else tensor.nbytes
    encoder = {name: float(tensor.nbytes) for name, tensor in text.named_parameters()}
    if (by := placement.text_quantization) is not None:
        embedding = "shared.weight"
        encoder = {n: b if n == embedding else b / 2 * SCHEMES[by].bytes_per_weight for n, b in encoder.items()}
    return _weights(denoiser, "transformer_blocks"), _weights(encoder, "encoder.block"), vae


# ------------------------------------------------------------------------------------------------------------- choosing


def fit(sampling: Sampling, placement: Placement, budget: int, *, option: str = "--budget") -> Placement:
    """The fastest way to offload that keeps within a budget, and T5 streamed where it does not fit whole.

    Args:
        sampling: what is sampled.
        placement: how it is held otherwise; at least its own ``offload`` is done.
        budget: bytes of the card that may be used.
        option: for messages.

    Raises:
        ConfigError: if none fits; with how much the smallest takes.
    """
    room = usable(budget, sampling.processes)
    choices = [replace(placement, offload=offload) for offload in OFFLOADS[OFFLOADS.index(placement.offload) :]]
    choices = [choice for choice in choices if not [*choice.faults()]] or [placement]
    if peaks(sampling, placement)["encoding the prompts"] > room:
        choices = [replace(choice, stream_text=placement.text_quantization is None) for choice in choices]
    for choice in choices:
        if max(peaks(sampling, choice).values()) <= room:
            return choice
    least = min((peaks(sampling, choice) for choice in choices), key=lambda phases: max(phases.values()))
    phase = max(least, key=lambda name: least[name])
    needed = to_gib(least[phase] + budget - room)
    raise ConfigError(
        f"{to_gib(budget)} is not enough for {sampling.bucket}: {phase} takes {needed}, however the model is offloaded",
        where=option,
        fix="make a smaller or shorter video (--bucket)" + ("" if phase != "denoising" else ", or leave guidance out"),
    )


# ----------------------------------------------------------------------------------------------------- putting in place


@contextmanager
def offloading(pipeline: Any, how: Offload, device: torch.device) -> Iterator[None]:
    """Inside, a pipeline's modules are on ``device`` while they compute; diffusers' own hooks see to it.

    With ``group`` and ``sequential`` the modules keep their hooks: page-locking the weights takes seconds.

    Args:
        pipeline: its modules on the CPU; with ``none`` on ``device``, where they stay.
        how: which of them when.
        device: what computes.
    """
    if how == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif how in ("group", "sequential"):
        blocks: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
        options = blocks if how == "group" else {"offload_type": "leaf_level"}
        options |= {"onload_device": device, "use_stream": device.type == "cuda"}
        if not _is_offloaded(pipeline.transformer):
            pipeline.transformer.enable_group_offload(**options)
        if how == "group":
            pipeline.vae.to(device)
        elif not _is_offloaded(pipeline.vae):
            pipeline.vae.enable_group_offload(**options)
    try:
        yield
    finally:
        if how == "model":
            pipeline.remove_all_hooks()


def _is_offloaded(module: Any) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return bool(_is_group_offload_enabled(module))


def compile_blocks(transformer: Any) -> None:
    """Compile each block: they are alike, so it is done once, in seconds."""
    for block in transformer.transformer_blocks:
        block.compile()
