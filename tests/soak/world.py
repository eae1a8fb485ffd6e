"""The runs that are killed, and how their ends are compared.

A world is a folder with tiny models and short clips. Every run of a scenario happens at the same paths, so that the
files of two runs can be compared byte by byte; what was there is taken into memory, and removed, in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from worlds import merged, run_values

from soak import processes

Snapshot = Mapping[str, bytes]
"""Files by path relative to the world's work folder."""

UNCOMPARED = {
    r"cache/headers\.sqlite(-journal)?": "what was read of files, as they became old enough; nothing depends on it",
    r"cache/lock": "who used the cache last: host, process and time",
    r"(.*/)?\.([^/]+\.)?lock": "who wrote to a run's folder or to an export last: host, process and time",
    r"run/(metrics\.jsonl|report\.html)": "they hold seconds and memory",
    r"run/tensorboard/.*": "event files hold wall-clock times, and every process begins a new one",
    r".*\.partial(/.*)?": "left by a killed writer; never read, removed by the next save or by `finetune cache gc`",
}
"""Files that may differ from an undisturbed run's, and why."""

LORA = {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}
LORA64 = {"kind": "lora", "rank": 64, "alpha": 64}  # matrices of 4096 elements, the least that 8-bit Adam quantises
MEASURED = {"every": 2, "at_start": True, "timesteps": 2, "clips": 2}


