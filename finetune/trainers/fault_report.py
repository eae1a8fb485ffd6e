"""The report of a loss or gradient that is not finite, for ``finetune replay``: of a step, or of a measurement.

``<run>/reports/nonfinite-step-00000123/`` (or ``nonfinite-heldout-00000123``) holds ``report.json``,
``trainable.safetensors`` (the weights it was computed with) and ``COMPLETE``, the checksums of both. Nothing in it runs
code when it is read.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.core.checksums import ChecksummedFolder, DamageError, checksum_file, folder_checksums
from finetune.core.errors import FinetuneError, NonFiniteError, TrainingError, first_line
from finetune.core.files import TRAINABLE, atomic_write_text, free_space, human_size, publish_dir
from finetune.core.tensor_files import atomic_save_tensors, file_bytes
from finetune.datasets.manifests import ManifestItem
from finetune.memory.config import MemoryConfig
from finetune.trainers.run import Run
from finetune.trainers.tracking import GatheredStep

FOLDER = "reports"

REPORT = "report.json"

FORMAT = 1
"""Raised whenever an older reader would misread a newer report."""


class _Part(BaseModel):
    # Numbers that are not finite are what a report is about. JSON has no such numbers: they become text ("NaN").
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ReportedSample(_Part):
    """One sample of the step: what it was, and what came of it."""

    rank: int
    micro_batch: int
    """Which of its rank's micro-batches, from 0."""
    slot: int
    item: ManifestItem
    timestep: int
    loss: float


class Report(_Part):
    """Everything that decides a step, and what was seen of it."""

    format: int = FORMAT
    step: int
    """The optimizer step that was not taken, from 0."""
    lr: float = 0.0
    grad_norm: float = 0.0
    """Global, before clipping."""
    samples: tuple[ReportedSample, ...]
    gradient_norms: dict[str, float] = {}
    """Of the step's gradient, by parameter, before clipping. Empty where ``gradient_note`` says why."""
    gradient_note: str = ""
    loss_scale: float
    dtype: str
    """Of frozen weights and compute."""
    device: str
    engine: str
    processes: int
    memory: MemoryConfig
    """The state the step was computed in."""
    config: dict[str, Any]
    config_digest: str
    cache_digest: str
    empty_prompt_key: str
    model_files: dict[str, str] = {}
    """Checksums of the transformer's files, by name."""
    weights_note: str = ""
    """Why there are no weights in the report; empty where there are."""
    versions: dict[str, str]
    measured: bool = False
    """Whether the samples are those of a measurement after ``step`` completed steps, not of a step."""

    @property
    def non_finite_gradients(self) -> list[str]:
        """Parameters whose gradient is not finite, in the model's order."""
        return [name for name, norm in self.gradient_norms.items() if not math.isfinite(norm)]


def require_finite(
    run: Run, gathered: GatheredStep, memory: MemoryConfig, again: Callable[[], None], *, step: int, grad_norm: float
) -> None:
    """Stop before a non-finite loss or gradient reaches the weights, and write down what led to it.

    Every process sees the same losses and the same gradient norm, so all of them raise or none.

    Args:
        run: with the weights as they were in the step.
        gathered: the step, of all processes.
        memory: the state it was computed in.
        again: runs the step's passes once more, for the gradient of every layer. Clipping has made NaN of all of them;
            a second pass gives them back, because everything random follows from the step.
        step: which optimizer step, from 0.
        grad_norm: global norm before clipping.

    Raises:
        TrainingError: naming the step, the samples, and the report.
    """
    if gathered.is_finite(grad_norm):
        return
    samples = reported_samples(run, step, gathered)
    norms, note = _second_pass(run, again)
    lr = float(run.model.strategy.optimizer.param_groups[0]["lr"])
    report = _describe(
        run, samples, memory, step=step, lr=lr, grad_norm=grad_norm, gradient_norms=norms, gradient_note=note
    )
    raise _published(run, report, f"nonfinite-step-{step:08d}")


