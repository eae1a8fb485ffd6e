"""The phases without the transformer: T5 over captions, the VAE over a clip, the VAE's decoder over a sampled video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.caching.encode import must_tile
from finetune.cogvideox import encode_video
from finetune.config import RunConfig
from finetune.facts import CONFIG_FILES, Facts
from finetune.files import digest_file
from finetune.planning.curve import Phase, measure
from finetune.planning.fakes import empty_text_encoder, empty_vae, fake_world, tensors_of
from finetune.planning.ledger import Ledger
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.parts import Part, Through
from finetune.planning.repeats import rehearsed_once
from finetune.sampling import decodes_in_tiles
from finetune.types import Bucket

VAE_WEIGHTS = "VAE weights"


def text(folder: Path, facts: Facts, config: RunConfig) -> Part | None:
    """T5 over one batch of captions; None where the checkpoint has no T5.

    Args:
        folder: of the checkpoint's JSON.
        facts: of the model.
        config: of the run.
    """
    if not (folder / CONFIG_FILES["text_encoder"]).is_file():
        return None
    captions, length = config.cache.text_batch_size, facts.max_text_seq_length
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
    return Part({"phase": "text", **depends_on}, make)


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


def _encode(folder: Path, dtype: torch.dtype, bucket: Bucket, *, tiled: bool) -> Part:
    def clip(ledger: Ledger, vae: Any) -> None:
        pixels = torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width, dtype=torch.uint8)
        ledger.name("batch", [pixels])
        encode_video(vae, pixels)

    depends_on = {"bucket": str(bucket), "tiled": tiled, **_of_model(folder, "vae", dtype)}
    return Part(
        {"phase": "encode", **depends_on}, lambda: _coded(folder, dtype, "encode", "encoder", clip, tiled=tiled)
    )


def decode(folder: Path, facts: Facts, dtype: torch.dtype, bucket: Bucket) -> Part:
    """The VAE's decoder over one sampled video, without what else is in memory then.

    Args:
        folder: of the checkpoint's JSON.
        facts: of the model.
        dtype: of the VAE.
        bucket: of the video.
    """
    channels, frames, height, width = facts.latent_shape(bucket)
    shape = (1, channels, frames + facts.front_padding(frames), height, width)
    tiled = decodes_in_tiles(bucket, dtype)

    def video(_: Ledger, vae: Any) -> None:
        ((vae.decode(torch.zeros(shape, dtype=dtype)).sample * 0.5) + 0.5).clamp(0, 1)

    depends_on = {"latents": shape, "tiled": tiled, **_of_model(folder, "vae", dtype)}
    return Part(
        {"phase": "decode", **depends_on}, lambda: _coded(folder, dtype, "decode", "decoder", video, tiled=tiled)
    )


def _coded(
    folder: Path, dtype: torch.dtype, name: PhaseName, half: str, run: Callable[[Ledger, Any], None], *, tiled: bool
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
