"""How a model is held while videos are sampled, how much memory of a GPU that takes, and what fits a budget.

A budget changes no video: it chooses what waits in host memory, and never in how many bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path

import torch
from torch import nn

from finetune.cogvideox.load import Component, empty_component
from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import ConfigError, raise_all
from finetune.core.gpu import to_gib, usable
from finetune.core.types import Bucket, Offload, Quantization
from finetune.inference.gguf import gguf_faults
from finetune.inference.offload import OFFLOADS
from finetune.inference.quantization import SCHEMES, is_quantised, scheme_faults
from finetune.inference.request import GenerateRequest
from finetune.inference.sample import DECODED_BYTES_PER_PIXEL, decodes_in_tiles


@dataclass(frozen=True)
class Placement:
    """How a model is held."""

    offload: Offload = "none"
    stream_text: bool = False
    """T5's blocks wait in host memory, and two at a time are on the GPU."""
    quantization: Quantization | None = None
    """Of the transformer."""
    text_quantization: Quantization | None = None
    gguf: Path | None = None
    """A file whose bits the transformer's weights stay in."""
    compile: bool = False
    """Compile the transformer's blocks, which are one program."""

    def faults(self) -> Iterator[ConfigError]:
        """What does not go together."""
        where = f"--offload {self.offload}"
        if self.offload in ("group", "sequential") and self.quantization and not SCHEMES[self.quantization].leaves:
            what = f"layers in {self.quantization} do not move by themselves"
            yield ConfigError(what, where=where, fix="give --offload model, or --quantize int8")
        if self.gguf is not None and self.quantization is not None:
            what = "a GGUF file is quantised as it is"
            yield ConfigError(what, where=f"--transformer {self.gguf}, --quantize", fix="leave --quantize out")
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
    encodes: bool = False
    """Whether the VAE encodes an image or a video first, and then stays beside the transformer."""
    adapter_bytes: int = 0
    processes: int = 1
    """That share each pass."""


# ----------------------------------------------------------------------------------------------------------- predicting

_ACTIVATIONS = {True: 13.3, False: 12.3}
"""Most that a block holds besides weights, in tensors of its input's size; with rotary tables and without. Counted on
diffusers' code over fake tensors, 12.1 for 2B and 13.0 to 13.3 for the other four models."""