def refuse_measurement(run: Run, samples: Sequence[ReportedSample], *, step: int) -> NoReturn:
    """Stop a run whose held-out loss, or the loss on its training clips, is not finite: nobody can say what is best.

    Args:
        run: with the weights that were measured, the averaged ones if an average is kept.
        samples: what was measured, of all processes.
        step: completed steps.

    Raises:
        TrainingError: naming the clips and the report, on every process.
    """
    note = "a measurement has no gradient"
    report = _describe(run, samples, run.config.memory, step=step, gradient_note=note, measured=True)
    raise _published(run, report, f"nonfinite-heldout-{step:08d}")


def _describe(run: Run, samples: Sequence[ReportedSample], memory: MemoryConfig, **seen: Any) -> Report:
    model = run.model
    return Report(
        samples=tuple(samples),
        loss_scale=model.loss_scale,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(run.ranks.device),
        engine=model.strategy.name,
        processes=run.ranks.world,
        memory=memory,
        config=run.config.to_dict(),
        config_digest=run.config.digest,
        cache_digest=run.data.manifest.digest,
        empty_prompt_key=run.data.manifest.empty_prompt_key,
        versions=_versions(),
        **seen,
    )


def _published(run: Run, report: Report, name: str) -> TrainingError:
    """Write the report with the weights; every process calls this. Returns the error to raise."""
    path, strategy = run.config.output_dir / FOLDER / name, run.model.strategy
    # Of all processes, in the same order: where the model is sharded, each tensor is a collective.
    tensors = {name: _gathered(tensor, keep=run.ranks.is_main) for name, tensor in strategy.weights().items()}
    failure = run.ranks.run_on_main(lambda: _publish(path, report, run.config.model, tensors))
    bad = [sample for sample in report.samples if not math.isfinite(sample.loss)]
    where = "; ".join(f"{sample.item.clip} at timestep {sample.timestep}: loss {sample.loss}" for sample in bad)
    if not bad:
        clips = ", ".join(sample.item.clip for sample in report.samples)
        where = f"every loss was finite; the gradient was not. Samples: {clips}"
    start = (
        f"no report could be written ({failure}); make room and start again"
        if failure
        else f"run `finetune replay {path}`"
    )
    fix = (
        f"{start}; then, as it says: leave the clip out, use model.dtype bf16 instead of fp16, or lower optimizer.lr"
        " and lengthen lr_schedule.warmup_steps; the last checkpoint is intact"
    )
    if report.measured:
        what = (
            f"after step {report.step}: non-finite loss while the held-out loss was measured; this counts as no"
            " measurement, and the next start measures again"
        )
    else:
        updated = (
            "weights of layers behind the one where it began may have been updated (memory.gradient_release:"
            " per_parameter)"
            if report.memory.gradient_release == "per_parameter" and not bad
            else "the weights were not updated"
        )
        kind = "loss" if bad else "gradient"
        what = f"step {report.step}: non-finite {kind} (gradient norm {report.grad_norm}); {updated}"
    return NonFiniteError(what, where=where, fix=fix)


def reported_samples(run: Run, step: int, gathered: GatheredStep) -> tuple[ReportedSample, ...]:
    """The samples of a step, of all processes, each with its place, clip and loss."""
    data, world, context = run.data, run.ranks.data_world, run.ranks.context
    places = [
        {"rank": rank * context, "micro_batch": number, "slot": slot}
        for rank in range(world)
        for number, micro in enumerate(data.plan.for_rank(step, rank, world))
        for slot in micro.slots
    ]
    return tuple(
        ReportedSample(item=item, timestep=timestep, loss=loss, **place)
        for item, place, timestep, loss in zip(
            run.items_of(step), places, gathered.timesteps, gathered.losses, strict=True
        )
    )


_GRADIENT = "gradient of "
"""How ``ParallelStrategy.replicas`` names gradients."""


