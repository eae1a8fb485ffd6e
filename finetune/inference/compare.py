"""The same prompts and seeds in columns: an adapter's strengths, or a run's checkpoints over time, with the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.checkpoint.folders import step_folders
from finetune.core.errors import ConfigError
from finetune.inference.request import AdapterArgument
from finetune.inference.videos import Frames, labelled_grid, side_by_side, write_mp4

_MOST_CHECKPOINTS = 8
"""Of a run with more, as many are shown, spread evenly from the first to the last."""


@dataclass(frozen=True)
class Column:
    """What samples one column."""

    label: str
    scale: float = 1.0
    """Of the strengths of the adapters that were asked for, but for those of the base."""
    added: tuple[AdapterArgument, ...] = ()
    """Beside those."""

    def adapters(self, own: Sequence[AdapterArgument], of_base: Collection[Path]) -> tuple[AdapterArgument, ...]:
        """What acts, where ``own`` is asked for.

        Args:
            own: with the strengths that were asked for.
            of_base: the paths of those that belong to the base which others were trained on.
        """
        scaled = (one if one.path in of_base else replace(one, strength=one.strength * self.scale) for one in own)
        return (*scaled, *self.added)


def parse_comparison(text: str) -> tuple[float, ...] | Path:
    """Read ``--compare``: strengths with commas between them, or a run's folder."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return Path(text)


def columns_of(comparison: tuple[float, ...] | Path | None, *, adapters: bool) -> tuple[Column, ...]:
    """The columns of a comparison; a single one without a label for none.

    Args:
        comparison: factors of every adapter's strength (0 is the base), a run's folder, or None.
        adapters: whether there are any.

    Raises:
        ConfigError: for strengths without an adapter, or a folder without checkpoints.
    """
    if comparison is None:
        return (Column(""),)
    where = f"--compare {comparison if isinstance(comparison, Path) else ','.join(f'{s:g}' for s in comparison)}"
    if not isinstance(comparison, Path):
        if not adapters:
            raise ConfigError("there is no adapter whose strength could change", where=where, fix="give --adapter PATH")
        return tuple(Column("base" if not s else f"strength {s:g}", s) for s in dict.fromkeys(comparison))
    checkpoints = step_folders(comparison)
    if not checkpoints:
        raise ConfigError(
            "the folder holds no checkpoints of a run",
            where=where,
            fix="give a run's folder, or strengths such as 0,0.5,1",
        )
    chosen = np.linspace(0, len(checkpoints) - 1, min(len(checkpoints), _MOST_CHECKPOINTS)).round().astype(int)
    steps = [checkpoints[index] for index in chosen]
    return (Column("base"), *(Column(f"step {step}", added=(AdapterArgument(path),)) for step, path in steps))


def write_comparison(
    rows: Mapping[str, tuple[str, Sequence[Frames]]], labels: Sequence[str], out: Path, fps: float
) -> tuple[tuple[Path, ...], Path]:
    """One labelled mp4 per row, its columns beside each other, and all rows in ``sheet.png``.

    Args:
        rows: by the mp4's name: what stands above the row in the sheet, and a video per column.
        labels: of the columns.
        out: the folder.
        fps: frames per second.

    Returns:
        The videos, and the sheet.
    """
    paths = [
        write_mp4(out / name, labelled_grid([*zip(labels, videos, strict=True)]), fps)
        for name, (_, videos) in rows.items()
    ]
    return tuple(paths), side_by_side([*rows.values()], labels, out / "sheet.png")