@dataclass(frozen=True)
class Scenario:
    """One run: what it is made of, and the verb that is killed."""

    name: str
    verb: str
    variant: str
    clips: tuple[str, ...]
    """Folders or tables of clips, one source each; of the world's, unless absolute."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    cold: bool = False
    """Training begins with an empty cache, and so precomputes first."""
    processes: int = 1
    real: bool = False
    """Start the command as users do, with an interpreter of its own, and ``torchrun`` where there are two processes."""
    env: Mapping[str, str] = field(default_factory=dict)


def _scenario(name: str, variant: str, changes: Mapping[str, Any], clips: str = "square wide", **more: Any) -> Scenario:
    two_buckets = {"data": {"buckets": ["9x64x64", "9x32x64"], "holdout": 1, "caption_dropout": 0.3}}
    base = two_buckets if clips == "square wide" else {}
    return Scenario(name, name.partition("-")[0], variant, tuple(clips.split()), merged(base, changes), **more)


ADAM8 = {"kind": "adamw8bit", "lr": 1e-3}
EACH_STEP = {"every": 1, "keep_last": 1, "keep_best": True}
FULL = {"method": {"kind": "full"}, "train": {"steps": 4}, "checkpoint": {"every": 1, "keep_last": 1}}

SCENARIOS = {
    one.name: one
    for one in (
        _scenario("precompute-5b", "5b", {"cache": {"decode_workers": 0, "text_batch_size": 3}}),
        _scenario(
            "precompute-i2v-workers",
            "1.5-5b-i2v",
            {
                "cache": {"decode_workers": 2, "text_batch_size": 2, "image_draws": 3},
                "validation": {"samples": [{"prompt": "a red ring moving up", "image": "first.png", "seed": 1}]},
            },
        ),
        _scenario(
            "precompute-table",
            "2b",
            {"cache": {"decode_workers": 1, "latents_dtype": "fp32"}},
            "table/metadata.jsonl",
        ),
        _scenario(
            "train-lora",
            "5b",
            {
                "method": LORA,
                "data": {"holdout": 1},
                "train": {"steps": 7, "ema_decay": 0.9, "batch_size": 2},
                "validation": MEASURED,
                "checkpoint": EACH_STEP,
            },
            "square",
        ),
        _scenario(
            "train-full-8bit",
            "2b",
            {
                "method": {"kind": "full"},
                "optimizer": ADAM8,
                "train": {"steps": 6, "accumulation": 2, "ema_decay": 0.9},
                "validation": MEASURED,
                "checkpoint": {**EACH_STEP, "every": 2},
            },
        ),
        _scenario(
            "train-lora-8bit-i2v",
            "1.5-5b-i2v",
            {
                "method": LORA64,
                "optimizer": ADAM8,
                "train": {"steps": 6, "batch_size": 2},
                "validation": {**MEASURED, "every": 1},
                "checkpoint": {**EACH_STEP, "keep_last": 2},
                "tracking": {"kind": "tensorboard", "every": 1},
            },
        ),
        _scenario("train-full-cold-i2v", "5b-i2v", {**FULL, "cache": {"decode_workers": 1}}, "square", cold=True),
        _scenario("precompute-pair", "5b", {"cache": {"decode_workers": 1, "text_batch_size": 2}}, processes=2),
        _scenario(
            "train-pair",
            "2b",
            {
                "method": LORA,
                "train": {"steps": 6, "batch_size": 2, "ema_decay": 0.9},
                "validation": MEASURED,
                "checkpoint": EACH_STEP,
            },
            processes=2,
        ),
        _scenario(
            "train-sharded-pair",
            "5b",
            FULL,
            "square",
            processes=2,
            env={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        ),
    )
}
PAIRS = tuple(name for name, one in SCENARIOS.items() if one.processes == 2)
PRECOMPUTE, TRAIN = (
    tuple(name for name, one in SCENARIOS.items() if one.verb == verb and one.processes == 1)
    for verb in ("precompute", "train")
)
COMMANDS = tuple(f"{name}-command" for name in ("precompute-i2v-workers", "train-lora"))
LAUNCHES = tuple(f"{name}-command" for name in ("precompute-pair", "train-pair"))
SCENARIOS |= {
    name: replace(SCENARIOS[name.removesuffix("-command")], name=name, real=True) for name in (*COMMANDS, *LAUNCHES)
}


def real_clips_scenario(clips: Path) -> Scenario:
    """A LoRA with EMA on every clip of two layouts (CogKit's, CogVideo's), the cache empty at the beginning."""
    changes = {
        "data": {"buckets": ["9x48x80"], "holdout": 2},
        "method": {**LORA64, "dropout": 0.1},
        "optimizer": ADAM8,
        "train": {"steps": 8, "batch_size": 2, "ema_decay": 0.9},
        "validation": MEASURED,
        "checkpoint": {**EACH_STEP, "every": 2},
        "cache": {"decode_workers": 1},
    }
    sources = tuple(str(clips / name) for name in ("steamboat_willie/metadata.jsonl", "cogvideox_samples"))
    return Scenario("train-real-clips", "train", "5b", sources, changes, cold=True)


class World:
    """Models and clips in ``folder``, made once; ``work`` is where runs happen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"

    def prepare(self, variants: set[str]) -> None:
        """Write the clips and one tiny model per variant, in a process of its own: this one is going to fork.

        Raises:
            RuntimeError: if it fails.
        """
        self.work.mkdir()
        log = self.folder / "world.log"
        if processes.wait(processes.fork(lambda: self._build(variants), log), 120):
            raise RuntimeError(log.read_text())

    def _build(self, variants: set[str]) -> None:
        # An hour old in the end: the digest of a young file is not remembered, and a manifest would depend on when it
        # was made.
        from PIL import Image

        from finetune.inference.videos import write_mp4
        from finetune.testing.demo import Scene, render, write_clips
        from finetune.testing.tiny import build_tiny

        for variant in sorted(variants):
            build_tiny(self.folder / "models" / variant, variant)
        clips = self.folder / "clips"
        scenes = [Scene("circle", "red", "left"), Scene("square", "blue", "up"), Scene("triangle", "green", "right")]
        scenes += [Scene("ring", "yellow", "down"), Scene("circle", "green", "up")]
        for scene in scenes:
            write_mp4(clips / "square" / f"{scene.colour}-{scene.shape}.mp4", render(scene), 8)
            (clips / "square" / f"{scene.colour}-{scene.shape}.txt").write_text(scene.caption)
        for scene in scenes[:3]:
            write_mp4(clips / "wide" / f"{scene.colour}.mp4", render(scene)[:, 16:48], 8)
            (clips / "wide" / f"{scene.colour}.txt").write_text(scene.caption + " far away")
        write_clips(clips / "table", scenes)
        Image.fromarray(render(scenes[0])[0]).save(clips / "first.png")
        then = time.time() - 3600
        for path in self.folder.rglob("*"):
            os.utime(path, (then, then))

    def configure(self, scenario: Scenario) -> Path:
        """Write the scenario's configuration into an empty work folder; its path."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        clips = self.folder / "clips"
        changes = dict(scenario.changes)
        if samples := changes.get("validation", {}).get("samples"):
            placed = [{**sample, "image": str(clips / sample["image"])} for sample in samples]
            changes["validation"] = {**changes["validation"], "samples": placed, "num_inference_steps": 1}
        values = run_values(self.folder / "models" / scenario.variant, clips, self.work / "run", **changes)
        values["data"]["sources"] = [{"path": str(clips / name)} for name in scenario.clips]  # absolute ones stay
        path = self.work / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def snapshot(self) -> Snapshot:
        """Every file that a run has made so far."""
        return {
            str(path.relative_to(self.work)): path.read_bytes()
            for part in ("cache", "run")
            for path in sorted((self.work / part).rglob("*"))
            if path.is_file()
        }

    def newest_step(self) -> int:
        """Step of the newest complete checkpoint; -1 without one."""
        from finetune.checkpoint.folders import list_checkpoints

        standing = list_checkpoints(self.work / "run")
        return standing[-1][0] if standing else -1

    def entries(self) -> set[str]:
        """Names of the cache's entries."""
        return {path.name for path in (self.work / "cache").rglob("*.safetensors")}

    def age_leftovers(self) -> int:
        """Let what killed writers left in the cache look old enough for ``gc``; how many files that are."""
        leftovers = [path for path in (self.work / "cache").rglob("*.partial") if path.is_file()]
        for path in leftovers:
            os.utime(path, (0, 0))
        return len(leftovers)


