"""Small checkpoints of LoRA and full fine-tuning, and the accidents that can happen to their files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint import folders
from finetune.checkpoint.folders import CheckpointConfig, list_checkpoints
from finetune.checkpoint.load import LoadedCheckpoint
from finetune.checkpoint.save import CheckpointContent, save_checkpoint
from finetune.core.checksums import folder_checksums
from finetune.core.distributed import ProcessGroup
from finetune.core.files import COMPLETE, TRAINABLE
from finetune.core.types import RunState

FILES = [TRAINABLE, folders.OPTIMIZER, folders.OPTIMIZER_META, folders.EMA, folders.CONFIG, folders.STATE, COMPLETE]
KINDS = ("lora", "full")


def content(kind: str, step: int, *, best: int | None = None, ema: bool = True) -> CheckpointContent:
    """What a checkpoint of a LoRA (fp32) or of full fine-tuning (bf16 with fp32 masters, 8-bit moments) holds."""
    generator = torch.Generator().manual_seed(step)
    dtype = torch.float32 if kind == "lora" else torch.bfloat16
    names = ["blocks.0.to_q.lora_A.weight", "blocks.0.to_q.lora_B.weight"]
    if kind == "full":
        names = ["blocks.0.to_q.weight", "blocks.0.to_q.bias"]
    trainable = {name: torch.randn(4, 6, generator=generator).to(dtype) for name in names} | {"empty": torch.zeros(0)}
    tensors = {f"state.{name}.exp_avg": torch.randn(4, 6, generator=generator) for name in names}
    if kind == "full":
        tensors |= {f"master.{name}": tensor.float() for name, tensor in trainable.items()}
        tensors["state.x.state1"] = torch.arange(64, dtype=torch.uint8)
    meta = {"class": "AdamW", "parameters": names, "scalars": {name: {"step": step} for name in names}}
    return CheckpointContent(
        RunState(step, "cache", samples_seen=step, best_heldout_loss=0.25 if best else None, best_step=best),
        trainable=trainable,
        optimizer=(tensors, meta),
        ema={name: tensor.float() for name, tensor in trainable.items()} if ema else None,
        config={"method": {"kind": kind, "rank": 4, "alpha": 2.0}, "text": "größe"},
    )


def write(run_dir: Path, step: int, kind: str = "lora", ranks: ProcessGroup | None = None, **policy: Any) -> Path:
    """Save the checkpoint of ``step``; ``best`` and ``ema`` are the content's, the rest is what to keep."""
    options = {name: policy.pop(name) for name in ("best", "ema") if name in policy}
    return save_checkpoint(
        run_dir, content(kind, step, **options), CheckpointConfig(**{"keep_last": 9, **policy}), ranks
    )


def assert_as_written(loaded: LoadedCheckpoint | None, step: int, kind: str = "lora", **options: Any) -> None:
    """Everything is there, bit for bit."""
    assert loaded is not None
    wanted = content(kind, step, **options)
    assert (
        loaded.state == wanted.state and loaded.config == wanted.config and loaded.optimizer[1] == wanted.optimizer[1]
    )
    groups = [(loaded.trainable, wanted.trainable), (loaded.optimizer[0], wanted.optimizer[0])]
    for ours, theirs in [*groups, (loaded.ema or {}, wanted.ema or {})]:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


def steps(run_dir: Path) -> list[int]:
    """Of a run's checkpoints."""
    return [step for step, _ in list_checkpoints(run_dir)]


def newest(run: Path) -> Path:
    """A run's newest checkpoint."""
    return list_checkpoints(run)[-1][1]


def rewrite_marker(path: Path) -> None:
    """As if what stands in a checkpoint now had been written: what a forger does, or another version."""
    (path / COMPLETE).unlink()
    (path / COMPLETE).write_text(folder_checksums(path))


def change_state(path: Path, **changes: Any) -> None:
    """Other values beside the run's state in ``state.json``."""
    values = json.loads((path / folders.STATE).read_text())
    (path / folders.STATE).write_text(json.dumps({**values, **changes}))
    rewrite_marker(path)


@contextlib.contextmanager
def copied(run: Path) -> Iterator[Path]:
    """A copy of a run for one case."""
    target = run.with_name(f"{run.name}-case")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run, target)
    yield target


@dataclass(frozen=True)
class Harm:
    """One accident to one file. Places are fractions of its length, so that they fit any file."""

    what: str
    file: str
    at: float
    length: int = 1
    bit: int = 0

    def do(self, folder: Path) -> bool:
        """Harm the file; False if its bytes are still the same."""
        path = folder / self.file
        before = path.read_bytes()
        content = bytearray(before)
        first = min(int(self.at * len(content)), len(content) - 1)
        if self.what == "flip":
            content[first] ^= 1 << self.bit
        elif self.what == "zero":
            content[first : first + self.length] = bytes(len(content[first : first + self.length]))
        elif self.what == "cut":
            del content[first:]
        elif self.what == "drop":
            del content[first : first + self.length]
        elif self.what == "grow":
            content += bytes(self.length)
        else:
            path.unlink()
            return True
        path.write_bytes(content)
        return bytes(content) != before
