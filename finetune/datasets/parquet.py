"""Columns of text out of a Parquet file, read in a process of its own (``parquet_child`` says why)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import finetune
from finetune.errors import DataError, raise_if_killed

_MEMORY_BYTES = 4 << 30
"""What reading may take beside the libraries; a file of the greatest size that is read takes half of it."""
_PATIENCE_S = 900.0


def read_columns(
    path: Path, wanted: Collection[str], *, most_rows: int, most_columns: int, most_bytes: int
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Read the wanted columns of a Parquet file, as far as they hold text.

    Returns:
        Every column of the file with what is wrong with it as a column of text (empty: nothing), and the rows.

    Raises:
        DataError: if it is damaged, claims more than the limits allow, or cannot be read in the memory and time given.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Under a plain name: HF datasets takes some names for patterns, addresses or archives.
        link, output = Path(folder) / "table.parquet", Path(folder) / "rows.jsonl"
        link.symlink_to(path.absolute())
        request = {
            "path": str(link),
            "output": str(output),
            "cache": folder,
            "wanted": sorted(wanted),
            "memory_bytes": _MEMORY_BYTES,
            "most_rows": most_rows,
            "most_columns": most_columns,
            "most_bytes": most_bytes,
        }
        ended = _run(json.dumps(request), folder)
        answers = [] if ended else [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    *told, verdict = answers or [{"fault": f"not a readable Parquet file: {ended}"}]
    if verdict["fault"]:
        raise DataError(verdict["fault"], where=str(path), fix="write the file again, or a smaller one")
    return told[0], told[1:]


def _run(request: str, folder: str) -> str:
    """Run the child, twice if a signal ends it; what ended it, if it did not end by itself."""
    package = str(Path(finetune.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": folder,
    }
    # -P: a dataset's folder may be the working one, and must not be where modules are looked for.
    words = [sys.executable, "-P", "-m", "finetune.datasets.parquet_child"]
    for _ in range(2):
        try:
            done = subprocess.run(
                words, input=request.encode(), env=environment, timeout=_PATIENCE_S, check=False, capture_output=True
            )
        except subprocess.TimeoutExpired:
            return f"it was not read within {_PATIENCE_S:g} s"
        if done.returncode >= 0:
            break
    table = Path(folder, "table.parquet").readlink()
    raise_if_killed(done.returncode, "the reader of a Parquet file", where=str(table))
    if done.returncode == 0:
        return ""
    return f"the reader ended with {'signal' if done.returncode < 0 else 'code'} {abs(done.returncode)}"