def _second_pass(run: Run, again: Callable[[], None]) -> tuple[dict[str, float], str]:
    """Gradient norms by parameter, and why there are none."""
    model, strategy = run.model, run.model.strategy
    strategy.drop_gradients()
    try:
        again()
        gradients = {name: p.grad for name, p in model.parameters.items() if p.grad is not None}
        if not gradients:  # released: the strategy has them elsewhere
            tensors = strategy.replicas().items()
            gradients = {name.removeprefix(_GRADIENT): g for name, g in tensors if name.startswith(_GRADIENT)}
        norms = {
            name: _norm(gradient.detach(), run.ranks.device) / model.loss_scale for name, gradient in gradients.items()
        }
    except Exception as error:  # the report is worth having without them, and the error of the step is the one to raise
        return {}, f"the second pass failed: {first_line(error)}"
    strategy.drop_gradients()
    return norms, "" if norms else f"the strategy ({strategy.name}) does not show gradients by parameter"


def _norm(gradient: Tensor, device: torch.device) -> float:
    """Of a whole gradient; where processes have shares of it, which may wait on the host, they add up on ``device``."""
    share = getattr(gradient, "to_local", None)
    if share is None:
        return float(torch.linalg.vector_norm(gradient.float()))
    square = torch.linalg.vector_norm(share().float()).double().square().to(device)
    torch.distributed.all_reduce(square)
    return float(square.sqrt())


def _gathered(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """A tensor of a sharded model put together, on the CPU of the process that keeps it."""
    full_tensor = getattr(tensor, "full_tensor", None)
    full: Tensor = tensor if full_tensor is None else full_tensor()
    return full.cpu() if keep else full.new_empty(0, device="cpu")


def _versions() -> dict[str, str]:
    names = ("cogvideox-finetune", "torch", "diffusers", "peft", "accelerate", "bitsandbytes")
    versions = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ------------------------------------------------------------------------------------------------- writing and reading


def _publish(path: Path, report: Report, model: ModelConfig, tensors: dict[str, Tensor]) -> str:
    """Write the report; without weights where the disk has no room for them. Returns why it could not, or nothing."""
    try:
        report = report.model_copy(update={"model_files": model_files(model)})
        needed, free = file_bytes(tensors), free_space(path)
        note = f"they need {human_size(needed)} and the disk has {human_size(free)} free"
        if needed < free:
            try:
                return _write(path, report, tensors)
            except OSError as error:
                note = f"they could not be written: {error}"
        return _write(path, report.model_copy(update={"weights_note": note}), {})
    except (OSError, FinetuneError) as error:  # FinetuneError: the base model's folder is gone
        return first_line(error)


def _write(path: Path, report: Report, tensors: dict[str, Tensor]) -> str:
    def fill(folder: Path) -> str:
        known = {REPORT: atomic_write_text(folder / REPORT, report.model_dump_json(indent=1) + "\n")}
        if tensors:
            known[TRAINABLE] = atomic_save_tensors(folder / TRAINABLE, tensors)
        return folder_checksums(folder, known)

    publish_dir(path, fill)
    return ""


def model_files(model: ModelConfig) -> dict[str, str]:
    """Checksums of the files that the transformer is loaded from, by name.

    Raises:
        ModelError: if they cannot be found.
    """
    folder = resolve_pretrained(model.pretrained, model.revision, components=["transformer"]) / "transformer"
    return {
        path.name: checksum_file(path) for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors")
    }


def read_report(path: Path) -> tuple[Report, dict[str, Tensor]]:
    """A report and the weights in it, verified; no weights where it has none.

    Raises:
        TrainingError: if it is no report, is damaged, or is of a later version of this package.
    """
    try:
        contents = ChecksummedFolder.open(path)
        content = contents.read_json(REPORT)
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise TrainingError(
                f"the report has format {content['format']}, this version reads {FORMAT}",
                where=str(path),
                fix="update cogvideox-finetune",
            )
        return Report.model_validate(content), contents.read_tensors(TRAINABLE) if TRAINABLE in contents else {}
    except (DamageError, OSError, ValidationError) as error:
        raise TrainingError(
            f"the report cannot be read: {first_line(error)}",
            where=str(path),
            fix="name a folder reports/nonfinite-... of a run, with all its files as they were written",
        ) from None
