"""A run's phases on fake tensors: what each holds at its peak, when, and what that is made of.

What is rehearsed is the package's own code: method, memory state, engine, loss, clipping, optimizer. One process is
rehearsed, with a whole model. Optimizer states exist before the measured step, as in every step but the first.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.cogvideox import encode_video
from finetune.config import RunConfig
from finetune.facts import Facts, json_folder, read_facts
from finetune.memory import undo
from finetune.planning.curve import Phase, Point, measure
from finetune.planning.fakes import empty_text_encoder, empty_transformer, empty_vae, fake_world
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.training import Training, fake_batches, tensors_of
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
    def pinned(self) -> Point:
        """Page-locked host memory at its highest."""
        return max((phase.pinned for phase in self.phases), key=lambda point: point.nbytes)

    @property
    def pageable(self) -> Point:
        """Other host memory that techniques ask for, at its highest."""
        return max((phase.pageable for phase in self.phases), key=lambda point: point.nbytes)


def rehearse(
    config: RunConfig,
    *,
    layers: int | None = None,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
) -> Rehearsal:
    """Rehearse a run; only JSON of the model is read.

    Args:
        config: of the run.
        layers: how many of the transformer's blocks; all if None.
        phases: which; sampling and decoding are left out where the configuration samples nothing.
        card_bytes: device memory there is for tensors, which decides whether the VAE encodes in tiles where
            ``cache.vae_tiling`` is ``auto``; None for tiles.

    Raises:
        ModelError: if the model's JSON cannot be found or used.
        ConfigError: if the method does not fit the model.
    """
    folder = json_folder(config.model.pretrained, config.model.revision)
    config = _local(config, folder)
    facts = read_facts(str(folder))
    dtype = config.model.torch_dtype()
    bucket = max(config.data.buckets, key=facts.tokens)
    found: list[Phase] = []
    if "text" in phases and (folder / "text_encoder" / "config.json").is_file():
        found.append(_text(folder, facts, config, dtype))
    if "encode" in phases:
        found.append(_encode(folder, config, dtype, bucket, card_bytes))
    if {"train", "sample", "decode"} & set(phases):
        found += _train(folder, facts, config, dtype, bucket, layers, phases)
    return Rehearsal(tuple(found), str(bucket), facts.tokens(bucket))


def _local(config: RunConfig, folder: Path) -> RunConfig:
    """The same run from a folder of JSON, without anything that would have to be read."""
    model = config.model.model_copy(update={"pretrained": str(folder), "revision": None})
    method = config.method
    if method.kind == "lora":
        method = method.model_copy(update={"init_from": None})
    return config.model_copy(update={"model": model, "method": method})


# ------------------------------------------------------------------------------------------------------ the encoders


def _text(folder: Path, facts: Facts, config: RunConfig, dtype: torch.dtype) -> Phase:
    with fake_world() as ledger, torch.no_grad():
        encoder, _kept = empty_text_encoder(folder, dtype, config.memory.text_encoder)
        ledger.name("text encoder weights", tensors_of(encoder))
        begin = ledger.tick
        ledger.where = "T5"
        tokens = torch.zeros(config.cache.text_batch_size, facts.max_text_seq_length, dtype=torch.long)
        embeds = encoder(tokens)[0]
        del embeds
        ledger.read_labels()
        note = f"{config.cache.text_batch_size} captions at a time"
        return measure(PHASES["text"], ledger.pieces, begin, ledger.tick, {"encode": begin}, note=note)


def _encode(folder: Path, config: RunConfig, dtype: torch.dtype, bucket: Bucket, card_bytes: int | None) -> Phase:
    setting = config.cache.vae_tiling
    if setting == "auto" and card_bytes is not None:
        whole = _encode_clip(folder, dtype, bucket, tiled=False)
        if whole.peak.nbytes <= card_bytes:
            return whole
    return _encode_clip(folder, dtype, bucket, tiled=setting != "off")


def _encode_clip(folder: Path, dtype: torch.dtype, bucket: Bucket, *, tiled: bool) -> Phase:
    with fake_world() as ledger:
        vae = empty_vae(folder, dtype)
        if tiled:
            vae.enable_tiling()
        ledger.name("VAE weights", tensors_of(vae))
        begin = ledger.tick
        ledger.where = "VAE encoder"
        pixels = torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width, dtype=torch.uint8)
        ledger.name("batch", [pixels])
        posterior = encode_video(vae, pixels)
        del posterior
        note = "in tiles" if tiled else "whole frames"
        return measure(PHASES["encode"], ledger.pieces, begin, ledger.tick, {"encode": begin}, note=note)


def _train(
    folder: Path,
    facts: Facts,
    config: RunConfig,
    dtype: torch.dtype,
    bucket: Bucket,
    layers: int | None,
    phases: Collection[PhaseName],
) -> Iterator[Phase]:
    with fake_world() as ledger, ExitStack() as stack, _uncollected():
        transformer = empty_transformer(folder, dtype, config.memory, layers)
        stack.callback(undo, transformer)  # with its model go what techniques put into registers
        trained = Training(ledger, facts, config, transformer, dtype)
        if "train" in phases:
            yield trained.step(fake_batches(facts, config, bucket, dtype))
        samples = config.validation.samples and config.validation.sample_every is not None
        if samples and {"sample", "decode"} & set(phases):
            sampled = config.validation.bucket or bucket
            vae = empty_vae(folder, dtype)
            ledger.name("VAE weights", tensors_of(vae))
            yield trained.sample(sampled)
            if "decode" in phases:
                yield trained.decode(vae, sampled)


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
