"""A checkpoint in, weights for the stock diffusers pipeline out; nothing is published that does not reproduce the run.

An export is written into a partial folder, loaded again by diffusers' own code, and compared with the model as it was
trained: tensor by tensor, and in one forward pass. Only then does the folder get its name.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.cogvideox import (
    ModelConfig,
    build_pipeline,
    denoise,
    load_scheduler,
    load_transformer,
    pipeline_class,
    save_transformer,
)
from finetune.config import RunConfig
from finetune.errors import ExportError
from finetune.export_source import Source, find_source
from finetune.facts import Facts, read_facts, resolve_pretrained
from finetune.files import atomic_write_text, is_complete, publish_dir
from finetune.generate_inputs import ADAPTER_FILE, TRAINING_RECORD
from finetune.model_card import copy_samples, model_card, training_record
from finetune.streams import stream
from finetune.trainers.checkpoint import LoadedCheckpoint
from finetune.trainers.method import LoraMethod

ADAPTER = "default"
"""The adapter's name in the transformers compared here; it is not part of the file."""


@dataclass(frozen=True)
class ExportReport:
    """What was published, and how closely the stock pipeline reproduces the trained model."""

    folder: Path
    files: tuple[str, ...]
    """Relative to the folder, sorted."""
    step: int
    """Completed optimizer steps of the checkpoint."""
    weights: Literal["raw", "ema"]
    max_abs_diff: float
    """Largest difference of predicted velocity between the trained model and the reloaded export."""
    tolerance: float
    """What the difference may be; see ``_tolerance``."""

    def __str__(self) -> str:
        averaged = ", averaged weights" if self.weights == "ema" else ""
        return (
            f"exported step {self.step}{averaged} to {self.folder}: {', '.join(self.files)}\n"
            f"reloaded through the stock pipeline: largest difference {self.max_abs_diff:.2g}"
            f" (allowed {self.tolerance:.2g})"
        )


@dataclass(frozen=True)
class _Trained:
    """What the reloaded export has to reproduce; all tensors on the CPU."""

    velocity: Tensor
    """Of one forward pass on ``_probe``, float32."""
    tensors: Mapping[str, Tensor]
    """LoRA: the adapter's, by peft's names. Full: every parameter, in the model's dtype."""
    scaling: Mapping[str, float]
    """LoRA: the factor of every adapted layer. Full: empty."""


def export(
    source: Path,
    to: Path | None = None,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    full_pipeline: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
    pretrained: str | None = None,
) -> ExportReport:
    """Export a run or one of its checkpoints.

    A LoRA becomes ``pytorch_lora_weights.safetensors`` with its settings in the header, a full fine-tuning a
    ``transformer`` folder; both get a model card, a record for programs and the run's sampled videos.

    Args:
        source: a run's folder, or one checkpoint's.
        to: the export's folder, replaced if it is an earlier export; None for ``<run>/export``.
        checkpoint: of a run's folder, the newest checkpoint or the one with the lowest held-out loss.
        full_pipeline: after full fine-tuning, put the base's other components beside the transformer, so that the
            folder is a whole pipeline (hard links where the file system has them, copies elsewhere).
        weights: the moving average or the trained weights themselves; ``auto`` takes the average if one was kept.
        pretrained: where the base model is now, if not where the run had it.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged.
        ModelError: if the base model cannot be found or loaded.
        ExportError: if ``to`` holds something else, the options do not fit the run, or the reloaded export differs from
            the trained model; nothing is left at ``to`` then but an earlier export.
    """
    found = find_source(source, checkpoint, weights, pretrained)
    config, facts = found.config, read_facts(found.config.model.pretrained, found.config.model.revision)
    if full_pipeline and isinstance(config.method, LoraMethod):
        raise ExportError(
            "a LoRA has no pipeline of its own",
            where="--full-pipeline",
            fix="leave the option out: the adapter is loaded onto the base pipeline",
        )
    folder = to if to is not None else found.default_folder
    _require_replaceable(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcome: list[tuple[float, float]] = []

    def fill(partial: Path) -> None:
        trained = _write_weights(found, facts, partial, device)
        _free()  # from here on the trained transformer is gone: never two in memory
        outcome.append(_verify(partial, found, facts, trained, device))
        if full_pipeline:
            _add_components(partial, config.model)
        samples = copy_samples(found.run_dir, found.state.step, partial)
        difference, tolerance = outcome[0]
        record = training_record(found, facts, max_abs_diff=difference, tolerance=tolerance)
        atomic_write_text(partial / TRAINING_RECORD, record)
        atomic_write_text(
            partial / "README.md",
            model_card(found, facts, name=folder.name, samples=samples, full_pipeline=full_pipeline),
        )

    publish_dir(folder, fill)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    difference, tolerance = outcome[0]
    return ExportReport(folder, tuple(files), found.state.step, found.weights, difference, tolerance)


def _require_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder.is_dir() and is_complete(folder) and (folder / TRAINING_RECORD).is_file()):
        raise ExportError(
            "the place for the export holds something that is not an earlier export",
            where=str(folder),
            fix="name a new or empty folder with --output",
        )


