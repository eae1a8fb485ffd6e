"""Results of a benchmark as JSON: the machine and its versions first, then every row as soon as it is there.

So a run that is broken off, or ends with an error, has kept what it measured, and several runs, each of a piece, fill
one file.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str | None]:
    """Of libraries, Python, CUDA and cuDNN; None for what is not there, or came without metadata."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cudnn = torch.backends.cudnn.version()
    return found | {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


class Record:
    """A file of rows that is complete after each of them.

    Args:
        path: the file; None to keep nothing. Rows of an earlier run stay, if device and versions were the same.
        device: what it is measured on.
        key: which of a row's values tells what was measured; a row takes the place of one with the same.
    """

    def __init__(self, path: Path | None, device: str, *, key: str) -> None:
        self.path, self.key = path, key
        self.about: dict[str, Any] = {"device": device, "versions": versions()}
        self._rows = {row[key]: row for row in self._earlier()}
        self._write()

    def _earlier(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None else {}
        except (OSError, ValueError):
            return []
        rows: list[dict[str, Any]] = found.get("rows", []) if self.about.items() <= found.items() else []
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Take a row in, and write the file anew."""
        self._rows[row[self.key]] = row
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        content = self.about | {"date": datetime.date.today().isoformat(), "rows": list(self._rows.values())}
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)
