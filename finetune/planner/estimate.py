"""One optimizer step, one denoising step, and what stays between them, with a ledger looking on.

The parts are put together as ``trainers.assemble`` does, and run as the loop runs them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.caching.encode import must_tile
from finetune.cogvideox.components import CONFIG_FILES
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import encode_video
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.objective import velocity_losses
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_file
from finetune.core.types import Batch, Bucket
from finetune.inference.generate import decodes_in_tiles
from finetune.memory.host_buffers import label_buffer
from finetune.memory.runner import undo
from finetune.optim.ema import Ema
from finetune.optim.low_precision import LowPrecisionOptimizer
from finetune.optim.optimizers import AdamW8bit, PagedAdamW8bit, begin
from finetune.parallel.gradient_release import single_process_strategy
from finetune.parallel.strategy import ParallelStrategy
from finetune.planner.fakes import (
    empty_text_encoder,
    empty_transformer,
    empty_vae,
    fake_world,
    rehearsed_once,
    tensors_of,
)
from finetune.planner.memory_tracker import CPU, MemoryTracker, ModuleTracker, Phase, Point, following, measure
from finetune.planner.phases import PHASES, EstimatedPart, PhaseName, Through, made

RESTING = "between phases"
"""Name of the phase in which nothing runs."""


class Alone:
    """What ``Replicated`` asks of a launch of one process."""

    num_processes = 1

    @staticmethod
    def prepare(module: nn.Module) -> nn.Module:
        """As it is."""
        return module


class Training:
    """A run put together as ``trainers.assemble`` does, with a ledger looking on.

    Works on fake tensors and on real ones alike.

    Args:
        ledger: entered.
        spec: of the model.
        config: of the run.
        transformer: in ``dtype``, nothing done to it yet.
        dtype: of compute.
    """

    def __init__(
        self, ledger: MemoryTracker, spec: ModelSpec, config: RunConfig, transformer: nn.Module, dtype: torch.dtype
    ) -> None:
        self.ledger, self.spec, self.config, self.transformer, self.dtype = ledger, spec, config, transformer, dtype
        config.method.apply(transformer, seed=config.train.seed)
        config.memory.apply(transformer, CPU)
        transformer.train()
        self.parameters = config.method.trainable(transformer)
        self.strategy: ParallelStrategy = single_process_strategy(
            Alone,
            transformer,
            self.parameters,
            memory=config.memory,
            device=CPU,
            max_norm=config.train.max_grad_norm,
        )
        self.strategy.start(_rehearsable(config), None)
        self._ready = False
        self.ema: Ema | None = None
        if config.train.ema_decay is not None:
            self.ema = Ema(self.parameters, self.strategy.precise(), config.train.ema_decay)
        self.alpha_bar = torch.linspace(0.999, 0.0, spec.num_train_timesteps)
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._name_gradient)  # type: ignore[no-untyped-call]

    def _name_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.name("gradients", [parameter.grad])

    def step(self, batches: list[Batch]) -> Phase:
        """One optimizer step over micro-batches, after the optimizer has made its states."""
        ledger, strategy = self.ledger, self.strategy
        self._prepare()
        with following(ledger, self.transformer) as here:
            begin = ledger.tick
            marks: dict[str, int] = {}
            for number, batch in enumerate(batches, start=1):
                self._micro_batch(batch, here, marks, last=number == len(batches))
            marks["optimizer"] = ledger.tick
            here.enter("gradient clipping")
            strategy.clip(self.config.train.max_grad_norm or math.inf)
            here.enter("optimizer")
            strategy.step()
            if self.ema is not None:
                self.ema.step()
            here.enter("")
        ledger.read_labels()
        return measure(PHASES["train"], ledger.pieces, begin, ledger.tick, marks, note=_step_note(batches))

    def _micro_batch(self, batch: Batch, here: ModuleTracker, marks: dict[str, int], *, last: bool) -> None:
        ledger, strategy = self.ledger, self.strategy
        ledger.name("batch", [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)])
        for part in self.config.memory.split(batch):
            marks.setdefault("forward", ledger.tick)
            here.enter("forward")
            begun = ledger.tick
            with strategy.micro_batch(last=last):
                losses = velocity_losses(strategy.model, self.spec, self.alpha_bar, part)
                ledger.read_labels()
                ledger.name_since(begun, "saved activations")
                marks.setdefault("backward", ledger.tick)
                here.enter("backward")
                strategy.backward(losses.sum())

    def _prepare(self) -> None:
        """Before the first phase: as everything is between two steps."""
        if self._ready:
            return
        self._ready = True
        self._warm_up()
        gc.collect()
        self._name_residents()

    def _warm_up(self) -> None:
        """Have the optimizer make its states, through its own step; then the strategy, which may move them."""
        optimizer = self.strategy.optimizer
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        begin(optimizer, seed=self.config.train.seed, step=0)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        self.strategy.step()
        if isinstance(self.config.optimizer, PagedAdamW8bit):
            # Unified memory: what of it is on the device at a time is the driver's business, and given way.
            for tensors in _kept_by(optimizer).values():
                for tensor in tensors:
                    label_buffer(tensor, "paged optimizer state", host=True)

    def _name_residents(self) -> None:
        """Say what everything is for that stays from step to step."""
        ledger = self.ledger
        trained = {id(parameter) for parameter in self.parameters.values()}
        ledger.name("frozen weights", (t for t in tensors_of(self.transformer) if id(t) not in trained))
        ledger.name("trainable weights", self.parameters.values())
        for what, tensors in _kept_by(self.strategy.optimizer).items():
            ledger.name(what, tensors)
        if self.ema is not None:
            ledger.name("moving average", self.ema.state().values())
        ledger.name("batch", [self.alpha_bar])
        ledger.read_labels()

    @torch.no_grad()
    def sample(self, bucket: Bucket) -> Phase:
        """One denoising step of validation, with guidance where it is configured."""
        with torch.enable_grad():
            self._prepare()
        guided = self.config.validation.guidance_scale > 1
        (batch,) = fake_batches(self.spec, self.config, bucket, self.dtype, clips=2 if guided else 1)
        self.ledger.name("batch", [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)])
        self.transformer.eval()
        with following(self.ledger, self.transformer) as here:
            begin = self.ledger.tick
            here.enter("sampling")
            denoise(
                self.transformer, self.spec, batch.latents, batch.prompt_embeds, batch.timesteps, batch.image_latents
            )
            here.enter("")
        self.transformer.train()
        self.ledger.read_labels()
        note = "two passes in one batch, for guidance" if guided else "without guidance"
        return measure(
            PHASES["sample"], self.ledger.pieces, begin, self.ledger.tick, {"denoising step": begin}, note=note
        )

    def rest(self) -> Phase:
        """What stays between two phases: beside it a sampled video is decoded."""
        self._prepare()
        self.ledger.read_labels()
        now = self.ledger.tick
        phase = measure(RESTING, self.ledger.pieces, now, now, {})
        return replace(phase, stations={RESTING: phase.peak})


def _step_note(batches: list[Batch]) -> str:
    clips = len(batches[0].slots)
    return f"{clips} clip{'s' if clips > 1 else ''} per micro-batch" + (", accumulated" if len(batches) > 1 else "")


def fake_batches(
    spec: ModelSpec, config: RunConfig, bucket: Bucket, dtype: torch.dtype, clips: int | None = None
) -> list[Batch]:
    """Micro-batches of true shapes; two where gradients are accumulated, because the second meets the first's.

    Args:
        spec: of the model.
        config: of the run.
        bucket: of the clips.
        dtype: of the encoders' output.
        clips: in a single micro-batch; None for the configuration's sizes.
    """
    size = clips or config.train.batch_size
    channels, frames, height, width = spec.latent_shape(bucket)
    shape = (size, channels, frames + spec.front_padding(frames), height, width)
    image = torch.zeros(size, channels, 1, height, width) if spec.image_to_video else None
    batch = Batch(
        latents=torch.zeros(shape),
        noise=torch.zeros(shape),
        timesteps=torch.zeros(size, dtype=torch.long),
        prompt_embeds=torch.zeros(size, spec.max_text_seq_length, spec.text_embed_dim, dtype=dtype),
        image_latents=image,
        slots=tuple(range(size)),
        clips=tuple(f"clip {number}" for number in range(size)),
    )
    if clips is not None or config.train.accumulation == 1:
        return [batch]
    return [batch, replace(batch, latents=torch.zeros(shape), noise=torch.zeros(shape))]


def _rehearsable(config: RunConfig) -> Any:
    """The optimizer, or on the CPU its like: the paged one has the same states, elsewhere."""
    optimizer = config.optimizer
    if isinstance(optimizer, PagedAdamW8bit):
        return AdamW8bit(**optimizer.model_dump(exclude={"kind"}))
    return optimizer


def _kept_by(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """What an optimizer keeps from step to step, by what it is for."""
    kept: dict[str, list[Tensor]] = {}
    if isinstance(optimizer, LowPrecisionOptimizer):
        kept["master copies"] = list(optimizer.policy.saved.values())
        optimizer = optimizer.inner
    states = [value for state in optimizer.state.values() for value in state.values()]
    kept["optimizer state"] = [value for value in states if isinstance(value, Tensor)]
    return kept


# -------- The phases without the transformer: T5 over captions, the VAE over a clip, the VAE's decoder over a sampled
# video.

VAE_WEIGHTS = "VAE weights"


def encode_text(folder: Path, spec: ModelSpec, config: RunConfig) -> EstimatedPart | None:
    """T5 over one batch of captions; None where the checkpoint has no T5.

    Args:
        folder: of the checkpoint's JSON.
        spec: of the model.
        config: of the run.
    """
    if not (folder / CONFIG_FILES["text_encoder"]).is_file():
        return None
    captions, length = config.cache.text_batch_size, spec.max_text_seq_length
    held, dtype = config.memory.text_encoder, config.model.torch_dtype()

    def make() -> tuple[Phase, ...]:
        with fake_world() as ledger, torch.no_grad():
            encoder, _kept = empty_text_encoder(folder, dtype, held)
            ledger.name("text encoder weights", tensors_of(encoder))
            begin = ledger.tick
            ledger.where = "T5"
            embeds = encoder(torch.zeros(captions, length, dtype=torch.long))[0]
            del embeds
            ledger.read_labels()
            note = f"{captions} captions at a time"
            return (measure(PHASES["text"], ledger.pieces, begin, ledger.tick, {"encode": begin}, note=note),)

    depends_on = {"captions": captions, "length": length, "held": held, **_of_model(folder, "text_encoder", dtype)}
    return EstimatedPart({"phase": "text", **depends_on}, make)


def encode(folder: Path, config: RunConfig, bucket: Bucket, card_bytes: int | None, through: Through) -> Phase:
    """The VAE over one clip, in tiles or whole, as precomputing will decide where nothing else is on the GPU.

    Args:
        folder: of the checkpoint's JSON.
        config: of the run.
        bucket: of the clip.
        card_bytes: device memory there is for tensors; None for tiles where the configuration leaves it open.
        through: see ``Through``.
    """
    setting, dtype = config.cache.vae_tiling, config.model.torch_dtype()
    if setting != "off":
        (tiled,) = through(_encode(folder, dtype, bucket, tiled=True))
        free = None if card_bytes is None else card_bytes - tiled.peak.parts[VAE_WEIGHTS]
        if setting == "on" or free is None or must_tile(bucket, dtype, free):
            return tiled
    (whole,) = through(_encode(folder, dtype, bucket, tiled=False))
    return whole


def _encode(folder: Path, dtype: torch.dtype, bucket: Bucket, *, tiled: bool) -> EstimatedPart:
    def clip(ledger: MemoryTracker, vae: Any) -> None:
        pixels = torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width, dtype=torch.uint8)
        ledger.name("batch", [pixels])
        encode_video(vae, pixels)

    depends_on = {"bucket": str(bucket), "tiled": tiled, **_of_model(folder, "vae", dtype)}
    return EstimatedPart(
        {"phase": "encode", **depends_on}, lambda: _coded(folder, dtype, "encode", "encoder", clip, tiled=tiled)
    )


def decode(folder: Path, spec: ModelSpec, dtype: torch.dtype, bucket: Bucket) -> EstimatedPart:
    """The VAE's decoder over one sampled video, without what else is in memory then.

    Args:
        folder: of the checkpoint's JSON.
        spec: of the model.
        dtype: of the VAE.
        bucket: of the video.
    """
    channels, frames, height, width = spec.latent_shape(bucket)
    shape = (1, channels, frames + spec.front_padding(frames), height, width)
    tiled = decodes_in_tiles(bucket, dtype)

    def video(_: MemoryTracker, vae: Any) -> None:
        ((vae.decode(torch.zeros(shape, dtype=dtype)).sample * 0.5) + 0.5).clamp(0, 1)

    depends_on = {"latents": shape, "tiled": tiled, **_of_model(folder, "vae", dtype)}
    return EstimatedPart(
        {"phase": "decode", **depends_on}, lambda: _coded(folder, dtype, "decode", "decoder", video, tiled=tiled)
    )


def _coded(
    folder: Path,
    dtype: torch.dtype,
    name: PhaseName,
    half: str,
    run: Callable[[MemoryTracker, Any], None],
    *,
    tiled: bool,
) -> tuple[Phase, ...]:
    """A phase with nothing but the VAE in it, one half of which repeats itself from tile to tile."""
    with fake_world() as ledger, torch.no_grad():
        vae = empty_vae(folder, dtype)
        if tiled:
            vae.enable_tiling()
        ledger.name(VAE_WEIGHTS, tensors_of(vae))
        begin = ledger.tick
        ledger.where = f"VAE {half}"
        with rehearsed_once(ledger, vae.get_submodule(half)):
            run(ledger, vae)
        note = "in tiles" if tiled else "whole frames"
        return (measure(PHASES[name], ledger.pieces, begin, ledger.tick, {name: begin}, note=note),)


def _of_model(folder: Path, component: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"model": digest_file(folder / CONFIG_FILES[component]), "dtype": str(dtype)}


# -------- A run's phases on fake tensors: what each holds at its peak, when, and what that is made of.
#
# What is rehearsed is the package's own code: method, memory state, strategy, loss, clipping, optimizer. One process is
# rehearsed, with a whole model. Optimizer states exist before the measured step, as in every step but the first.


@dataclass(frozen=True)
class Estimate:
    """What a run will hold, phase by phase."""

    phases: tuple[Phase, ...]
    bucket: str
    """The bucket with the longest sequence, which was rehearsed."""
    tokens: int
    """Of its sequence."""

    @property
    def peak(self) -> Phase:
        """The phase that holds the most device memory."""
        return max(self.phases, key=lambda phase: phase.peak.nbytes)

    def phase(self, name: PhaseName) -> Phase:
        """One of them.

        Raises:
            KeyError: if it was not rehearsed.
        """
        return {phase.name: phase for phase in self.phases}[PHASES[name]]

    @property
    def host_bytes(self) -> int:
        """Host memory that techniques ask for, pinned and pageable together, in the phase that needs the most."""
        return max(phase.pinned.nbytes + phase.pageable.nbytes for phase in self.phases)


def estimate(
    config: RunConfig,
    *,
    layers: int | None = None,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
    through: Through = made,
) -> Estimate:
    """Rehearse a run; only JSON of the model is read.

    Args:
        config: of the run.
        layers: how many of the transformer's blocks; all if None.
        phases: which; sampling and decoding are left out where the configuration samples nothing.
        card_bytes: device memory there is for tensors, which decides whether the VAE encodes in tiles where
            ``cache.vae_tiling`` is ``auto``; None for tiles.
        through: how each part comes to its phases; see ``parts``.

    Raises:
        ModelError: if the model's JSON cannot be found or used.
        ConfigError: if the method does not fit the model.
    """
    folder = json_folder(config.model.pretrained, config.model.revision)
    config = _local(config, folder)
    spec = read_spec(str(folder))
    bucket = longest_bucket(config, spec)
    found: list[Phase] = []
    if "text" in phases and (text := encode_text(folder, spec, config)) is not None:
        found += through(text)
    if "encode" in phases:
        found.append(encode(folder, config, bucket, card_bytes, through))
    videos = bool({"sample", "decode"} & set(phases)) and samples_videos(config)
    if "train" in phases or videos:
        run = through(_run(folder, spec, config, bucket, layers, train="train" in phases, videos=videos))
        found += [phase for phase in run if phase.name != RESTING]
        if "decode" in phases and videos:
            sampled = config.validation.bucket or bucket
            (decoder,) = through(decode(folder, spec, config.model.torch_dtype(), sampled))
            found += [_beside(decoder, phase) for phase in run if phase.name == RESTING]
    wanted = {PHASES[name] for name in phases}
    return Estimate(tuple(phase for phase in found if phase.name in wanted), str(bucket), spec.tokens(bucket))


def longest_bucket(config: RunConfig, spec: ModelSpec) -> Bucket:
    """The bucket with the longest sequence, which needs the most memory."""
    return max(config.data.buckets, key=spec.tokens)


def samples_videos(config: RunConfig) -> bool:
    """Whether the run samples and decodes videos."""
    return bool(config.validation.samples) and config.validation.sample_every is not None


def _local(config: RunConfig, folder: Path) -> RunConfig:
    """The same run from a folder of JSON, without anything that would have to be read."""
    model = config.model.model_copy(update={"pretrained": str(folder), "revision": None})
    method = config.method
    if method.kind == "lora":
        method = method.model_copy(update={"init_from": None})
    return config.model_copy(update={"model": model, "method": method})


def _run(
    folder: Path, spec: ModelSpec, config: RunConfig, bucket: Bucket, layers: int | None, *, train: bool, videos: bool
) -> EstimatedPart:
    """The phases with the transformer in them; with ``videos`` also ``RESTING``, beside which one is decoded."""
    dtype = config.model.torch_dtype()

    def make() -> tuple[Phase, ...]:
        found: list[Phase] = []
        with fake_world() as ledger, ExitStack() as stack, _uncollected():
            transformer = empty_transformer(folder, dtype, config.memory, layers)
            stack.callback(undo, transformer)  # with its model go what techniques put into registers
            trained = Training(ledger, spec, config, transformer, dtype)
            if train:
                found.append(trained.step(fake_batches(spec, config, bucket, dtype)))
            if videos:
                found.append(_sampling(trained, empty_vae(folder, dtype), config.validation.bucket or bucket))
                found.append(trained.rest())
        return tuple(found)

    asked = {"layers": layers, "trains": train, "samples": videos}
    return EstimatedPart({"phase": "run", **asked, **_depends_on(folder, config, bucket)}, make)


def _sampling(trained: Training, vae: nn.Module, bucket: Bucket) -> Phase:
    """With the VAE in memory, which is gone again afterwards."""
    trained.ledger.name(VAE_WEIGHTS, tensors_of(vae))
    return trained.sample(bucket)


def _depends_on(folder: Path, config: RunConfig, bucket: Bucket) -> dict[str, Any]:
    """What of a configuration, and of its model's JSON, the phases with the transformer depend on."""
    values = config.to_dict()
    train, validation = values["train"], values["validation"]
    return {
        "model": {name: digest_file(folder / name) for name in CONFIG_FILES.values() if (folder / name).is_file()},
        "dtype": values["model"]["dtype"],
        "bucket": str(bucket),
        "method": values["method"],
        "optimizer": {name: value for name, value in values["optimizer"].items() if name != "lr"},
        "train": {name: train[name] for name in ("batch_size", "accumulation", "max_grad_norm", "ema_decay")},
        "memory": {name: value for name, value in values["memory"].items() if name != "text_encoder"},
        "sampling": {name: validation[name] for name in ("bucket", "guidance_scale")},
    }


def _beside(phase: Phase, resting: Phase) -> Phase:
    """A phase that was rehearsed alone, in a process that holds ``resting`` besides."""
    held = resting.peak.parts

    def more(point: Point) -> Point:
        parts = dict.fromkeys([*held, *point.parts], 0)
        return Point(point.at, {part: held.get(part, 0) + point.parts.get(part, 0) for part in parts})

    return replace(
        phase,
        peak=more(phase.peak),
        pinned=resting.pinned,
        pageable=resting.pageable,
        curve=tuple(more(point) for point in phase.curve),
        stations={station: more(point) for station, point in phase.stations.items()},
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: what only it would free counts, and a peak does not depend on when it runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
