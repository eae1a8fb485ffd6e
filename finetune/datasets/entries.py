"""One entry as bytes: a safetensors file that vouches for every byte of itself. ``docs/cache.md`` describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO

from finetune.core.checksums import NO_CHECKSUM, checksum_bytes, checksum_fits, digest_of, insert_checksum
from finetune.datasets.manifests import Kind

if TYPE_CHECKING:
    from torch import Tensor

_OPENING = b'{"__metadata__":{"checksum":"'

_CHECKSUM_AT = 8 + len(_OPENING)
"""Where the checksum stands in every entry: bytes 37 to 68."""

_LARGEST_HEADER = 1 << 24
"""Bytes; a damaged length must not make anybody read gigabytes."""


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata vouches for every byte of it; equal arguments give equal bytes.

    ``data_checksum`` is that of all bytes after the header. ``checksum`` is that of the header (its length, its padding
    and ``data_checksum`` included), with zeros in its own place, so that a header can be trusted without its tensors.
    """
    from finetune.core.tensor_files import layout

    data = list(layout(tensors, {}))[1:]
    checked = {"checksum": NO_CHECKSUM.decode("ascii"), "data_checksum": checksum_bytes(*data), **metadata}
    header = insert_checksum(bytes(next(layout(tensors, checked))), _CHECKSUM_AT)
    return b"".join([header, *data])


def fault_of(content: bytes | memoryview, kind: Kind, key: str) -> str:
    """Why a file is not, to the bit, the entry that was written under this name; empty if it is."""
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        metadata = _checked_metadata(bytes(content[:end]), key)
    except ValueError as error:
        return str(error)
    if metadata["data_checksum"] != checksum_bytes(memoryview(content)[end:]):
        return "its tensors are not what was written"
    address = json.loads(metadata["address"])
    return "" if digest_of(address) == key and address["kind"] == kind else "it is another entry under this name"


def tensors_in(content: Tensor) -> dict[str, Tensor]:
    """The tensors of an entry's bytes, whose memory they share: safetensors' own ``load`` copies it twice."""
    from finetune.core.tensor_files import DTYPES_BY_NAME

    view = content.numpy().data
    end = 8 + int.from_bytes(view[:8], "little")
    tensors = {}
    for name, tensor in json.loads(bytes(view[8:end])).items():
        if name != "__metadata__":
            first, last = tensor["data_offsets"]
            numbers = content[end + first : end + last].view(DTYPES_BY_NAME[tensor["dtype"]])
            tensors[name] = numbers.view(tensor["shape"])
    return tensors


def read_metadata(entry: BinaryIO, key: str) -> dict[str, str]:
    """The metadata of an entry from the beginning of its open file; its tensors are not read.

    Raises:
        ValueError: if its header is not, to the bit, what was written under this name.
        OSError: if it cannot be read.
    """
    start = entry.read(8)
    return _checked_metadata(start + entry.read(min(int.from_bytes(start, "little"), _LARGEST_HEADER)), key)


def entry_at(entry: BinaryIO) -> tuple[Kind, str, int]:
    """Kind, key and bytes of the entry that begins where an open file stands.

    Raises:
        ValueError: if no whole header begins there.
        OSError: if it cannot be read.
    """
    start = entry.read(8)
    header = start + entry.read(min(int.from_bytes(start, "little"), _LARGEST_HEADER))
    address = json.loads(_checked_metadata(header)["address"])
    parts = json.loads(header[8:])
    size = max(part["data_offsets"][1] for name, part in parts.items() if name != "__metadata__")
    return address["kind"], digest_of(address), len(header) + size


def _checked_metadata(header: bytes, key: str | None = None) -> dict[str, str]:
    if len(header) < 8 or len(header) != 8 + int.from_bytes(header[:8], "little"):
        raise ValueError("it is cut off")
    if header[8:_CHECKSUM_AT] != _OPENING or not checksum_fits(header, _CHECKSUM_AT):
        raise ValueError("its header is not what was written")
    metadata: dict[str, str] = json.loads(header[8:])["__metadata__"]
    if key not in (None, metadata["key"]):
        raise ValueError("it is another entry under this name")
    return metadata