_EMBEDDED = {True: 2.2, False: 3.2}
"""Likewise while tokens are embedded, which every process does with all of them; 2B adds whole positions."""

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
        "model": transformer.total + adapters + (vae if sampling.encodes else 0),
        # One block, or layer, computes while the next arrives.
        "group": transformer.outside + 2 * transformer.block + adapters + vae,
        "sequential": 2 * transformer.layer + adapters,
    }[placement.offload]
    beside = {"none": held, "model": vae, "group": adapters + vae, "sequential": adapters + vae}[placement.offload]
    width = sampling.spec.num_attention_heads * sampling.spec.attention_head_dim
    decoded = 4 * width**2 * sampling.dtype.itemsize  # a layer of a feed-forward, made whole as it computes
    encoder = text.outside + 2 * text.block if placement.stream_text else text.total
    return {
        "encoding the prompts": encoder + _TEXT_ACTIVATIONS * sampling.dtype.itemsize // 2,
        "denoising": held + _activations(sampling) + (decoded if placement.quantization or placement.gguf else 0),
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
    units = max(_ACTIVATIONS[spec.use_rotary] / sampling.processes, _EMBEDDED[spec.use_rotary])
    units += 0.1 * (sampling.processes > 1)  # the whole latents and positions, and the largest share
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
def _empty(folder: Path, component: Component, dtype: torch.dtype) -> nn.Module:
    return empty_component(folder, component, dtype)


def _read_weights(sampling: Sampling, placement: Placement) -> tuple[_Weights, _Weights, int]:
    components: tuple[Component, ...] = ("transformer", "text_encoder", "vae")
    transformer, text, vae = (_empty(sampling.folder, name, sampling.dtype) for name in components)
    scheme = placement.quantization
    denoiser: dict[str, float] = {}
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        fewer = scheme is not None and is_quantised(scheme, name, tensor)
        denoiser[name] = tensor.numel() * SCHEMES[scheme].bytes_per_weight if scheme and fewer else tensor.nbytes
    if placement.gguf is not None:
        share = placement.gguf.stat().st_size / sum(denoiser.values())
        denoiser = {name: share * nbytes for name, nbytes in denoiser.items()}
    encoder = {name: float(tensor.nbytes) for name, tensor in text.named_parameters()}
    if (by := placement.text_quantization) is not None:
        embedding = "shared.weight"
        encoder = {n: b if n == embedding else b / 2 * SCHEMES[by].bytes_per_weight for n, b in encoder.items()}
    return (
        _weights(denoiser, "transformer_blocks"),
        _weights(encoder, "encoder.block"),
        sum(t.nbytes for t in vae.parameters()),
    )


# ------------------------------------------------------------------------------------------------------------- choosing


def fit(sampling: Sampling, placement: Placement, budget: int, among: Sequence[Offload] = OFFLOADS) -> Placement:
    """The fastest way to offload that keeps within a budget, and T5 streamed where it does not fit whole.

    Args:
        sampling: what is sampled.
        placement: how the model is held otherwise.
        budget: bytes of the card that may be used.
        among: ways to offload.

    Raises:
        ConfigError: if none fits; with how much the smallest takes.
    """
    room = usable(budget, sampling.processes)
    if placement.text_quantization is None and peaks(sampling, placement)["encoding the prompts"] > room:
        placement = replace(placement, stream_text=True)
    choices = [choice for how in among if not [*(choice := replace(placement, offload=how)).faults()]]
    for choice in choices:
        if max(peaks(sampling, choice).values()) <= room:
            return choice
    least = min((peaks(sampling, choice) for choice in choices), key=lambda phases: max(phases.values()))
    phase = max(least, key=lambda name: least[name])
    more = "divide it among GPUs (--parallel context)" if tuple(among) == OFFLOADS else "leave --offload out"
    raise ConfigError(
        f"{to_gib(budget)} is not enough for {sampling.bucket}: {phase} takes {to_gib(least[phase] + budget - room)}",
        where="--budget, or what is free of the GPU where none is given",
        fix=f"make a smaller or shorter video (--bucket), or {more}",
    )


def choose(request: GenerateRequest, sampling: Sampling, device: torch.device) -> Placement:
    """How a request's model is held: as asked for, and else the fastest way that fits the budget.

    Raises:
        ConfigError: for what does not go together, cannot run on ``device``, or does not fit.
    """
    placement = Placement(
        offload="none" if request.offload == "auto" else request.offload,
        quantization=request.quantize,
        text_quantization=request.quantize_text,
        gguf=request.gguf,
        compile=request.compile,
    )
    faults = [*placement.faults()]
    for option, scheme in (("--quantize", request.quantize), ("--quantize-text", request.quantize_text)):
        faults += [] if scheme is None else scheme_faults(scheme, option, device, sampling.dtype)
    if request.gguf is not None:
        faults += gguf_faults(request.gguf)
    if device.type == "cpu" and (placement.offload != "none" or request.budget is not None):
        where = "--budget" if request.budget else f"--offload {request.offload}"
        faults.append(ConfigError("there is no GPU to offload from", where=where, fix="leave it out"))
    raise_all(ConfigError, faults, what="{n} options do not go together, or not with this machine")
    if device.type == "cpu":
        return placement
    encodes = sampling.spec.conditioned or request.extend > 0 or any(prompt.video for prompt in request.prompts)
    sampling = replace(sampling, encodes=encodes)
    budget = request.budget or torch.cuda.mem_get_info(device)[0]
    if request.offload == "auto":
        return fit(sampling, placement, budget)
    if request.budget is not None:
        return fit(sampling, placement, budget, among=[request.offload])
    whole = peaks(sampling, placement)["encoding the prompts"] <= usable(budget)
    return replace(placement, stream_text=not whole and request.quantize_text is None)
