"""``finetune strength``: what an adapter does at other strengths than its own, and in which blocks.

The held-out loss at 0, a half, one and one and a half times the adapter says in one look whether it has learnt too
little (the loss still falls beyond 1), too much (it is lower below 1), or nothing (it is the same at 0). Beside it, how
large the adapter's change is against what it changes, per block and part of the noise schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune.cogvideox.control import projection_strength
from finetune.cogvideox.objective import alpha_bar, velocity_losses
from finetune.cogvideox.spec import spec_of
from finetune.conversion.source import ExportSource, find_checkpoint, read_source
from finetune.core.distributed import compute_device
from finetune.core.errors import CacheError, ConfigError
from finetune.core.files import from_here
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker, to_device, unconditional_prompt
from finetune.datasets.manifests import Manifest
from finetune.memory.quantized_linear import placement
from finetune.methods.lora import ADAPTER, LoraMethod, adapted_layers
from finetune.methods.merged_base import load_base
from finetune.methods.prior import without_adapter
from finetune.planner.report import table
from finetune.trainers.tracking import timestep_bucket
from finetune.trainers.validation import MeasuredLoss, fixed_passes, fixed_timesteps

_CLEAR = 0.002
"""Least share of the base's loss that an adapter has to change for anything to be said."""

_BETTER = 0.1
"""Share of the gain over the base by which another strength has to be better than 1. Clips, timesteps and noise are the
same for all strengths, so differences are no chance."""


@dataclass(frozen=True)
class StrengthReport:
    """What an adapter does at several strengths."""

    checkpoint: Path
    step: int
    clips: int
    heldout: bool
    """Whether the clips were held out; otherwise there were none, and training clips were measured."""
    losses: Mapping[float, float]
    """Mean loss by strength, ascending."""
    by_band: Mapping[float, Mapping[str, float]]
    """The same per part of the noise schedule."""
    changes: Mapping[str, Mapping[str, float]]
    """By block, then part of the schedule: the adapter's change at strength 1 over what it changes, both as root mean
    squares of the adapted layers' outputs."""

    @property
    def best(self) -> float:
        """The strength with the lowest loss."""
        return min(self.losses, key=lambda strength: self.losses[strength])

    @property
    def verdict(self) -> str:
        """What the losses say, and what to do."""
        base, own, best = self.losses.get(0.0), self.losses.get(1.0), self.best
        if base is None or own is None:
            return f"the loss is lowest at strength {best:g}"
        if not self.heldout:
            return "no clip was held out: on what was trained, more strength nearly always looks better"
        if all(abs(loss - base) < _CLEAR * base for loss in self.losses.values()):
            return "the adapter changes next to nothing yet: train longer, or raise optimizer.lr or alpha / rank"
        if own - self.losses[best] > _BETTER * (base - self.losses[best]):
            if best > 1:
                return f"it is better at strength {best:g} than at 1: it has not learnt enough yet; train on"
            if best > 0:
                return (
                    f"it is better at strength {best:g} than at 1: trained too long or too fast; use an earlier step,"
                    f" sample with strength {best:g}, or lower optimizer.lr"
                )
            return "the base model alone is better on held-out clips: memorised, or the learning rate is far too high"
        return "strength 1 is right: neither too little nor too much"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        values = {**asdict(self), "checkpoint": str(self.checkpoint), "best": self.best, "verdict": self.verdict}
        return {**values, "losses": {str(key): loss for key, loss in self.losses.items()}} | {
            "by_band": {str(key): dict(losses) for key, losses in self.by_band.items()}
        }

    def __str__(self) -> str:
        parts = list(next(iter(self.by_band.values())))
        kind = "held-out" if self.heldout else "training"
        rows = [
            [f"{strength:g}", f"{loss:.4f}", *(f"{self.by_band[strength][part]:.4f}" for part in parts)]
            for strength, loss in self.losses.items()
        ]
        changes = [
            [block, *(f"{100 * change[part]:.2f} %" for part in parts)] for block, change in self.changes.items()
        ]
        return "\n".join(
            [
                f"step {self.step} of {from_here(self.checkpoint)}, {self.clips} {kind} clips",
                "",
                *table(["strength", "loss", *parts], rows),
                "",
                "the adapter's change, of what it changes:",
                *table(["block", *parts], changes),
                "",
                self.verdict,
            ]
        )


@dataclass(frozen=True)
class StrengthOptions:
    """What is measured, and where; ``finetune.strength`` says what each word means."""

    checkpoint: Literal["latest", "best"] = "latest"
    strengths: Sequence[float] = (0.5, 1.5)
    clips: int | None = None
    device: str | None = None
    pretrained: str | None = None
    cache: Path | None = None


