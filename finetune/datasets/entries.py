"""What an entry of the cache is: the address that decides its tensors, and a file that can prove itself whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.datasets.manifest import FORMAT
from finetune.files import canonical_json
from finetune.types import Bucket, ClipPlan

Dtype = Literal["fp16", "bf16", "fp32"]
DTYPES: Mapping[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# ------------------------------------------------------------------------------------------------------- addresses


def latents_address(
    *,
    media_digest: str,
    image_digest: str | None,
    plan: ClipPlan,
    pixel_rule: str,
    vae: str,
    vae_dtype: str,
    latents_dtype: Dtype,
    image_draws: int | None,
) -> dict[str, Any]:
    """Everything that decides the latents of one clip.

    Args:
        media_digest: of the video file's bytes.
        image_digest: of the image file that stands for the first frame; None where the first frame itself does.
        plan: how the clip is cut out of the video.
        pixel_rule: names the arithmetic from a decoded frame to pixels.
        vae: the VAE's fingerprint.
        vae_dtype: what it computes in.
        latents_dtype: what is stored.
        image_draws: K for image-to-video, None for text-to-video.
    """
    return {
        "kind": "latents",
        "format": FORMAT,
        "media": media_digest,
        "image": image_digest,
        "plan": {**asdict(plan), "bucket": str(plan.bucket)},
        "pixels": pixel_rule,
        "vae": vae,
        "vae_dtype": vae_dtype,
        "dtype": latents_dtype,
        "image_draws": image_draws,
    }


def prompt_address(*, text: str, text_encoder: str, max_length: int, dtype: str) -> dict[str, Any]:
    """Everything that decides the embedding of one caption; ``dtype`` is both computed in and stored."""
    return {
        "kind": "prompts",
        "format": FORMAT,
        "text": text,
        "text_encoder": text_encoder,
        "max_length": max_length,
        "dtype": dtype,
    }


def image_address(*, image_digest: str, bucket: Bucket, pixel_rule: str) -> dict[str, Any]:
    """Everything that decides the pixels of one validation image."""
    return {
        "kind": "images",
        "format": FORMAT,
        "image": image_digest,
        "height": bucket.height,
        "width": bucket.width,
        "pixels": pixel_rule,
    }


# ----------------------------------------------------------------------------------------------------------- files


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata holds, under ``digest``, the digest of its tensors (``tensors_digest``).

    Equal arguments give equal bytes: the library writes metadata in an order that changes from one process to the next,
    so the header is written here.
    """
    from safetensors.torch import save

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    header, _, data = split(save(ready))
    metadata = {**metadata, "digest": tensors_digest(header, data)}
    text = canonical_json({"__metadata__": metadata, **header}).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + bytes(data)


def split(content: bytes) -> tuple[dict[str, Any], dict[str, str], memoryview]:
    """Cut a safetensors file into its tensors' descriptions, its metadata and its tensors' bytes.

    Raises:
        ValueError: if the header is no JSON, or does not fit the file.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 + length:
        raise ValueError("the file is cut off")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return header, metadata, memoryview(content)[8 + length :]


def tensors_digest(header: Mapping[str, Any], data: memoryview) -> str:
    """128-bit blake2b of the canonical JSON of the tensors' descriptions (dtype, shape, offsets) and of their bytes."""
    digest = hashlib.blake2b(canonical_json(header).encode("utf-8"), digest_size=16)
    digest.update(data)
    return digest.hexdigest()