def compared(snapshot: Snapshot) -> dict[str, bytes]:
    """The files of which every byte has to be equal; the shares of a sharded checkpoint count as one file."""
    whole = {name: content for name, content in snapshot.items() if not any(map(_matching(name), UNCOMPARED))}
    shares = [name for name in whole if "/share-" in name]
    for name in shares:
        # torch leaves it open which process writes what all of them hold, and the marker lists the shares' checksums.
        part, checkpoint = str(Path(name).parent), str(Path(name).parents[1])
        lines = [*whole.get(f"{part}/shares", b"").splitlines(keepends=True), *_tensors(whole.pop(name))]
        whole[f"{part}/shares"] = b"".join(sorted(lines))
        whole.pop(f"{checkpoint}/COMPLETE", None)
    return whole


def _tensors(content: bytes) -> list[bytes]:
    """A line with name, kind and digest for every tensor of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    lines = []
    for name, one in json.loads(content[8:end]).items():
        if name != "__metadata__":
            first, last = one["data_offsets"]
            digest = hashlib.sha256(content[end + first : end + last]).hexdigest()
            lines.append(f"{name} {one['dtype']} {one['shape']} {digest}\n".encode())
    return lines


def _matching(name: str) -> Callable[[str], bool]:
    return lambda pattern: re.fullmatch(pattern, name) is not None


def differences(expected: Snapshot, found: Snapshot) -> list[str]:
    """What of two runs' files is not equal, in words; empty where all is."""
    before, after = compared(expected), compared(found)
    lines = [f"{name} is missing" for name in sorted(before.keys() - after.keys())]
    lines += [f"{name} is too much" for name in sorted(after.keys() - before.keys())]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            lines.append(f"{name} differs: {_difference(name, before[name], after[name])}")
    return lines


def _difference(name: str, before: bytes, after: bytes) -> str:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if name.endswith(".safetensors"):
            old, new = load(before), load(after)
            parts = sorted(key for key in old.keys() | new.keys() if not _same(old.get(key), new.get(key)))
            shown = [f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in parts[:3]]
            return f"{len(parts)} of {len(old)} tensors: {', '.join(shown)}" if parts else "only its header"
        if name.endswith(".json"):
            old, new = json.loads(before), json.loads(after)
            parts = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            return ", ".join(f"{key}: {old.get(key)!r:.200} -> {new.get(key)!r:.200}" for key in parts[:3])
    except (SafetensorError, ValueError, AttributeError) as error:
        return f"{len(before)} -> {len(after)} bytes, which cannot be read: {error}"
    return f"{before[-200:]!r} -> {after[-200:]!r}"


def _shown(tensor: Any) -> str:
    return "nothing" if tensor is None else f"{tensor.flatten()[:3].tolist()} {tuple(tensor.shape)} {tensor.dtype}"


def _same(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and bool((one == other).all())