def strength(source: Path, options: StrengthOptions) -> StrengthReport:
    """Measure an adapter at several strengths; errors stand at ``finetune.strength``."""
    wanted = sorted({float(value) for value in options.strengths} | {0.0, 1.0})
    if wanted[0] < 0 or wanted[-1] > 10:
        raise ConfigError(f"strengths are {wanted}", where="strengths", fix="give numbers from 0 to 10")
    if options.clips is not None and options.clips < 1:
        raise ConfigError(f"{options.clips} clips are wanted", where="clips", fix="give 1 or more, or leave it out")
    read = read_source(find_checkpoint(source, options.checkpoint), "auto", options.pretrained)
    method = read.config.method
    if method.kind == "full":
        raise ConfigError(
            "the run trained the whole transformer, which has no strength",
            where=str(source),
            fix="compare its held-out loss with that of step 0, and its sampled videos",
        )
    spec = spec_of(read.config.model)
    maker, heldout = _clips(read, options.cache)
    timesteps = fixed_timesteps(read.config.validation.timesteps, spec.num_train_timesteps)
    passes = fixed_passes(maker, timesteps, options.clips or read.config.validation.clips, read.config.train.batch_size)
    place = compute_device(options.device)
    module = _adapted(read, place)
    levels = alpha_bar(spec).float().to(place)

    def measured() -> MeasuredLoss:
        batches = (to_device(one.batch(), place) for one in passes)
        return MeasuredLoss(passes, [velocity_losses(module, spec, levels, batch).tolist() for batch in batches])

    with torch.no_grad():
        meter = _ChangeMeter(module, spec.num_train_timesteps)
        losses = {1.0: measured()}
        changes = meter.close()
        for value in wanted:
            if value != 1:
                with _scaled(module, value):
                    losses[value] = measured()
    return StrengthReport(
        checkpoint=read.checkpoint,
        step=read.state.step,
        clips=len({one.index for one in passes}),
        heldout=heldout,
        losses={value: losses[value].mean for value in wanted},
        by_band={value: losses[value].by_bucket(spec.num_train_timesteps) for value in wanted},
        changes=changes,
    )


def _clips(read: ExportSource, cache: Path | None) -> tuple[BatchMaker, bool]:
    """The clips to measure, and whether they were held out."""
    config = read.config
    store = Cache(cache or config.cache.dir)
    digest = read.state.cache_digest
    content = next((content for _, content in store.manifests() if content.get("digest") == digest), None)
    if content is None:
        raise CacheError(
            "the cache does not hold what the run trained on",
            where=str(store.root),
            fix="name the cache's folder with --cache, or encode the same data again with `finetune precompute`",
        )
    manifest = Manifest.from_content(content, Path())
    empty = unconditional_prompt(store, manifest.empty_prompt_key, config.data)
    heldout = [item for item in manifest.items if item.holdout]
    spec = spec_of(config.model)
    items = heldout or list(manifest.items)
    return BatchMaker(spec, store, items, empty, config.data, config.train.seed, config.objective), bool(heldout)


def _adapted(read: ExportSource, place: torch.device) -> nn.Module:
    """The transformer with the adapter, as it is measured while training but for its blocks' own forward pass, which
    alone lets every adapted layer be looked at.
    """
    changes = {"kind": "manual", "block": "stock", "budget": None, "ram": None, "quantize": False}
    memory, model = read.config.memory.model_copy(update=changes), read.config.model
    module = load_base(
        model, device="cpu" if memory.streams else place, dtype=model.torch_dtype(), placement=placement(memory.base)
    )
    method = read.config.method
    if isinstance(method, LoraMethod):
        method = method.model_copy(update={"init_from": None, "dropout": 0.0})
    method.apply(module, seed=read.config.train.seed)
    memory.apply(module, place)
    method.load_state(module, read.tensors)
    return module.eval()  # type: ignore[no-any-return]


@contextmanager
def _scaled(module: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the adapter counts ``strength`` times as much; at 0 the model is the base, of a DoRA too."""
    if not strength:
        with without_adapter(module):
            yield
        return
    layers = [layer for _, layer in adapted_layers(module)]
    own = [layer.scaling[ADAPTER] for layer in layers]
    for layer, scaling in zip(layers, own, strict=True):
        layer.scaling[ADAPTER] = scaling * strength
    try:
        with projection_strength(module, strength):
            yield
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling[ADAPTER] = scaling


class _ChangeMeter:
    """Sums of squares of what adapted layers give, with and without the adapter, per block and part of the schedule."""

    def __init__(self, module: nn.Module, num_train_timesteps: int) -> None:
        self._most = num_train_timesteps
        self._timesteps: Sequence[int] = ()
        self._sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        self._hooks = [layer.register_forward_hook(self._watching(name)) for name, layer in adapted_layers(module)]
        self._hooks.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._timesteps = kwargs["timestep"].tolist()

    def _watching(self, name: str) -> Any:
        block = name.split(".")[1] if name.startswith("transformer_blocks.") else "others"

        def watch(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            base = layer.base_layer(*args).float().flatten(1)
            change = output.float().flatten(1) - base
            for timestep, own, of in zip(self._timesteps, change, base, strict=True):
                sums = self._sums[block][timestep_bucket(timestep, self._most)]
                sums[0] += float(own.square().mean())
                sums[1] += float(of.square().mean())

        return watch

    def close(self) -> dict[str, dict[str, float]]:
        """The root of the ratio of both sums, by block in the model's order, then by part."""
        for hook in self._hooks:
            hook.remove()
        order = sorted(self._sums, key=lambda block: (not block.isdecimal(), int(block) if block.isdecimal() else 0))
        return {
            block: {part: (own / of) ** 0.5 for part, (own, of) in sorted(self._sums[block].items())} for block in order
        }
