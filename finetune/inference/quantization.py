"""Transformers and text encoders in fewer bits, through diffusers' and transformers' quantisers: what is quantised.

Quantising changes what a model computes, and so its videos; a budget of memory never asks for it by itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from finetune.core.errors import ConfigError
from finetune.core.types import Quantization

KEPT = ("patch_embed", "time_embedding", "ofs_embedding", "norm1", "norm2", "norm_out", "proj_out")
"""Modules that stay as they are: what they compute scales or shifts whole rows, so rounding would not average out."""

_ADA_AND_LATER = (8, 9)
"""Compute capability of the first cards that multiply in fp8."""


@dataclass(frozen=True)
class Scheme:
    """One of ``Quantization``."""

    bytes_per_weight: float
    """Of a quantised layer, its share of the scales included."""
    library: str
    """Where it is from."""
    torchao: str = ""
    """Its configuration there."""
    text: bool = True
    """Whether T5 can be held so."""
    gpu: tuple[int, int] | None = None
    """The least compute capability of a GPU that it needs; None: runs on a CPU too."""
    leaves: bool = True
    """Whether single layers can be moved between host and GPU, as group and sequential offload do."""


SCHEMES: dict[Quantization, Scheme] = {
    "int8": Scheme(1.002, "torchao", "Int8WeightOnlyConfig"),
    "int8-dynamic": Scheme(1.002, "torchao", "Int8DynamicActivationInt8WeightConfig"),
    "fp8": Scheme(1.002, "torchao", "Float8WeightOnlyConfig"),
    "fp8-dynamic": Scheme(1.002, "torchao", "Float8DynamicActivationFloat8WeightConfig", gpu=_ADA_AND_LATER),
    "fp8-cast": Scheme(1.0, "torch", text=False),
    "nf4": Scheme(0.516, "bitsandbytes", gpu=(6, 0), leaves=False),
    "bnb-int8": Scheme(1.002, "bitsandbytes", gpu=(7, 5), leaves=False),
}


def is_quantised(scheme: Quantization, name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter of a transformer is held in fewer bits."""
    if scheme == "fp8-cast":  # biases of its layers too, but no norm
        return not any(part in name for part in ("patch_embed", "norm"))
    return tensor.ndim == 2 and name.endswith(".weight") and not set(KEPT) & set(name.split("."))


def scheme_faults(scheme: Quantization, option: str, device: torch.device, dtype: torch.dtype) -> Iterator[ConfigError]:
    """Why weights cannot be held so on this machine.

    Args:
        scheme: how.
        option: which of the command line asks for it.
        device: what computes.
        dtype: of the layers that are not quantised.
    """
    facts, where = SCHEMES[scheme], f"{option} {scheme}"
    if facts.gpu is not None:
        if device.type != "cuda":
            yield ConfigError("it needs a GPU of NVIDIA's", where=where, fix="choose int8, fp8 or fp8-cast")
        elif torch.cuda.get_device_capability(device) < facts.gpu:
            card, least = torch.cuda.get_device_name(device), ".".join(map(str, facts.gpu))
            what = f"it needs compute capability {least}, which a {card} does not have"
            yield ConfigError(what, where=where, fix="choose int8 or fp8")
    if facts.library == "torchao" and importlib.util.find_spec("torchao") is None:
        yield ConfigError("torchao is not installed", where=where, fix="pip install 'cogvideox-finetune[torchao]'")
    if facts.library != "torch" and dtype != torch.bfloat16:
        what = f"quantised layers compute in bf16, and the model in {str(dtype).removeprefix('torch.')}"
        yield ConfigError(what, where=where, fix="give --dtype bf16, or choose fp8-cast")
    if option == "--quantize-text" and not facts.text:
        yield ConfigError("it is for the transformer alone", where=where, fix="choose int8 or fp8")


def quantization_config(scheme: Quantization, *, text: bool = False) -> Any:
    """What ``from_pretrained`` of diffusers, or of transformers for T5, takes as ``quantization_config``.

    Args:
        scheme: without faults, and not ``fp8-cast``.
        text: for T5.
    """
    import diffusers
    import transformers

    library = transformers if text else diffusers
    if SCHEMES[scheme].library == "torchao":
        from torchao import quantization

        options = {"granularity": quantization.PerRow()} if scheme == "fp8-dynamic" else {}
        kind = getattr(quantization, SCHEMES[scheme].torchao)(**options)
        return library.TorchAoConfig(kind, modules_to_not_convert=None if text else [*KEPT])
    if scheme == "bnb-int8":
        return library.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=None if text else [*KEPT])
    return library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=None if text else [*KEPT],
    )
