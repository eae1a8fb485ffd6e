"""What an entry of the cache is: the address that decides its tensors, and a file that can prove itself whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO, Literal

import torch
import xxhash
from torch import Tensor

from finetune.datasets.manifest import FORMAT, Kind
from finetune.datasets.sealed import ZEROS, fill, is_filled
from finetune.files import checksum_bytes, digest_of
from finetune.tensorfiles import DTYPES as NAMES
from finetune.tensorfiles import layout
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
    corrections: Sequence[str] = (),
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
        corrections: what is done to the frames of a video that is not plain. Left out where there is none, so that
            plain videos keep the addresses they had before there were any.
    """
    corrected = {"corrections": list(corrections)} if corrections else {}
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
        **corrected,
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

_OPENING = b'{"__metadata__":{"checksum":"'
_CHECKSUM_AT = 8 + len(_OPENING)
"""Where the checksum stands in every entry: bytes 37 to 68."""


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata vouches for every byte of it; equal arguments give equal bytes.

    ``data_checksum`` is that of all bytes after the header. ``checksum`` is that of the header (its length, its padding
    and ``data_checksum`` included), with zeros in its own place, so that a header can be trusted without its tensors.
    """
    data = list(layout(tensors, {}))[1:]
    sealed = {"checksum": ZEROS.decode("ascii"), "data_checksum": checksum_bytes(*data), **metadata}
    header = fill(bytes(next(layout(tensors, sealed))), _CHECKSUM_AT)
    return b"".join([header, *data])


def fault_of(content: bytes, kind: Kind, key: str) -> str:
    """Why a file is not, to the bit, the entry that was written under this name; empty if it is.

    More is asked than in reading: whether the key is that of the address.
    """
    end = _header_end(content)
    try:
        metadata = _checked_header(content[:end], key)["__metadata__"]
    except ValueError as error:
        return str(error)
    if metadata["data_checksum"] != checksum_bytes(memoryview(content)[end:]):
        return "its tensors are not what was written"
    address = json.loads(metadata["address"])
    return "" if digest_of(address) == key and address["kind"] == kind else "it is another entry under this name"


def read_tensors(entry: BinaryIO, key: str, *, verify: bool) -> dict[str, Tensor]:
    """The tensors of an entry from its open file; they share one buffer, and nobody else has it.

    Bytes are hashed right after they are read, while they are in the processor's cache, and copied once.

    Args:
        entry: opened without a buffer of its own, at the beginning.
        key: its name.
        verify: False where this very file was found whole before.

    Raises:
        ValueError: if it is not, to the bit, the entry that was written under this name.
        OSError: if it cannot be read.
    """
    size = os.fstat(entry.fileno()).st_size
    buffer = torch.empty(size, dtype=torch.uint8)
    whole: memoryview = buffer.numpy().data
    end = min(8 + int.from_bytes(whole[: _fill(entry, whole[:8])], "little"), size)
    _fill(entry, whole[8:end])
    header = _checked_header(bytes(whole[:end]), key) if verify else json.loads(bytes(whole[8:end]))
    digest = xxhash.xxh3_128()
    step = _CHUNK if verify else max(size, 1)
    for at in range(end, size, step):
        chunk = whole[at : at + step]
        if _fill(entry, chunk) < len(chunk):
            raise ValueError("it is cut off")
        if verify:
            digest.update(chunk)
    if verify and digest.hexdigest() != header["__metadata__"]["data_checksum"]:
        raise ValueError("its tensors are not what was written")
    try:
        data = buffer[end:]
        return {name: _tensor(data, part) for name, part in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # only if it is no longer what was verified
        raise ValueError(f"its header cannot be read: {error}") from None


_CHUNK = 1 << 18
"""Bytes read and hashed at a time: less than a core's own cache."""
_TORCH_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def _fill(entry: BinaryIO, part: memoryview) -> int:
    """Read into ``part`` until it is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(part) and (count := entry.readinto(part[done:])):  # type: ignore[attr-defined]  # unbuffered
        done += count
    return done


def _tensor(data: Tensor, part: Mapping[str, Any]) -> Tensor:
    begin, end = part["data_offsets"]
    return data[begin:end].view(_TORCH_DTYPES[part["dtype"]]).view(part["shape"])


def read_metadata(entry: BinaryIO, key: str) -> dict[str, str]:
    """The metadata of an entry from the beginning of its open file; its tensors are not read.

    Raises:
        ValueError: if its header is not, to the bit, what was written under this name.
        OSError: if it cannot be read.
    """
    start = entry.read(8)
    length = min(int.from_bytes(start, "little"), _LARGEST_HEADER)
    metadata: dict[str, str] = _checked_header(start + entry.read(length), key)["__metadata__"]
    return metadata


_LARGEST_HEADER = 1 << 24
"""Bytes; a damaged length must not make anybody read gigabytes."""


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _checked_header(header: bytes, key: str) -> dict[str, Any]:
    """The JSON of a header, found whole and of this key."""
    if len(header) < 8 or len(header) != _header_end(header):
        raise ValueError("it is cut off")
    if header[8:_CHECKSUM_AT] != _OPENING or not is_filled(header, _CHECKSUM_AT):
        raise ValueError("its header is not what was written")
    parsed: dict[str, Any] = json.loads(header[8:])
    if parsed["__metadata__"]["key"] != key:
        raise ValueError("it is another entry under this name")
    return parsed
