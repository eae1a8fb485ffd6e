"""Files that a worker reads elsewhere, read in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.core.errors import DataError
from finetune.core.types import Clip, ClipPlan, VideoProbe
from finetune.datasets.decode import probe_file
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.pictures import read_image
from finetune.datasets.tables import handle_parquet

probe = probe_file


def decode(path: Path, probe: VideoProbe, plan: ClipPlan) -> Clip:
    """One planned clip. Raises its DataError."""
    with DecodePool(workers=0) as pool:
        (((_, clip)),) = pool.decode_many([DecodeJob(path, probe, plan)])
    if isinstance(clip, DataError):
        raise clip
    return clip


def load_image(path: Path) -> torch.Tensor:
    """A still image, uint8 RGB [3, H, W]. Raises DataError."""
    return torch.from_numpy(np.ascontiguousarray(read_image(path).transpose(2, 0, 1)))


def read_parquet_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read Parquet in this process: to start a worker takes a second each."""

    def ask(_, path, fields, **limits):
        answer, lines = handle_parquet({"path": str(path), **fields})
        return json.loads(json.dumps(answer)), bytearray(b"".join(lines))

    monkeypatch.setattr("finetune.datasets.tables.Worker.ask", ask)
