"""Writing safetensors files tensor by tensor, with their checksum taken on the way.

The library's own writer wants all tensors in host memory at once, and tells nobody what it wrote. Files are read by the
library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.core.checksums import checksum_bytes, checksum_parts
from finetune.core.files import atomic_write

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""The library's names."""

DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written, and takes no memory before and after."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    full_tensor: Callable[[], Tensor]
    """Makes it, on the CPU; named as tensors name it that are spread over processes."""

    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    def element_size(self) -> int:
        """Bytes of one of them."""
        return self.dtype.itemsize


def content_of(tensor: Tensor | Deferred) -> Tensor:
    """The tensor itself: made now if it was deferred, put together if it is spread over processes."""
    gather = getattr(tensor, "full_tensor", None)
    content: Any = tensor if gather is None else gather()
    return content  # type: ignore[no-any-return]


def atomic_save_tensors(
    path: Path, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file as ``files.atomic_write_bytes`` does; equal arguments give equal bytes.

    Tensors come to the CPU one at a time and are hashed on their way to the disk, so that a checkpoint of 40 GB neither
    needs 40 GB of host memory nor is read again for its checksum.

    Returns:
        The file's ``checksum_file``.

    Raises:
        OSError: as ``atomic_write_bytes``.
        TypeError: if a tensor is of a dtype that safetensors does not hold.
    """
    return atomic_write(path, layout(tensors, metadata or {}))


def add_metadata(path: Path, describe: Callable[[str], Mapping[str, str]]) -> None:
    """Add to the metadata of a safetensors file; its tensors stay as they are, byte for byte.

    The library writes metadata in an order that changes from process to process. Here it is sorted, so that equal
    content is an equal file.

    Args:
        path: the file, which is read whole: an adapter's, not a model's.
        describe: what to add, given the SHA-256 of the tensors' bytes.

    Raises:
        OSError: as ``atomic_write_bytes``.
    """
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    metadata = {**header.pop("__metadata__", {}), **describe(hashlib.sha256(content[begin:]).hexdigest())}
    text = _aligned({"__metadata__": dict(sorted(metadata.items())), **header})
    atomic_write(path, [memoryview(len(text).to_bytes(8, "little") + text), memoryview(content)[begin:]])


def form_of(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """What a tensor is, but for its content, such as ``float32 [4, 64]``."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def layout(tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, one part after the other; equal arguments give equal bytes.

    Tensors come to the CPU, and are made contiguous, one at a time; so are those that are spread over processes, which
    all have to call this then.

    Raises:
        TypeError: before the first part, if a tensor is of a dtype that the format does not hold.
    """
    # Wide elements first, as the library orders them: every tensor then begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    text = _header(names, tensors, metadata)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield _content(content_of(tensors[name]))


def _content(tensor: Tensor) -> memoryview:
    """A tensor's bytes, on the CPU, in the order of its elements."""
    content: memoryview = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


def checksum_tensor(tensor: Tensor) -> str:
    """The checksum of a tensor's dtype, shape and content."""
    return checksum_bytes(f"{tensor.dtype} {list(tensor.shape)}".encode(), _content(tensor))


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """One number for named tensors, whoever holds them: the checksum of their safetensors file.

    It is that of ``trainable.safetensors`` in a checkpoint of one file. Shares of sharded tensors are put together for
    it, one tensor at a time, so all processes that hold some must call this.
    """
    return checksum_parts(layout(tensors, {}))


def file_bytes(tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None) -> int:
    """How large the file of ``tensors`` will be."""
    return 8 + len(_header(list(tensors), tensors, metadata or {})) + sum(map(_size, tensors.values()))


def _header(names: list[str], tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which a safetensors file does not hold")
        end = begin + _size(tensor)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    return _aligned(header)


def _aligned(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes


def _size(tensor: Tensor | Deferred) -> int:
    return tensor.numel() * tensor.element_size()
