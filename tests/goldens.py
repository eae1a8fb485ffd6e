"""Golden runs: twenty steps on tiny look-alikes of every variant, whose numbers are kept under ``tests/golden``.

A golden run decodes no video, draws every initial weight from a stream of its name and trains with the real loop on a
made-up cache, so its numbers depend on nothing but this package's arithmetic and that of torch, diffusers and peft.
``scripts/make_golden.py`` writes the files anew.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import fabricate_cache, run_config

from finetune.cogvideox.config import DropoutConfig, ModelConfig
from finetune.cogvideox.load import load_transformer
from finetune.cogvideox.objective import sample_noise
from finetune.config.schema import RunConfig
from finetune.core.rng import generator, seed_for
from finetune.core.types import Bucket
from finetune.datasets.schedule import Item, epoch_items, groups_of
from finetune.testing.tiny import build_tiny
from finetune.trainers import loop
from finetune.trainers.run import Run
from finetune.trainers.tracking import StepRecord

FOLDER = Path(__file__).parent / "golden"
STEPS = 20
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"}, "optimizer": {"lr": 1e-2}},
    "full": {"method": {"kind": "full"}, "optimizer": {"lr": 1e-3}},
}
TOLERANCE = {"loss": 1e-5, "grad_norm": 2e-5, "lr": 1e-8, "moved": 2e-5}
"""What a run may be off, relatively; see ``docs/numerics.md`` for where the figures are from."""
Record = dict[str, Any]
"""Of one run: per step ``loss``, ``grad_norm``, ``lr`` and ``timesteps``; by tensor how far it ``moved`` (L2)."""


def golden_model(variant: str, folder: Path) -> Path:
    """A tiny look-alike whose transformer's weights follow from their names, however a library initialises them."""
    build_tiny(folder, variant)
    transformer = load_transformer(ModelConfig(pretrained=str(folder)))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator(0, "golden", name))
            if parameter.ndim > 1:
                parameter.copy_(drawn / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.1 * drawn + (1 if name.endswith("weight") else 0))
    transformer.save_pretrained(folder / "transformer")
    return folder


def golden_config(model: Path, output: Path, method: str, *, dtype: str = "fp32", **changes: Any) -> RunConfig:
    """Two unequal micro-batches per step, dropped captions and images, a moving learning rate, clipping that acts."""
    values = METHODS[method]
    optimizer = {
        "kind": "adamw",
        # Gradients that are zero but for rounding exist (a bias of all keys shifts no softmax): Adam would make steps
        # of them as large as any other's.
        "eps": 1e-5,
        **values["optimizer"],
        **changes.pop("optimizer", {}),
    }
    sections: dict[str, Any] = {
        "data": {"caption_dropout": 0.2, "image_dropout": 0.2},
        "cache": {"mode": "require"},
        "method": values["method"],
        "optimizer": optimizer,
        "lr_schedule": {"kind": "cosine", "warmup_steps": 3, "final": 0.1},
        "train": {"steps": STEPS, "batch_size": 2, "accumulation": 2, "max_grad_norm": 0.5},
    }
    config = run_config(model, output / "no-videos-here", output / "run", **{**sections, **changes})
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def golden_run(config: RunConfig, *, clips: int = 5) -> Record:
    """Train, and note what happened."""
    record: Record = {"loss": [], "grad_norm": [], "lr": [], "timesteps": []}
    runs: list[Run] = []
    before: dict[str, torch.Tensor] = {}
    setup_run = loop.setup_run

    def noted(*arguments: Any) -> Run:
        runs.append(setup_run(*arguments))
        before.update({name: parameter.detach().clone() for name, parameter in runs[0].model.parameters.items()})
        return runs[0]

    def on_step(step: StepRecord) -> None:
        record["loss"].append(step.loss)
        record["grad_norm"].append(step.grad_norm)
        record["lr"].append(step.lr)
        record["timesteps"].append(sorted(step.timesteps))

    fabricate_cache(config, clips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "setup_run", noted)
        loop.train(config, on_step)
    record["moved"] = {
        name: float((parameter.detach() - before[name]).float().norm())
        for name, parameter in runs[0].model.parameters.items()
    }
    return record


