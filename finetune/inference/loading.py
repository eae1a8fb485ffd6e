"""What samples, in memory: text encoder, transformer and VAE, each held as a placement says."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.encode import encode_prompts
from finetune.cogvideox.load import load_text, load_transformer
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.spec import ModelSpec
from finetune.inference.gguf import load_gguf
from finetune.inference.placement import Placement
from finetune.inference.quantization import SCHEMES, quantization_config
from finetune.memory.block_streaming import stream_text

_CPU = torch.device("cpu")


def embed_prompts(
    model: ModelConfig, spec: ModelSpec, prompts: Sequence[str], placement: Placement, device: torch.device
) -> list[Tensor]:
    """T5 embeddings [L, D] of each prompt, on the CPU; the encoder is gone from memory afterwards."""
    scheme = placement.text_quantization
    config = None if scheme is None else quantization_config(scheme, text=True)
    start = _CPU if placement.stream_text else device
    tokenizer, encoder = load_text(model, device=start, quantization=config)
    streamed = stream_text(encoder, device) if placement.stream_text else None
    embeds = [encode_prompts(tokenizer, encoder, [prompt], spec)[0].cpu() for prompt in prompts]
    del tokenizer, encoder, streamed
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeds


def start_device(placement: Placement, device: torch.device) -> torch.device:
    """Where weights are while nothing computes."""
    return device if placement.offload == "none" else _CPU


def load_denoiser(model: ModelConfig, placement: Placement, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer, without adapters, as it will compute.

    Args:
        model: where its weights are; of a GGUF file's base, the JSON alone is read.
        placement: without faults.
        device: what computes.
        dtype: in which.

    Raises:
        ModelError: if it cannot be found or loaded.
        ConfigError: for a file of another model.
    """
    start, scheme = start_device(placement, device), placement.quantization
    if placement.gguf is not None:
        transformer = load_gguf(
            placement.gguf, json_folder(model.pretrained, model.revision), device=start, dtype=dtype
        )
    elif scheme is None or scheme == "fp8-cast":
        transformer = load_transformer(model, device=start, dtype=dtype)
    else:
        # bitsandbytes quantises on its way to the GPU.
        start = device if SCHEMES[scheme].library == "bitsandbytes" else start
        transformer = load_transformer(model, device=start, dtype=dtype, quantization=quantization_config(scheme))
    if scheme == "fp8-cast":  # before adapters come, which stay as they are
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if placement.compile:
        for block in transformer.transformer_blocks:  # they are alike, so that it is done once
            block.compile()
    return transformer
