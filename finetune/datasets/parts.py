"""A part of a dataset: what one of several commands, which know nothing of each other, takes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One of several parts of a dataset."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From ``3/16``.

        Raises:
            ConfigError: if it is none.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            fix = "write it as 3/16, from 1/16 to 16/16"
            raise ConfigError(f"{text!r} is no part of a dataset", where="--shard", fix=fix)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, rows: Sequence[T]) -> tuple[T, ...]:
        """Its share of all rows."""
        return tuple(rows[self.number - 1 :: self.of])

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What its manifest answers: that of the whole dataset, and which part."""
        return {**request, "shard": str(self)}


@dataclass(frozen=True)
class RowShare:
    """Which rows of a file are one reader's, where files are fewer than readers: every ``step``-th from ``first``."""

    step: int = 1
    first: int = 0

    def holds(self, group: int, index: int) -> bool:
        """Whether a row is in it; ``group`` counts too, so that groups of one row are shared out as well."""
        return (group + index) % self.step == self.first


def share_out(files: Sequence[T], *readers: tuple[int, int]) -> tuple[tuple[T, ...], RowShare]:
    """What one reader takes of files: whole ones where there are enough, else some rows of every one.

    ``datasets.distributed.split_dataset_by_node`` shares out alike; but what it gives no longer says which row is
    which, and so could be taken up again by as many readers only.

    Args:
        files: all there are.
        readers: pairs of a reader's number, from 0, and how many there are; those of each pair divide what one reader
            of the pair before it has, so that processes of a launch stay within their command's part.
    """
    chosen, rows = tuple(files), RowShare()
    for number, of in readers:
        if len(chosen) >= of:
            chosen = chosen[number::of]
        else:
            rows = RowShare(rows.step * of, rows.first + rows.step * number)
    return chosen, rows
