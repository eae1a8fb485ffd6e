"""The layout of a safetensors file, so that one can be written, and hashed on the way, tensor by tensor.

The library's own writer wants all tensors in host memory at once, and tells nobody what it wrote. Files are read by the
library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

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

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}

BY_SHORT_NAME = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""As a configuration and a cache address name them."""


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
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
        tensor = tensors[name].detach()
        gather = getattr(tensor, "full_tensor", None)  # of one that is spread over processes
        ready = (tensor if gather is None else gather()).to("cpu").contiguous()
        yield ready.reshape(-1).view(torch.uint8).numpy().data


def checksum_tensor(tensor: Tensor) -> str:
    """The xxh3-128 of a tensor's dtype, shape and content, in hexadecimal."""
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """How large the file of ``tensors`` will be."""
    return 8 + len(_header(list(tensors), tensors, metadata or {})) + sum(map(_size, tensors.values()))


def _header(names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which a safetensors file does not hold")
        end = begin + _size(tensor)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
