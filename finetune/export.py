"""A checkpoint in, weights for the stock diffusers pipeline out; nothing is published that does not reproduce the run.

An export is written into a partial folder, loaded again by diffusers' own code, and compared with the model as it was
trained: tensor by tensor, and in one forward pass. Only then does the folder get its name.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.cogvideox import ModelConfig, load_transformer, pipeline_class, save_transformer
from finetune.errors import ExportError
from finetune.exporting.model_card import copy_samples, model_card, training_record
from finetune.exporting.source import Source, find_source
from finetune.exporting.verify import Trained, adapter_scaling, adapter_tensors, forward, verify
from finetune.facts import Facts, read_facts, resolve_pretrained
from finetune.files import atomic_write_text, is_complete, publish_dir
from finetune.generate_inputs import ADAPTER_FILE, TRAINING_RECORD
from finetune.trainers.method import LoraMethod


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
    """What the difference may be; see ``exporting.verify.tolerance_of``."""

    def __str__(self) -> str:
        averaged = ", averaged weights" if self.weights == "ema" else ""
        return (
            f"exported step {self.step}{averaged} to {self.folder}: {', '.join(self.files)}\n"
            f"reloaded through the stock pipeline: largest difference {self.max_abs_diff:.2g}"
            f" (allowed {self.tolerance:.2g})"
        )


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
        outcome.append(verify(partial, found, facts, trained, device))
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


def _write_weights(found: Source, facts: Facts, folder: Path, device: torch.device) -> Trained:
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
    velocity = forward(transformer, facts, device)
    if isinstance(method, LoraMethod):
        _save_adapter(facts, folder, method.peft_state(transformer), method.lora_metadata(transformer))
        return Trained(velocity, adapter_tensors(transformer), adapter_scaling(transformer))
    save_transformer(transformer, folder / "transformer")
    # The tensors stay in the checkpoint's file, which is mapped, not read.
    return Trained(velocity, found.tensors, {})


def _save_adapter(facts: Facts, folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    pipeline_class(facts).save_lora_weights(
        str(folder),
        transformer_lora_layers={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        transformer_lora_adapter_metadata=dict(settings),
        weight_name=ADAPTER_FILE,
    )


def _add_components(folder: Path, model: ModelConfig) -> None:
    """Put the base's other components beside the transformer."""
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


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
