"""What a run holds at its peak, phase by phase: its own code on fake tensors, with a ``MemoryTracker`` looking on.

What runs is this package's method, memory techniques, strategy, loss, clipping and optimizer: one process with a whole
model, one optimizer step, one denoising step. Optimizer states exist before, as in every step but the first.

A block is up to some thousand operations each time it runs, and forty-two of them take minutes. But blocks are alike:
what is held while, say, the last block but one runs backward grows by the same bytes with every block that the model
has more. So ``predict`` estimates models of five and six blocks, and extends their figures station by station, since
another one may be the highest in the whole model.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError

from finetune.caching.encode import must_tile
from finetune.cogvideox.components import CONFIG_FILES
from finetune.cogvideox.control import widen
from finetune.cogvideox.encode import enable_tiling, encode_video
from finetune.cogvideox.load import empty_transformer
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_file, digest_of
from finetune.core.collector import collector_paused
from finetune.core.files import atomic_write_text, user_folder
from finetune.core.types import Bucket
from finetune.inference.sample import decodes_in_tiles
from finetune.memory.quantized_linear import placement
from finetune.memory.runner import undo
from finetune.planner import fake_run
from finetune.planner.fake_run import TrackedTraining, fake_batches, fake_world, latent_shape, tensors_of
from finetune.planner.memory_tracker import CPU, PHASES, RUN_PHASES, TRANSIENT, Phase, PhaseName, Point, measure

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """What a run will hold, phase by phase."""

    phases: tuple[Phase, ...]
    bucket: str
    """The bucket with the longest sequence, which needs the most memory."""
    tokens: int
    """Of its sequence."""

    @property
    def peak(self) -> Phase:
        """The phase that holds the most device memory."""
        return max(self.phases, key=lambda phase: phase.peak.nbytes)

    def phase(self, name: PhaseName) -> Phase:
        """One of them.

        Raises:
            KeyError: if it was not estimated.
        """
        return {phase.name: phase for phase in self.phases}[PHASES[name]]

    @property
    def host_bytes(self) -> int:
        """Host memory that techniques ask for, pinned and pageable together, in the phase that needs the most."""
        return max(phase.pinned + phase.pageable for phase in self.phases)


def longest_bucket(config: RunConfig, spec: ModelSpec) -> Bucket:
    """The bucket with the longest sequence, which needs the most memory."""
    return max(config.data.trained_buckets, key=spec.tokens)


# -------------------------------------------------------------------------------------- from short models to a long one

SHORT = (5, 6)
"""Layers of the two short models: two blocks at either end, which techniques may treat apart, at least one between them
that keeps the ends from each other's treatment, and what one more adds."""


def predict(
    config: RunConfig,
    *,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
    processes: int = 1,
    exact: bool = False,
) -> Estimate:
    """What a run will hold.

    Args:
        config: of the run.
        phases: which; what the run has none of, such as videos, is left out.
        card_bytes: device memory there is for tensors, which decides whether the VAE encodes in tiles where
            ``cache.vae_tiling`` is ``auto``; None for tiles.
        processes: how many hold a whole model each (DDP); the figures are of one of them.
        exact: run every block in any case; only then are there curves to draw.

    Raises:
        ModelError: if the model's JSON cannot be found or used.
        ConfigError: if the method does not fit the model.
    """
    spec = spec_of(config.model, shipped=True)
    bucket = longest_bucket(config, spec)
    encoders = [name for name in phases if name not in RUN_PHASES]
    # All phases of the run are estimated together, and so are in the cache together.
    every = RUN_PHASES if _samples_videos(config) else RUN_PHASES[:1]
    run = [name for name in every if name in phases]
    estimated: list[Phase] = []
    if run and (exact or not _is_extendable(config, spec.num_layers)):
        estimated += estimate(config, phases=run).phases
        if processes > 1:
            estimated = [_in_buckets(phase) for phase in estimated]
    elif run:
        variants = _uniform_variants(config, spec.num_layers)
        more, few = ([estimate(variant, layers=layers, phases=every) for variant in variants] for layers in SHORT[::-1])
        changed = _with_buckets if processes > 1 else dict
        for name in run:
            pairs = zip(few, more, strict=True)
            extended = [extend(a.phase(name), b.phase(name), spec.num_layers, changed) for a, b in pairs]
            estimated.append(_mixed(config, spec.num_layers, extended))
    if encoders:
        estimated = [*estimate(config, phases=encoders, card_bytes=card_bytes).phases, *estimated]
    return Estimate(tuple(estimated), str(bucket), spec.tokens(bucket))


