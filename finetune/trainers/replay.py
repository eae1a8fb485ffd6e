"""``finetune replay REPORT``: the samples of a step that was not taken, run one at a time, and what went wrong in it.

A report (``fault_report``) holds everything that decides the step but the cache and the base model. They are read again
here, and must be what they were: a replay on other data would explain another fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox.objective import alpha_bar, velocity_losses, weighted
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.config.schema import RunConfig
from finetune.core.distributed import compute_device
from finetune.core.errors import CacheError, ModelError, TrainingError, first_line, is_out_of_memory
from finetune.core.precision import without_reduced_precision
from finetune.core.rng import seed_for
from finetune.core.text import shown
from finetune.core.types import Batch, DtypeName, torch_dtype
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker, to_device, unconditional_prompt
from finetune.datasets.schedule import MicroBatch
from finetune.memory.attention import attention_kernel, usable_kernel
from finetune.memory.quantized_linear import placement
from finetune.methods.merged_base import load_base
from finetune.methods.prior import base_prediction
from finetune.trainers.fault_report import Report, ReportedSample, model_files, read_report
from finetune.trainers.run import FP16_LOSS_SCALE
from finetune.trainers.setup import attention_request

EXTREME_LATENTS = 100.0
"""Scaled latents have about unit variance; beyond this one is no picture any more."""

EXTREME_WEIGHTS = 1e3
"""No weight of a model that still works is as large."""

SAME = 1e-2
"""Relative difference between two losses that are taken for the same: bf16 in micro-batches of another size."""


@dataclass(frozen=True)
class TensorRange:
    """Smallest and largest finite value, and how many values are not finite."""

    low: float
    high: float
    non_finite: int

    @classmethod
    def of(cls, *tensors: Tensor) -> TensorRange:
        """Over all of ``tensors``."""
        finite = [tensor.detach()[torch.isfinite(tensor.detach())] for tensor in tensors]
        present = [values for values in finite if values.numel()]
        return cls(
            low=min((float(values.min()) for values in present), default=math.nan),
            high=max((float(values.max()) for values in present), default=math.nan),
            non_finite=sum(tensor.numel() for tensor in tensors) - sum(values.numel() for values in finite),
        )

    def exceeds(self, limit: float) -> bool:
        """Whether a value is not finite or larger than ``limit``."""
        return bool(self.non_finite) or max(abs(self.low), abs(self.high)) > limit

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}" + (f", {self.non_finite} not finite" if self.non_finite else "")


@dataclass(frozen=True)
class Replayed:
    """One sample, run alone."""

    sample: ReportedSample
    loss: float
    grad_norm: float
    """Of this sample's own loss, over everything that trains."""
    bad_module: str
    """The first module, in the order of the forward pass, whose output is not finite; empty where all are."""
    peak_module: str
    peak: float
    """The largest finite output of a module."""
    latents: TensorRange
    """In model space, as they enter the noising."""
    conditions: TensorRange
    """Caption embedding and image latents."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def has_bad_input(self) -> bool:
        """Whether the clip itself is the fault."""
        return self.latents.exceeds(EXTREME_LATENTS) or bool(self.conditions.non_finite)

    @property
    def is_as_recorded(self) -> bool:
        """Whether the loss is what the report says."""
        if not math.isfinite(self.sample.loss) or not math.isfinite(self.loss):
            return math.isfinite(self.sample.loss) == math.isfinite(self.loss)
        return math.isclose(self.sample.loss, self.loss, rel_tol=SAME)


@dataclass(frozen=True)
class ReplayReport:
    """What a replay found; ``str`` is the table and the diagnosis."""

    report: Report
    dtype: str
    device: str
    has_weights: bool
    weights: TensorRange
    """Of everything that trains, as it was in the step."""
    samples: tuple[Replayed, ...]

    @property
    def bad(self) -> tuple[Replayed, ...]:
        """The samples that are not finite here."""
        return tuple(sample for sample in self.samples if not sample.is_finite)

    @property
    def reproduced(self) -> bool | None:
        """Whether this shows what was recorded; None where it cannot: without the weights, or in another dtype."""
        if not self.has_weights or self.dtype != self.report.dtype:
            return None
        return bool(self.bad) and all(each.is_as_recorded for each in self.samples)

    @property
    def kind(self) -> str:
        """``weights``, ``clip``, ``overflow``, ``overflow?``, ``unexplained`` or ``gone``."""
        if self.weights.exceeds(EXTREME_WEIGHTS):
            return "weights"
        if any(sample.has_bad_input for sample in self.samples):
            return "clip"
        if self.bad:
            return "overflow?" if self.dtype == "float16" else "unexplained"
        return "overflow" if self.dtype == "float32" != self.report.dtype else "gone"

    @property
    def diagnosis(self) -> str:
        """What went wrong, and what to do, in words."""
        clips = ", ".join(shown(each.sample.item.clip) for each in self.samples if each.has_bad_input)
        module = next((each.bad_module for each in self.bad if each.bad_module), "")
        place = f"first in {module}" if module else "in the backward pass only"
        return {
            "weights": f"the weights have diverged ({self.weights}), before this step: continue from a checkpoint in"
            " which they had not, with a lower optimizer.lr or a longer lr_schedule.warmup_steps",
            "clip": f"bad clip: what the cache holds for {clips} is extreme or not finite. Look at the video; encode it"
            " in another precision (model.dtype, cache.latents_dtype) or leave it out",
            "overflow": f"overflow: not finite in {self.report.dtype}, finite in {self.dtype}, with sane latents and"
            " weights. Train with model.dtype bf16 or fp32",
            "overflow?": f"most likely an overflow of {self.dtype} ({place}): latents and weights are sane. Replay with"
            " --dtype fp32; if all is finite there, train with model.dtype bf16 or fp32",
            "unexplained": f"not finite {place}, although latents and weights are sane. Please report it",
            "gone": "every sample is finite here. Either the fault is in no single sample, or it was the machine's (an"
            " unstable GPU, a kernel that is not deterministic). Continue from the last checkpoint",
        }[self.kind]

    def __str__(self) -> str:
        report, bad = self.report, self.report.non_finite_gradients
        rest = "" if report.measured else f", learning rate {report.lr:g}, gradient norm {report.grad_norm}"
        weights = f"of the step, {self.weights}" if self.has_weights else f"as at step 0, because {report.weights_note}"
        reproduced = {True: "yes", False: "no", None: "cannot be said (other weights or another dtype)"}
        lines = [
            f"{'measured after step' if report.measured else 'step'} {report.step} of {report.config['output_dir']}:"
            f" samples: {len(self.samples)}, processes: {report.processes}{rest}",
            f"recorded in {report.dtype} on {report.device} ({report.engine})",
            f"replayed in {self.dtype} on {self.device}",
            f"weights: {weights}",
            "",
            *_table(self.samples),
            "",
            f"recorded gradients not finite: {len(bad)} of {len(report.gradient_norms)}, {bad[-1]} last" if bad else "",
            f"reproduced: {reproduced[self.reproduced]}",
            f"diagnosis: {self.diagnosis}",
        ]
        return "\n".join(lines)


def _table(samples: tuple[Replayed, ...]) -> list[str]:
    rows = [("clip", "timestep", "recorded", "loss", "gradient", "finite", "latents", "first module not finite")]
    rows += [
        (
            shown(each.sample.item.clip),
            str(each.sample.timestep),
            f"{each.sample.loss:.4g}",
            f"{each.loss:.4g}",
            f"{each.grad_norm:.4g}",
            "yes" if each.is_finite else "no",
            str(each.latents),
            each.bad_module or f"none; largest output {each.peak:.3g} in {each.peak_module}",
        )
        for each in samples
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


@without_reduced_precision()
def replay(
    path: Path,
    *,
    dtype: DtypeName | None = None,
    device: str | None = None,
    pretrained: str | None = None,
    cache: Path | None = None,
) -> ReplayReport:
    """Run every sample of a report in isolation, forward and backward, in one process.

    Args:
        path: the report's folder.
        dtype: what frozen weights are held and computed in; None for what the step was computed in.
        device: such as ``cuda:1``; None for the GPU where there is one.
        pretrained: where the base model is now; None for where the run had it.
        cache: where the run's cache is now; None for where the run had it.

    Raises:
        TrainingError: if the report is damaged, or memory does not hold the model.
        ModelError: if the base model is not the one the step was computed with.
        CacheError: if an entry that the step read is gone or damaged.
    """
    report, weights = read_report(path)
    config = _moved(report, pretrained, cache)
    spec = spec_of(config.model)
    _require_same_model(report, config)
    batches = _batches(report, config, spec)
    compute = torch_dtype(dtype) if dtype else getattr(torch, report.dtype)
    place = compute_device(device)
    try:
        step = _rebuild(report, config, weights, place, compute)
        attention = replace(attention_request(config, spec, place), dtype=compute)
        with attention_kernel(usable_kernel(config.model.attention, attention)):  # the step's own, where it can be
            samples = tuple(
                step.run(sample, to_device(batch, place)) for sample, batch in zip(report.samples, batches, strict=True)
            )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"the memory of {place} does not hold the replay: {first_line(error)}",
            where=str(path),
            fix="free it, or replay with --device cpu",
        ) from None
    return ReplayReport(
        report=report,
        dtype=str(compute).removeprefix("torch."),
        device=str(place),
        has_weights=bool(weights),
        weights=TensorRange.of(*step.parameters.values()),
        samples=samples,
    )


def _moved(report: Report, pretrained: str | None, cache: Path | None) -> RunConfig:
    values: dict[str, Any] = dict(report.config)
    if pretrained is not None:
        values["model"] = {**values["model"], "pretrained": pretrained, "revision": None}
    if cache is not None:
        values["cache"] = {**values["cache"], "dir": str(cache)}
    return RunConfig.from_dict(values)


def _require_same_model(report: Report, config: RunConfig) -> None:
    here = model_files(config.model)
    # After full fine-tuning the report has every weight, and of the folder only the architecture counts.
    only_json = config.method.kind == "full" and not report.weights_note
    names = sorted(name for name in report.model_files.keys() | here.keys() if not only_json or name.endswith(".json"))
    if changed := [name for name in names if report.model_files.get(name) != here.get(name)]:
        raise ModelError(
            f"the base model is not the one the step was computed with: {', '.join(changed)} changed",
            where=f"{config.model.pretrained}, transformer",
            fix="bring the old files back, or name their folder with --model",
        )


def _batches(report: Report, config: RunConfig, spec: ModelSpec) -> list[Batch]:
    """Each sample as a micro-batch of its own, with every random choice as it was: they follow from step and slot."""
    cache = Cache(config.cache.dir)
    items = [sample.item for sample in report.samples]
    missing = {
        item.clip
        for item in items
        if not all(cache.has("latents", key) for key in item.latents_keys)
        or not all(cache.has("prompts", key) for key in item.prompt_keys)
    }
    if missing or not cache.has("prompts", report.empty_prompt_key):
        raise CacheError(
            f"the cache does not hold what the step read: {', '.join(sorted(missing)) or 'the empty caption'}",
            where=str(config.cache.dir),
            fix="name the cache's folder with --cache, or encode the same data again with `finetune precompute`",
        )
    empty = unconditional_prompt(cache, report.empty_prompt_key, config.data)
    maker = BatchMaker(spec, cache, items, empty, config.data, config.train.seed, config.objective)
    return [
        maker.fixed(index, [sample.timestep])
        if report.measured
        else maker.training(report.step, MicroBatch(items=(index,), slots=(sample.slot,)))
        for index, sample in enumerate(report.samples)
    ]


def _rebuild(
    report: Report, config: RunConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> _Step:
    # Gradients are looked at, not released; all else is as it was.
    memory = report.memory.model_copy(
        update={"gradient_release": "none", "optimizer_states": "device"}
        | ({"streamed_blocks": 0} if config.method.kind == "full" else {})
    )
    module = load_base(
        config.model, device="cpu" if memory.streams else device, dtype=dtype, placement=placement(memory.base)
    )
    method = config.method
    if weights and method.kind == "lora":
        method = method.model_copy(update={"init_from": None})  # the report's weights are later ones
    if report.measured and method.kind == "lora":
        method = method.model_copy(update={"dropout": 0.0})
    method.apply(module, seed=config.train.seed)
    memory.apply(module, device)
    module.train()
    parameters = method.trainable(module)
    if weights:
        # Adapters are float32 whatever the base; after full fine-tuning the weights follow the dtype asked for.
        cast = {name: tensor.to(parameters[name].dtype) for name, tensor in weights.items() if name in parameters}
        method.load_state(module, weights | cast)
    spec = spec_of(config.model)
    return _Step(report, spec, module, parameters, alpha_bar(spec).float().to(device), dtype)


@dataclass(frozen=True)
class _Step:
    report: Report
    spec: ModelSpec
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    alpha_bar: Tensor
    dtype: torch.dtype

    def run(self, sample: ReportedSample, batch: Batch) -> Replayed:
        """One sample, forward and backward, as ``memory.clips_at_once: 1`` would have run it."""
        scale = FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        count = len(self.report.samples)
        torch.manual_seed(seed_for(self.report.config["train"]["seed"], "model", self.report.step, sample.slot))
        base = base_prediction(self.module, self.module, self.spec, self.alpha_bar, batch, collective=False)
        with _watched(self.module) as outputs:
            losses = velocity_losses(self.module, self.spec, self.alpha_bar, batch, base)
        # The same factor as in the step, so that what overflowed there overflows here.
        (weighted(losses, batch).sum() * (scale / count)).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        # One at a time in float32: after full fine-tuning, all of them are twice the model.
        grad_norm = math.hypot(*(float(torch.linalg.vector_norm(gradient.float())) for gradient in gradients))
        self.module.zero_grad(set_to_none=True)
        conditions = [batch.prompt_embeds] + ([] if batch.image_latents is None else [batch.image_latents])
        return Replayed(
            sample=sample,
            loss=float(losses.detach()),
            grad_norm=grad_norm * count / scale,
            bad_module=outputs.bad,
            peak_module=outputs.peak_module,
            peak=outputs.peak,
            latents=TensorRange.of(batch.latents),
            conditions=TensorRange.of(*conditions),
        )


@dataclass
class _Outputs:
    bad: str = ""
    """The first module, in the order of the forward pass, whose output is not finite."""
    peak: float = 0.0
    peak_module: str = ""
    """Where the largest finite output was, and how large."""
    names: dict[nn.Module, str] = field(default_factory=dict)

    def note(self, module: nn.Module, _: object, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                peak = float(tensor.detach().abs().max())
                if not math.isfinite(peak):
                    self.bad = self.bad or self.names[module]
                elif peak > self.peak:
                    self.peak, self.peak_module = peak, self.names[module]


@contextmanager
def _watched(root: nn.Module) -> Iterator[_Outputs]:
    """Look at every module's output inside. Only around the forward pass: in the backward pass blocks run again."""
    outputs = _Outputs(names={module: name or "the whole model" for name, module in root.named_modules()})
    hooks = [module.register_forward_hook(outputs.note) for module in outputs.names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
