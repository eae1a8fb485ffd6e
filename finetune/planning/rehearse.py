"""A run's phases on fake tensors: what each holds at its peak, when, and what that is made of.

What is rehearsed is the package's own code: method, memory state, engine, loss, clipping, optimizer. One process is
rehearsed, with a whole model. Optimizer states exist before the measured step, as in every step but the first.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune.config import RunConfig
from finetune.facts import CONFIG_FILES, Facts, json_folder, read_facts
from finetune.files import digest_file
from finetune.memory import undo
from finetune.planning import encoders
from finetune.planning.curve import Phase, Point
from finetune.planning.fakes import empty_transformer, empty_vae, fake_world, tensors_of
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.parts import Part, Through, made
from finetune.planning.training import RESTING, Training, fake_batches
from finetune.types import Bucket


@dataclass(frozen=True)
class Rehearsal:
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


def rehearse(
    config: RunConfig,
    *,
    layers: int | None = None,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
    through: Through = made,
) -> Rehearsal:
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
    facts = read_facts(str(folder))
    bucket = longest_bucket(config, facts)
    found: list[Phase] = []
    if "text" in phases and (text := encoders.text(folder, facts, config)) is not None:
        found += through(text)
    if "encode" in phases:
        found.append(encoders.encode(folder, config, bucket, card_bytes, through))
    videos = bool({"sample", "decode"} & set(phases)) and samples_videos(config)
    if "train" in phases or videos:
        run = through(_run(folder, facts, config, bucket, layers, train="train" in phases, videos=videos))
        found += [phase for phase in run if phase.name != RESTING]
        if "decode" in phases and videos:
            sampled = config.validation.bucket or bucket
            (decoder,) = through(encoders.decode(folder, facts, config.model.torch_dtype(), sampled))
            found += [_beside(decoder, phase) for phase in run if phase.name == RESTING]
    wanted = {PHASES[name] for name in phases}
    return Rehearsal(tuple(phase for phase in found if phase.name in wanted), str(bucket), facts.tokens(bucket))


def longest_bucket(config: RunConfig, facts: Facts) -> Bucket:
    """The bucket with the longest sequence, which needs the most memory."""
    return max(config.data.buckets, key=facts.tokens)


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
    folder: Path, facts: Facts, config: RunConfig, bucket: Bucket, layers: int | None, *, train: bool, videos: bool
) -> Part:
    """The phases with the transformer in them; with ``videos`` also ``RESTING``, beside which one is decoded."""
    dtype = config.model.torch_dtype()

    def make() -> tuple[Phase, ...]:
        found: list[Phase] = []
        with fake_world() as ledger, ExitStack() as stack, _uncollected():
            transformer = empty_transformer(folder, dtype, config.memory, layers)
            stack.callback(undo, transformer)  # with its model go what techniques put into registers
            trained = Training(ledger, facts, config, transformer, dtype)
            if train:
                found.append(trained.step(fake_batches(facts, config, bucket, dtype)))
            if videos:
                found.append(_sampling(trained, empty_vae(folder, dtype), config.validation.bucket or bucket))
                found.append(trained.rest())
        return tuple(found)

    asked = {"layers": layers, "trains": train, "samples": videos}
    return Part({"phase": "run", **asked, **_depends_on(folder, config, bucket)}, make)


def _sampling(trained: Training, vae: nn.Module, bucket: Bucket) -> Phase:
    """With the VAE in memory, which is gone again afterwards."""
    trained.ledger.name(encoders.VAE_WEIGHTS, tensors_of(vae))
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