def _samples_videos(config: RunConfig) -> bool:
    return bool(config.validation.samples) and config.validation.sample_every is not None


def _is_extendable(config: RunConfig, layers: int) -> bool:
    """Whether short models are shorter, of blocks that are alike, with the techniques' ends as in the whole one."""
    alike = config.method.kind == "full" or config.method.alike(layers)
    return alike and layers > SHORT[1] and (not config.memory.streams or config.memory.ring < SHORT[0])


def extend(
    short: Phase, longer: Phase, layers: int, changed: Callable[[Mapping[str, int]], Mapping[str, int]] = dict
) -> Phase:
    """The phase with ``layers`` blocks, without a curve.

    Args:
        short: the phase with ``SHORT[0]`` blocks.
        longer: the same with ``SHORT[1]``.
        layers: of the whole model, at least ``SHORT[1]``.
        changed: what becomes of the parts that are held at a station, before the highest is chosen.
    """
    steps = (layers - SHORT[0]) / (SHORT[1] - SHORT[0])

    def along(start: int, end: int) -> int:
        return round(start + (end - start) * steps)

    best, where = Point(0.0, {}), ""
    for station, end in longer.stations.items():
        counterpart, name = _counterpart(station, layers)
        if (start := short.stations.get(counterpart)) is None:
            continue
        names = {**end.parts, **start.parts}
        parts = {part: along(start.parts.get(part, 0), end.parts.get(part, 0)) for part in names}
        # Where the two name the same bytes differently, one part falls as another rises; together they are right.
        parts[TRANSIENT] = parts.get(TRANSIENT, 0) + sum(nbytes for nbytes in parts.values() if nbytes < 0)
        point = Point(0.0, changed({part: nbytes for part, nbytes in parts.items() if nbytes > 0}))
        if point.nbytes > best.nbytes:
            best, where = point, name
    pinned, pageable = along(short.pinned, longer.pinned), along(short.pageable, longer.pageable)
    return Phase(longer.name, best, where, pinned, pageable, longer.note)


def _counterpart(station: str, layers: int) -> tuple[str, str]:
    """What a station of the longer model is called in the shorter one (empty if it has none), and in the whole."""
    few, more = SHORT
    match = re.fullmatch(r"(.*block) (\d+) of \d+", station)
    if match is None:
        return station, station
    block, number = match[1], int(match[2])
    from_end = more - 1 - number
    if number < few // 2:
        return f"{block} {number} of {few}", f"{block} {number} of {layers}"
    if from_end < few // 2:
        return f"{block} {few - 1 - from_end} of {few}", f"{block} {layers - 1 - from_end} of {layers}"
    return "", station


def _uniform_variants(config: RunConfig, layers: int) -> list[RunConfig]:
    """The run with all blocks treated alike; where they are not, each of the ways in which they are treated."""
    memory = config.memory

    def changed(**values: object) -> RunConfig:
        return config.model_copy(update={"memory": memory.model_copy(update=values)})

    if memory.keep_attention is not None:
        keeping = _uniform_variants(changed(keep_attention=None), layers)
        if memory.keep_attention >= layers:
            return keeping
        return [*_uniform_variants(changed(checkpointing="full", keep_attention=None), layers), *keeping]
    return [changed(streamed_blocks="all")] if memory.streams else [config]


def _mixed(config: RunConfig, layers: int, uniform: Sequence[Phase]) -> Phase:
    """From ``_uniform_variants`` of ``layers`` blocks to a model whose blocks are not treated alike.

    The difference that a block makes which keeps attention, or does not stream, is counted by their number.
    """
    memory, phase = config.memory, uniform[0]
    more: dict[str, int] = {}
    if len(uniform) > 1 and memory.keep_attention is not None:
        difference = uniform[1].peak.nbytes - phase.peak.nbytes
        more["saved activations"] = round(difference * memory.keep_attention / layers)
    streamed = memory.streamed_blocks
    if isinstance(streamed, int) and 0 < streamed < layers:
        slots, staying = min(memory.ring, streamed), layers - streamed
        weights = phase.peak.parts["streaming ring"] // memory.ring
        full = config.method.kind == "full"
        more |= {
            "trainable weights" if full else "frozen weights": staying * weights,
            "streaming ring": (slots - memory.ring) * weights,
        }
        if not full:  # weights that train and are updated on the host are there in any case
            phase = replace(phase, pinned=phase.pinned - staying * weights)
    return replace(phase, peak=Point(0.0, _sum(phase.peak.parts, more)))


