"""``finetune replay REPORT``: the samples of a step that was not taken, run one at a time.

A report (``trainers.fault_report``) holds everything that decides the step but the cache and the base model. They are
read again here, and must be what they were: a replay on other data would explain another fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune.cogvideox import alpha_bar, load_transformer
from finetune.config import RunConfig
from finetune.datasets.cache import Cache
from finetune.datasets.loader import BatchMaker, to_device
from finetune.errors import CacheError, ModelError, TrainingError, first_line, is_out_of_memory
from finetune.facts import Facts, read_facts
from finetune.memory.quantize import placement
from finetune.ranks import compute_device
from finetune.replay_report import Replay, Replayed, TensorRange
from finetune.schedule import MicroBatch
from finetune.streams import address
from finetune.trainers.fault_report import Report, ReportedSample, model_files, read_report
from finetune.trainers.objective import velocity_losses
from finetune.trainers.run import FP16_LOSS_SCALE
from finetune.types import Batch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def replay(
    path: Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    device: str | None = None,
    pretrained: str | None = None,
    cache: Path | None = None,
) -> Replay:
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
    facts = read_facts(config.model.pretrained, config.model.revision)
    _require_same_model(report, config)
    batches = _batches(report, config, facts)
    compute = _DTYPES[dtype] if dtype else getattr(torch, report.dtype)
    place = compute_device(device)
    try:
        module, parameters = _rebuild(report, config, weights, place, compute)
        schedule = alpha_bar(facts).float().to(place)
        step = _Step(report, facts, module, parameters, schedule, compute)
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
    return Replay(
        path=path,
        report=report,
        dtype=str(compute).removeprefix("torch."),
        device=str(place),
        has_weights=bool(weights),
        weights=TensorRange.of(*parameters.values()),
        samples=samples,
    )


# --------------------------------------------------------------------------------------------------------- rebuilding


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
    whole = config.method.kind == "full" and not report.weights_note
    names = sorted(name for name in report.model_files.keys() | here.keys() if not whole or name.endswith(".json"))
    if changed := [name for name in names if report.model_files.get(name) != here.get(name)]:
        raise ModelError(
            f"the base model is not the one the step was computed with: {', '.join(changed)} changed",
            where=f"{config.model.pretrained}, transformer",
            fix="bring the old files back, or name their folder with --model",
        )


def _batches(report: Report, config: RunConfig, facts: Facts) -> list[Batch]:
    """Each sample as a micro-batch of its own, with every random choice as it was: they follow from step and slot."""
    cache = Cache(config.cache.dir)
    items = [sample.item for sample in report.samples]
    missing = sorted(
        {item.clip for item in items if not cache.has("latents", item.latents_key)}
        | {item.clip for item in items if not cache.has("prompts", item.prompt_key)}
    )
    if missing or not cache.has("prompts", report.empty_prompt_key):
        raise CacheError(
            f"the cache does not hold what the step read: {', '.join(missing) or 'the empty caption'}",
            where=str(config.cache.dir),
            fix="name the cache's folder with --cache, or encode the same data again with `finetune precompute`",
        )
    empty = cache.read_prompt(report.empty_prompt_key)
    if config.data.unconditional_text == "zeros":
        empty = torch.zeros_like(empty)
    maker = BatchMaker(facts, cache, items, empty, config.data, config.train.seed)
    return [
        maker.fixed(index, [sample.timestep])
        if report.measured
        else maker.training(report.step, MicroBatch(items=(index,), slots=(sample.slot,)))
        for index, sample in enumerate(report.samples)
    ]


def _rebuild(
    report: Report, config: RunConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    # Gradients are looked at, not released; all else is as it was.
    memory = report.memory.model_copy(
        update={"gradient_release": "none", "optimizer_states": "device"}
        | ({"streamed_blocks": 0} if config.method.kind == "full" else {})
    )
    module = load_transformer(
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
        method.load_state(
            module,
            {
                name: tensor.to(parameters[name].dtype) if name in parameters else tensor
                for name, tensor in weights.items()
            },
        )
    return module, parameters


# ------------------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class _Step:
    report: Report
    facts: Facts
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    alpha_bar: Tensor
    dtype: torch.dtype

    def run(self, sample: ReportedSample, batch: Batch) -> Replayed:
        """One sample, forward and backward, as ``memory.clips_at_once: 1`` would have run it."""
        scale = FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        count = len(self.report.samples)
        torch.manual_seed(address(self.report.config["train"]["seed"], "model", self.report.step, sample.slot))
        with _watched(self.module) as seen:
            losses = velocity_losses(self.module, self.facts, self.alpha_bar, batch)
        # The same factor as in the step, so that what overflowed there overflows here.
        (losses.sum() * (scale / count)).backward()  # type: ignore[no-untyped-call]
        norms = {
            name: float(torch.linalg.vector_norm(parameter.grad.float())) * count / scale
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }
        self.module.zero_grad(set_to_none=True)
        conditions = [batch.prompt_embeds] + ([] if batch.image_latents is None else [batch.image_latents])
        return Replayed(
            sample=sample,
            loss=float(losses.detach()),
            grad_norm=math.hypot(*norms.values()),
            bad_gradients=tuple(name for name, norm in norms.items() if not math.isfinite(norm)),
            bad_module=seen.bad,
            peak_module=seen.peak_module,
            peak=seen.peak,
            latents=TensorRange.of(batch.latents),
            conditions=TensorRange.of(*conditions),
        )


@dataclass
class _Seen:
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
def _watched(root: nn.Module) -> Iterator[_Seen]:
    """Look at every module's output inside. Only around the forward pass: in the backward pass blocks run again."""
    seen = _Seen(names={module: name or "the whole model" for name, module in root.named_modules()})
    hooks = [module.register_forward_hook(seen.note) for module in seen.names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