# ------------------------------------------------------------------------------------------------------------- writing


def _write_weights(found: Source, facts: Facts, folder: Path, device: torch.device) -> _Trained:
    """Rebuild the model as it was trained, note what it computes, and write its weights."""
    config = found.config
    transformer = load_transformer(config.model, device=device)
    # Where the adapter began is of no matter any more, and its file may be gone.
    method = config.method.model_copy(update={"init_from": None}) if found.lora else config.method
    method.apply(transformer, seed=config.train.seed)
    own = method.trainable(transformer)
    # An average is kept in float32 also where the weights are narrower.
    method.load_state(
        transformer, {name: t.to(own[name].dtype) if name in own else t for name, t in found.tensors.items()}
    )
    transformer.eval()
    velocity = _forward(transformer, facts, device)
    if isinstance(method, LoraMethod):
        _save_adapter(facts, folder, method.peft_state(transformer), method.lora_metadata(transformer))
        return _Trained(velocity, _adapter_tensors(transformer), _adapter_scaling(transformer))
    save_transformer(transformer, folder / "transformer")
    # The tensors stay in the checkpoint's file, which is mapped, not read.
    return _Trained(velocity, found.tensors, {})


def _save_adapter(facts: Facts, folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    pipeline_class(facts).save_lora_weights(
        str(folder),
        transformer_lora_layers={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        # diffusers' loader leaves a freshly inserted adapter in training mode: with a dropout in the file, everyone who
        # loads it would sample with dropout on.
        transformer_lora_adapter_metadata={**settings, "lora_dropout": 0.0},
        weight_name=ADAPTER_FILE,
    )


def _add_components(folder: Path, model: ModelConfig) -> None:
    """Put the base's other components beside the transformer."""
    import os
    import shutil

    others = ["scheduler", "text_encoder", "tokenizer", "vae"]
    base = resolve_pretrained(model.pretrained, model.revision, components=others)

    def link_or_copy(source: str, target: str) -> str:
        real = Path(source).resolve()  # the hub's cache keeps links
        try:
            os.link(real, target)
        except OSError:
            shutil.copyfile(real, target)
        return target

    for component in others:
        shutil.copytree(base / component, folder / component, copy_function=link_or_copy)
    shutil.copyfile(base / "model_index.json", folder / "model_index.json")


# ----------------------------------------------------------------------------------------------------------- verifying


def _verify(
    folder: Path, found: Source, facts: Facts, trained: _Trained, device: torch.device
) -> tuple[float, float]:
    """Load the export with diffusers' own code and compare; returns the largest difference and what is allowed.

    Raises:
        ExportError: if a tensor or a scale is not what was trained, or the forward pass differs.
    """
    config = found.config
    if found.lora:
        transformer = load_transformer(config.model, device=device)
        pipeline = build_pipeline(facts, transformer=transformer, scheduler=load_scheduler(config.model))
        pipeline.load_lora_weights(str(folder), weight_name=ADAPTER_FILE, adapter_name=ADAPTER)
        transformer.eval()
        tensors, scaling = _adapter_tensors(transformer), _adapter_scaling(transformer)
    else:
        exported = ModelConfig(pretrained=str(folder))
        transformer = load_transformer(exported, device=device, dtype=config.model.torch_dtype())
        tensors, scaling = dict(transformer.named_parameters()), {}
    problems = [*_unequal_tensors(trained.tensors, tensors), *_unequal_scales(trained.scaling, scaling)]
    velocity = _forward(transformer, facts, device)
    difference = (velocity - trained.velocity).abs().max().item()
    tolerance = _tolerance(trained.velocity, config.model.torch_dtype())
    # `not <=`, so that a NaN fails too.
    if not difference <= tolerance:
        problems.append(f"predicted velocities differ by up to {difference:.3g}, allowed are {tolerance:.3g}")
    if problems:
        raise ExportError(
            "the export, loaded by diffusers, is not the model that was trained; it was deleted: " + "; ".join(problems),
            where=str(found.checkpoint),
            fix="update diffusers and peft; if it persists this is a bug, and the checkpoint itself is unharmed",
        )
    return difference, tolerance


def _tolerance(velocity: Tensor, dtype: torch.dtype) -> float:
    """The largest difference of one forward pass that is rounding.

    In float32 both sides run the same operations on the same numbers; 1e-5 of the largest output leaves room for kernels
    that are chosen by memory alignment. In half precision diffusers also rounds the float32 adapter to the model's dtype,
    and a rounding that falls the other way somewhere travels through every later layer: 8 units in the last place of the
    largest output. What hides below that (a wrong scale of a weak adapter) is found by comparing tensors and scales.
    """
    return max(1e-5, 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0) * velocity.abs().max().item()


@torch.no_grad()
def _forward(transformer: Any, facts: Facts, device: torch.device) -> Tensor:
    """The velocity predicted for seeded inputs: two patches in time, the smallest interesting size in space."""
    frames = 2 * (facts.patch_size_t or 1)
    height, width = 4 * facts.patch_size, 6 * facts.patch_size
    if facts.use_learned_positions:  # another height or width is refused; another frame count is not
        height, width = facts.sample_height, facts.sample_width

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=stream(0, "export", name)).to(device)

    channels = facts.latent_channels
    return denoise(
        transformer,
        facts,
        draw("latents", channels, frames, height, width),
        draw("prompt", facts.max_text_seq_length, facts.text_embed_dim),
        torch.tensor([facts.num_train_timesteps // 2], device=device),
        draw("image", channels, 1, height, width) if facts.image_to_video else None,
    ).cpu()


def _adapter_tensors(transformer: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _adapter_scaling(transformer: Any) -> dict[str, float]:
    return {
        name: float(module.scaling[ADAPTER])
        for name, module in transformer.named_modules()
        if ADAPTER in getattr(module, "scaling", {})
    }


def _unequal_tensors(trained: Mapping[str, Tensor], reloaded: Mapping[str, Tensor]) -> list[str]:
    """Tensors that differ by a bit, after the rounding to the dtype they are reloaded in."""
    if trained.keys() != reloaded.keys():
        odd = sorted(trained.keys() ^ reloaded.keys())
        return [f"{len(odd)} tensors are on one side only, such as {odd[0]}"]
    unequal = [
        name for name, tensor in trained.items() if not torch.equal(tensor.to(reloaded[name].dtype), reloaded[name].cpu())
    ]
    return [f"{len(unequal)} of {len(trained)} tensors differ, such as {unequal[0]}"] if unequal else []


def _unequal_scales(trained: Mapping[str, float], reloaded: Mapping[str, float]) -> list[str]:
    unequal = sorted(name for name in trained.keys() | reloaded.keys() if trained.get(name) != reloaded.get(name))
    if not unequal:
        return []
    name = unequal[0]
    return [f"the update of {name} counts {reloaded.get(name)} instead of {trained.get(name)} (alpha / rank)"]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