def _sum(parts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return {part: parts.get(part, 0) + more.get(part, 0) for part in {**parts, **more}}


def _with_buckets(parts: Mapping[str, int]) -> dict[str, int]:
    """What one of several processes holds: from the first step on, all gradients lie in DDP's buckets all the time."""
    return {**parts, "gradients": max(parts.get("gradients", 0), parts.get("trainable weights", 0))}


def _in_buckets(phase: Phase) -> Phase:
    """A phase as one of several processes has it; where it is highest may change."""

    def with_buckets(point: Point) -> Point:
        return Point(point.at, _with_buckets(point.parts))

    stations = {station: with_buckets(point) for station, point in phase.stations.items()}
    where = max(stations, key=lambda station: stations[station].nbytes)
    return replace(phase, peak=stations[where], where=where, curve=tuple(map(with_buckets, phase.curve)))


# ---------------------------------------------------------------------------------- the phases of a run, block by block


def estimate(
    config: RunConfig,
    *,
    layers: int | None = None,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
) -> Estimate:
    """Run the phases on fake tensors, or read what the same code estimated earlier; only JSON of the model is read.

    Args:
        config: see ``predict``.
        layers: how many of the transformer's blocks; all if None.
        phases: see ``predict``.
        card_bytes: see ``predict``.

    Raises:
        ModelError, ConfigError: as ``predict``.
    """
    folder = json_folder(config.model.pretrained, config.model.revision)
    spec = spec_of(config.model, shipped=True)
    bucket = longest_bucket(config, spec)
    path = user_folder() / "estimates" / f"{_cache_key(config, folder, bucket, (layers, *phases, card_bytes))}.json"
    with suppress(OSError, ValidationError):  # absent, or cut short: it is made again
        return _STORED.validate_json(path.read_bytes())
    blocks = f", with {layers} blocks" if layers else ""
    _log.info("estimating: %s%s", ", ".join(PHASES[name] for name in phases), blocks)
    estimated: list[Phase] = []
    if "text" in phases and (folder / CONFIG_FILES["text_encoder"]).is_file():
        estimated.append(_text(folder, spec, config))
    if "encode" in phases:
        estimated.append(_encode(folder, config, bucket, card_bytes))
    if set(RUN_PHASES) & set(phases):
        estimated += _run(folder, config, bucket, layers, phases)
    estimate = Estimate(tuple(estimated), str(bucket), spec.tokens(bucket))
    with suppress(OSError):  # a home that cannot be written costs time, and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, _STORED.dump_json(estimate).decode())
    return estimate


_STORED = TypeAdapter(Estimate)


def _cache_key(config: RunConfig, folder: Path, bucket: Bucket, request: Sequence[object]) -> str:
    """A digest of all that an estimate depends on, code and libraries included."""
    used = {
        "train": ("batch_size", "accumulation", "max_grad_norm", "ema_decay"),
        "validation": ("bucket", "guidance_scale"),
        "cache": ("text_batch_size", "vae_tiling"),
        "model": ("dtype", "control"),
    }
    values = config.to_dict()
    return digest_of(
        {
            **{section: {name: values[section][name] for name in names} for section, names in used.items()},
            "optimizer": {name: value for name, value in values["optimizer"].items() if name != "lr"},
            "method": values["method"],
            "memory": values["memory"],
            "parallel": values["parallel"],
            "samples": _samples_videos(config),
            "files": [digest_file(folder / name) for name in CONFIG_FILES.values() if (folder / name).is_file()],
            "bucket": str(bucket),
            "request": list(request),
            "versions": _versions(),
        }
    )


@cache
def _versions() -> dict[str, str]:
    """Of the libraries, and of this package's own code, which may be edited without a new version."""
    package = Path(__file__).parents[1]
    libraries = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy")
    code = {path.relative_to(package).as_posix(): digest_file(path) for path in sorted(package.rglob("*.py"))}
    return {"finetune": digest_of(code)} | {name: importlib.metadata.version(name) for name in libraries}


def _text(folder: Path, spec: ModelSpec, config: RunConfig) -> Phase:
    """T5 over one batch of captions."""
    captions = config.cache.text_batch_size
    with fake_world() as tracker, torch.no_grad():
        encoder, _kept = fake_run.empty_text_encoder(folder, config.model.torch_dtype(), config.memory.text_encoder)
        tracker.name("text encoder weights", tensors_of(encoder))
        begin, tracker.where = tracker.tick, "T5"
        embeds = encoder(torch.zeros(captions, spec.max_text_seq_length, dtype=torch.long))[0]
        del embeds
        tracker.read_labels()
        note = f"{captions} captions at a time"
        return measure(PHASES["text"], tracker.allocations, begin, tracker.tick, {"encode": begin}, note)


_FREE_ANYWHERE = 2**30
"""Bytes that every card has free beside the VAE, also one of which nothing is known."""


def _encode(folder: Path, config: RunConfig, bucket: Bucket, card_bytes: int | None) -> Phase:
    """The VAE over one clip, in tiles or whole, as precomputing will decide where nothing else is on the GPU."""
    setting, dtype = config.cache.vae_tiling, config.model.torch_dtype()
    pixels = (1, 3, bucket.frames, bucket.height, bucket.width)
    small = setting == "auto" and not must_tile(bucket, dtype, _FREE_ANYWHERE)
    if setting != "off" and not small:
        tiled = _vae(folder, dtype, "encode", pixels, tiled=True)
        free = None if card_bytes is None else card_bytes - tiled.peak.parts["VAE weights"]
        if setting == "on" or free is None or must_tile(bucket, dtype, free):
            return tiled
    return _vae(folder, dtype, "encode", pixels, tiled=False)


@cache
def _vae(
    folder: Path, dtype: torch.dtype, name: Literal["encode", "decode"], shape: tuple[int, ...], *, tiled: bool
) -> Phase:
    """The VAE over one clip (uint8 pixels [1, 3, F, H, W]), or over one sampled video (latents [1, C, F, h, w])."""
    with fake_world() as tracker, torch.no_grad():
        vae = fake_run.empty_vae(folder, dtype)
        if tiled:
            enable_tiling(vae)
        for part in (vae.encoder, vae.decoder):
            tracker.run_once_per_shape(part)
        tracker.name("VAE weights", tensors_of(vae))
        begin = tracker.tick
        if name == "encode":
            tracker.where = "VAE encoder"
            pixels = torch.zeros(shape, dtype=torch.uint8)
            tracker.name("batch", [pixels])
            encode_video(vae, pixels)
        else:
            tracker.where = "VAE decoder"
            ((vae.decode(torch.zeros(shape, dtype=dtype)).sample * 0.5) + 0.5).clamp(0, 1)
        note = "in tiles" if tiled else "whole frames"
        return measure(PHASES[name], tracker.allocations, begin, tracker.tick, {name: begin}, note)


def _run(
    folder: Path, config: RunConfig, bucket: Bucket, layers: int | None, phases: Collection[PhaseName]
) -> Iterator[Phase]:
    """The phases with the transformer in memory. A sampled video is decoded beside what is there between two steps."""
    spec, dtype = spec_of(config.model, shipped=True), config.model.torch_dtype()
    sampled = config.validation.bucket or bucket
    if config.method.kind == "lora":  # weights that there need be none of
        config = config.model_copy(update={"method": config.method.model_copy(update={"init_from": None})})
    # What only the collector would free counts: a peak does not depend on when it runs.
    with fake_world() as tracker, ExitStack() as stack, collector_paused():
        base = placement(config.memory.base)
        transformer = empty_transformer(folder, dtype=dtype, device=CPU, placement=base, layers=layers)
        if config.model.control:
            widen(transformer)
        stack.callback(undo, transformer)  # with its model go what techniques put into registers
        training = TrackedTraining(tracker, spec, config, transformer, dtype)
        if "train" in phases:
            yield training.step(fake_batches(spec, config, bucket, dtype))
        if "sample" in phases:
            tracker.name("VAE weights", tensors_of(vae := fake_run.empty_vae(folder, dtype)))
            yield training.sample(sampled)
            del vae
        between = training.rest()
    if "decode" in phases:
        latents = (1, *latent_shape(spec, sampled))
        decoder = _vae(folder, dtype, "decode", latents, tiled=decodes_in_tiles(sampled, dtype))
        yield _beside(decoder, between)


def _beside(phase: Phase, resting: Phase) -> Phase:
    """A phase that was estimated alone, in a process that holds ``resting`` besides."""

    def more(point: Point) -> Point:
        return Point(point.at, _sum(resting.peak.parts, point.parts))

    return replace(
        phase,
        peak=more(phase.peak),
        pinned=resting.pinned,
        pageable=resting.pageable,
        curve=tuple(map(more, phase.curve)),
        stations={station: more(point) for station, point in phase.stations.items()},
    )