def deviations(golden: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, float]:
    """How far a run is from its golden one: the largest relative difference of each kind of number."""
    if golden["timesteps"] != record["timesteps"]:
        return {"timesteps": math.inf}
    if golden["moved"].keys() != record["moved"].keys():
        return {"names of what trains": math.inf}
    # A tensor is measured against what most tensors move: of one that hardly moves at all the rest is rounding.
    usual = sorted(golden["moved"].values())[len(golden["moved"]) // 2]
    return {
        **{kind: max(_relative(golden[kind], record[kind])) for kind in ("loss", "grad_norm", "lr")},
        "moved": max(abs(record["moved"][name] - moved) / max(moved, usual) for name, moved in golden["moved"].items()),
    }


def _relative(golden: list[float], record: list[float]) -> Iterator[float]:
    for ours, theirs in zip(record, golden, strict=True):
        yield abs(ours - theirs) / abs(theirs) if math.isfinite(ours) else math.inf


def faults(golden: Mapping[str, Any], record: Mapping[str, Any], tolerance: Mapping[str, float]) -> list[str]:
    """What of a run is not as its golden one, in words; empty where all is."""
    return [
        f"{kind} is off by {off:.2g}, allowed are {tolerance.get(kind, 0.0):.2g}"
        for kind, off in deviations(golden, record).items()
        if not off <= tolerance.get(kind, 0.0)  # `not <=`, so that a NaN is a fault
    ]


def read_golden(variant: str) -> dict[str, Any]:
    """The golden file of a variant: ``versions`` it was made with, ``tolerance`` by kind, and ``runs`` by method."""
    content: dict[str, Any] = json.loads((FOLDER / f"{variant}.json").read_text(encoding="utf-8"))
    return content


def write_golden(variant: str, runs: Mapping[str, Record]) -> Path:
    """Write a golden file; nine digits are more than float32 has."""
    content = {
        "versions": versions(),
        "tolerance": TOLERANCE,
        "runs": {name: _rounded(record) for name, record in runs.items()},
    }
    return _write(FOLDER / f"{variant}.json", content)


def write_stream_numbers() -> Path:
    """Write ``stream_numbers`` beside the golden runs."""
    return _write(FOLDER / "streams.json", stream_numbers())


def _write(path: Path, content: Any) -> Path:
    # A list of numbers on one line: a step is then a place in a row, and a difference is readable.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), json.dumps(content, indent=1))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def stream_numbers() -> dict[str, Any]:
    """Draws that every run rests on. Whole numbers must never change; normal ones are torch's to round."""
    dropout = DropoutConfig(caption_dropout=0.3, image_dropout=0.3)
    draws = [
        sample_noise(
            7,
            step,
            slot,
            latent_shape=(2, 2, 2, 2),
            padded_frames=2,
            image_draws=4,
            dropout=dropout,
            num_train_timesteps=1000,
        )
        for step in range(4)
        for slot in range(3)
    ]
    items = [Item(Bucket(9, 64, 64), repeats) for repeats in (1.0, 1.0, 1.0, 2.0, 0.5, 0.5)]
    return {
        "address": [seed_for(0), seed_for(7, "noise", 3, 2), seed_for(2**40, "ä", -1)],
        "timestep": [one.timestep for one in draws],
        "drop_caption": [one.drop_caption for one in draws],
        "drop_image": [one.drop_image for one in draws],
        "image_draw": [one.image_draw for one in draws],
        "epochs": [next(iter(epoch_items(groups_of(items), 7, epoch).values())) for epoch in range(3)],
        "noise": [float(f"{number:.6f}") for number in draws[5].noise.flatten().tolist()],
        "posterior_noise": [float(f"{number:.6f}") for number in draws[5].posterior_noise.flatten().tolist()],
    }


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"machine": platform.machine(), **{name: version(name) for name in packages}}
