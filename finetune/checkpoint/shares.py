"""Tensors that several processes hold in shares: one safetensors file for each process's, read whole or in part.

A file's header says where each share begins, in torch's own words (``torch.distributed.checkpoint.hf_storage``). So a
run goes on with another number of processes, and one process can put the tensors together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.core.checksums import ChecksummedFolder, DamageError
from finetune.core.tensor_files import DTYPES_BY_NAME, atomic_save_tensors, file_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

HEADER = "DCP_SHARDING_INFO"

OFFSETS = "saved_offsets"
"""Entry of a file's header, and key per tensor in it."""

Region = tuple[slice, ...]
"""A part of a tensor: from where to where, along each dimension."""


def part_of(name: str) -> str:
    """The folder that holds what would be one file of ``name`` if one process had written it."""
    return name.removesuffix(".safetensors")


def has_shares(folder: ChecksummedFolder, part: str) -> bool:
    """Whether a checkpoint holds ``part`` in shares."""
    return any(name.startswith(f"{part}/") for name in folder.checksums)


def region_of(tensor: DTensor) -> Region:
    """Which part of the whole this process's share of a tensor is; shares are cut as ``torch.chunk`` cuts."""
    (placement,) = tensor.placements
    processes, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    region = [slice(0, size) for size in tensor.shape]
    dim = placement.dim  # type: ignore[attr-defined]  # of Shard, the one placement that FSDP2 gives
    length = -(-tensor.shape[dim] // processes)
    begin = min(rank * length, tensor.shape[dim])
    region[dim] = slice(begin, min(begin + length, tensor.shape[dim]))
    return tuple(region)


def write_shares(folder: Path, tensors: Mapping[str, Tensor], *, rank: int, world: int) -> dict[str, str]:
    """Write this process's shares of ``tensors`` to a file of its own, if there are any.

    Args:
        folder: of this part; it exists, and every process sees it.
        tensors: DTensors, or plain tensors that every process holds alike, of which the first writes each.
        rank: this process.
        world: how many there are.

    Returns:
        The file's checksum by its name.

    Raises:
        OSError: if it cannot be written.
    """
    shares = _shares(tensors, first=rank == 0)
    if not shares:
        return {}
    path = folder / f"share-{rank + 1:05d}-of-{world:05d}.safetensors"
    offsets = {name: {OFFSETS: begins} for name, (_, begins) in shares.items()}
    header = {HEADER: json.dumps(offsets, sort_keys=True), "format": "pt"}
    return {path.name: atomic_save_tensors(path, {name: share for name, (share, _) in shares.items()}, header)}


def share_bytes(tensors: Mapping[str, Tensor], *, rank: int) -> int:
    """What this process's file of ``tensors`` takes, its header generously included."""
    shares = _shares(tensors, first=rank == 0)
    return file_bytes({name: share for name, (share, _) in shares.items()}) + 64 * len(shares)


def _shares(tensors: Mapping[str, Tensor], *, first: bool) -> dict[str, tuple[Tensor, list[int]]]:
    """This process's share of each tensor and where it begins, but for those of which it holds nothing."""
    from torch.distributed.tensor import DTensor

    shares: dict[str, tuple[Tensor, list[int]]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            share = tensor.to_local()
            if share.numel() or not tensor.numel():
                shares[name] = share, [place.start for place in region_of(tensor)]
        elif first:
            shares[name] = tensor, [0] * tensor.ndim
    return shares


class Shares(Mapping[str, Tensor]):
    """Whole tensors out of a folder of shares, put together one at a time, when they are asked for.

    Args:
        folder: the checkpoint.
        part: the folder's name in it. Every file of it is verified now.

    Raises:
        DamageError: if a file is not as it was written, or the shares do not make up whole tensors.
        OSError: if a file cannot be read for another reason than damage.
    """

    def __init__(self, folder: ChecksummedFolder, part: str) -> None:
        from safetensors import SafetensorError, safe_open

        self._shares: dict[str, list[tuple[Any, Region]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(name for name in folder.checksums if name.startswith(f"{part}/")):
            folder.verify(name)
            try:
                file: Any = safe_open(folder.folder / name, framework="pt")
                offsets = json.loads(file.metadata()[HEADER])
                for key in file.keys():  # noqa: SIM118
                    self._add(key, file, offsets[key][OFFSETS])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise DamageError(folder.folder / name, f"holds no shares of tensors: {error}") from None
        for key, shape in self._shapes.items():
            count = sum(math.prod(place.stop - place.start for place in region) for _, region in self._shares[key])
            if count != math.prod(shape):
                raise DamageError(folder.folder / part, f"holds {count} of {math.prod(shape)} numbers of {key}")

    def _add(self, key: str, file: Any, begins: list[int]) -> None:
        sizes = file.get_slice(key).get_shape()
        region = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        self._shares.setdefault(key, []).append((file, region))
        shape = self._shapes.get(key, tuple(0 for _ in region))
        self._shapes[key] = tuple(max(size, place.stop) for size, place in zip(shape, region, strict=True))

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key, tuple(slice(0, size) for size in self._shapes[key]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def read(self, key: str, wanted: Region) -> Tensor:
        """A part of one tensor; of other parts, nothing is read."""
        tensor = torch.empty([place.stop - place.start for place in wanted], dtype=self._dtype(key))
        for file, region in self._shares[key]:
            if not region:  # a single number
                return file.get_tensor(key)  # type: ignore[no-any-return]
            common = [
                slice(max(ours.start, theirs.start), min(ours.stop, theirs.stop))
                for ours, theirs in zip(wanted, region, strict=True)
            ]
            if all(place.start < place.stop for place in common):
                tensor[_shifted(common, wanted)] = file.get_slice(key)[_shifted(common, region)]
        return tensor

    def forms(self) -> dict[str, Tensor]:
        """Shape and dtype of every whole tensor, as a tensor without content; nothing is read for it."""
        return {key: torch.empty(self._shapes[key], dtype=self._dtype(key), device="meta") for key in self}

    def _dtype(self, key: str) -> torch.dtype:
        file, _ = self._shares[key][0]
        return DTYPES_BY_NAME[file.get_slice(key).get_dtype()]


def _shifted(region: list[slice], origin: Region) -> Region:
    """``region``, counted from where ``origin`` begins."""
    return tuple(
        slice(place.start - begin.start, place.stop - begin.start) for place, begin in zip(region, origin, strict=True)
    )


def forms_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of these shapes and dtypes, without reading any that is in shares."""
    return tensors.forms() if isinstance(tensors, Shares) else tensors
