"""Whole tensors out of the shares of them that several processes wrote; for one process, without torch.distributed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.seals import DamageError, Sealed
from finetune.tensorfiles import DTYPES

HEADER = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
"""Entry of a file's header, and key per tensor in it, that say where a share begins: torch's own names."""


def part_of(name: str) -> str:
    """The folder that holds what would be one file of ``name`` if one process had written it."""
    return name.removesuffix(".safetensors")


def has_shares(sealed: Sealed, part: str) -> bool:
    """Whether a checkpoint holds ``part`` in shares."""
    return any(name.startswith(f"{part}/") for name in sealed.checksums)


class Shards(Mapping[str, Tensor]):
    """Whole tensors out of a folder of shares, put together one at a time, when they are asked for.

    Args:
        sealed: the checkpoint.
        part: the folder's name in it. Every file of it is verified now.

    Raises:
        DamageError: if a file is not as it was written, or the shares do not make up whole tensors.
        OSError: if a file cannot be read for another reason than damage.
    """

    def __init__(self, sealed: Sealed, part: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = sealed.folder / part
        self._shares: dict[str, list[tuple[Any, tuple[slice, ...]]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(name for name in sealed.checksums if name.startswith(f"{part}/")):
            sealed.verify(name)
            try:
                file: Any = safe_open(sealed.folder / name, framework="pt")
                offsets = json.loads(file.metadata()[HEADER])
                for key in file.keys():  # noqa: SIM118
                    self._add(key, file, offsets[key][OFFSETS])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise DamageError(sealed.folder / name, f"holds no shares of tensors: {error}") from None
        for key, shape in self._shapes.items():
            held = sum(math.prod(place.stop - place.start for place in places) for _, places in self._shares[key])
            if held != math.prod(shape):
                raise DamageError(self.folder, f"holds {held} of {math.prod(shape)} numbers of {key}")

    def _add(self, key: str, file: Any, begins: list[int]) -> None:
        sizes = file.get_slice(key).get_shape()
        places = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        self._shares.setdefault(key, []).append((file, places))
        known = self._shapes.get(key, tuple(0 for _ in places))
        self._shapes[key] = tuple(max(size, place.stop) for size, place in zip(known, places, strict=True))

    def __getitem__(self, key: str) -> Tensor:
        shares = self._shares[key]
        whole: Tensor | None = None
        for file, places in shares:
            share = file.get_tensor(key)
            if whole is None:
                whole = torch.empty(self._shapes[key], dtype=share.dtype)
            whole[places] = share
        assert whole is not None  # a key is there because a share of it is
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def forms(self) -> dict[str, Tensor]:
        """Shape and dtype of every whole tensor, as a tensor without content; nothing is read for it."""
        return {key: self._form(key) for key in self}

    def _form(self, key: str) -> Tensor:
        file, _ = self._shares[key][0]
        return torch.empty(self._shapes[key], dtype=_BY_NAME[file.get_slice(key).get_dtype()], device="meta")


def forms_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of these shapes and dtypes, without reading any that is in shares."""
    return tensors.forms() if isinstance(tensors, Shards) else tensors


_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
