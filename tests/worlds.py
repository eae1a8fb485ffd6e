"""Run configurations for tests: the tiny model, a few clips, everything fast and small."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.caching.request import encoding_of, make_request
from finetune.checkpoint.folders import checkpoint_path, list_checkpoints
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_of
from finetune.core.types import Batch, ClipPlan, torch_dtype
from finetune.datasets.cache import Cache, stored_frames
from finetune.datasets.manifests import Manifest, ManifestItem, portable
from finetune.trainers.loop import TrainReport, train
from finetune.trainers.run import TrainedModel
from finetune.trainers.tracking import StepRecord

SMOOTH_ADAM: dict[str, Any] = {"kind": "adamw", "lr": 1e-3, "eps": 1e-3}
"""For runs whose weights are compared although their gradients differ by rounding: sums in another order, on several
processes, in shares or in smaller batches. Adam moves a weight by lr * m / (sqrt(v) + eps), so a gradient that is off
by d moves it by about lr / eps * d, here d, too far. With the usual eps of 1e-8 the last digit of a gradient near zero
is enough to turn a whole step round, which is 2 * lr."""


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, section by section; a section with another ``kind`` replaces."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind")):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def run_values(model: Path, clips: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """What a test's YAML would hold: LoRA r4 on four clips of 9x64x64, four steps, nothing measured or sampled."""
    base = {
        "model": {"pretrained": str(model)},
        "data": {"sources": [{"path": str(clips)}], "buckets": ["9x64x64"], "fps": 8},
        "cache": {"dir": str(output.parent / "cache"), "decode_workers": 0, "image_draws": 2},
        "method": {"kind": "lora", "rank": 4, "alpha": 4},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "train": {"steps": 4, "seed": 7},
        "validation": {"every": None, "at_start": False},
        "checkpoint": {"every": None},
        "tracking": {"kind": "none"},
        "output_dir": str(output),
    }
    return merged(base, changes)


def fabricate_cache(config: RunConfig, clips: int = 2) -> None:
    """Fill a run's cache with random latents and embeddings, as if its videos had been encoded on another machine.

    Neither videos nor encoders are needed; the run must use ``cache.mode: require``.
    """
    spec = read_spec(config.model.pretrained)
    cache = Cache(config.cache.dir)
    bucket = config.data.buckets[0]
    local = encoding_of(config, spec, cache, fetch=False)
    encoding = replace(local, vae="elsewhere", text_encoder="elsewhere")
    generator = torch.Generator().manual_seed(0)
    channels, frames, height, width = spec.latent_shape(bucket)

    def prompt(text: str) -> str:
        address = encoding.prompt_address(text)
        embeds = torch.randn(spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
        cache.write_prompt(address, embeds.to(torch_dtype(encoding.dtype)), tokens=4)
        return digest_of(address)

    def clip(number: int) -> ManifestItem:
        draws = encoding.image_draws
        plan = ClipPlan(tuple(range(bucket.frames)), (bucket.height, bucket.width), (0, 0), bucket)
        address = encoding.latents_address(f"clip {number}", plan)
        mean = torch.randn(channels, frames, height, width, generator=generator)
        image = torch.randn(draws, channels, 1, height, width, generator=generator) if draws else None
        further = {}
        if draws and (images := len(stored_frames(encoding.condition_frames, frames))):
            further["frame_latents"] = torch.randn(draws, channels, images, height, width, generator=generator)
        cache.write_latents(address, mean, torch.full_like(mean, 0.01), image, further=further)
        caption = f"clip number {number}"
        return ManifestItem(
            clip=f"{number}.mp4",
            where=f"fabricated:{number}",
            caption=caption,
            bucket=bucket,
            repeats=1.0,
            holdout=False,
            latents_key=digest_of(address),
            prompt_key=prompt(caption),
            media_digest=f"clip {number}",
        )

    manifest = Manifest(
        items=tuple(clip(number) for number in range(clips)),
        empty_prompt_key=prompt(""),
        request=portable(make_request(config, spec, local), config.base),
        inputs={},
        notes=("a note", "warning: three quarters are lost"),
        kept={str(bucket): "25% of the picture and 75% of the seconds are kept"},
    )
    cache.save_manifest(manifest, config.base)


def run_config(model: Path, clips: Path, output: Path, /, **changes: Any) -> RunConfig:
    """``run_values`` as a configuration."""
    return RunConfig.from_dict(run_values(model, clips, output, **changes))


# -------- what a run left behind


def tensors(run: TrainReport | Path, name: str = "trainable", step: int | None = None) -> dict[str, torch.Tensor]:
    """One file of a checkpoint: ``trainable``, ``optimizer`` or ``ema``, of ``step`` or the newest."""
    folder = run if isinstance(run, Path) else run.run_dir
    return load_file(checkpoint_path(folder, saved_steps(folder)[-1] if step is None else step) / f"{name}.safetensors")


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return [step for step, _ in list_checkpoints(run_dir)]


def differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal, bit for bit."""
    assert ours.keys() == theirs.keys() and ours
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_same_run(ours: TrainReport | Path, theirs: TrainReport | Path) -> None:
    """The newest checkpoints hold the same weights and the same optimizer state, bit for bit."""
    for name in ("trainable", "optimizer"):
        names = differing(tensors(ours, name), tensors(theirs, name))
        assert not names, f"{len(names)} tensors of {name} differ, {names[:3]} first"


def history(run_dir: Path) -> list[str]:
    """Lines of a run's measurements."""
    return (run_dir / "heldout.jsonl").read_text().splitlines()


# -------- ends and faults in the middle of a run


def stop_after(steps: int, config: RunConfig) -> None:
    """Train, and ask for an end the way a cluster does: SIGTERM while step ``steps`` is about to begin."""

    def ask(record: StepRecord) -> None:
        if record.step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    report = train(config, on_step=ask)
    assert report.stopped_by == "SIGTERM" and report.step == steps


FULL_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB"


def fails_where(
    patch: pytest.MonkeyPatch, too_large: Callable[[Batch, int], bool], error: Exception | None = None
) -> list[int]:
    """Let passes run out of memory where ``too_large(batch, call)``; returns the sizes of all passes begun."""
    losses_of, sizes = TrainedModel.losses, []

    def limited(model: TrainedModel, batch: Batch, *, training: bool = True) -> torch.Tensor:
        losses = losses_of(model, batch, training=training)
        if training:
            sizes.append(len(batch.slots))
            if too_large(batch, len(sizes)):
                # Halfway: activations are there, and of earlier micro-batches gradients.
                (losses.sum() * 1e-3).backward()
                raise error or torch.OutOfMemoryError(FULL_GPU)
        return losses

    patch.setattr(TrainedModel, "losses", limited)
    return sizes
