"""Does the cache hold what a run needs? Asked of recorded manifests alone; no dataset, video or encoder is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.cogvideox import ModelConfig, fingerprint
from finetune.config import RunConfig
from finetune.datasets.cache import Cache, Manifest
from finetune.datasets.entries import DTYPES, Dtype
from finetune.datasets.manifest import FORMAT, KINDS, UNKNOWN, differences, portable
from finetune.datasets.sources import source_files
from finetune.datasets.video import PIXEL_RULE
from finetune.diffusion import DropoutConfig
from finetune.errors import DataError
from finetune.facts import Facts, resolve_pretrained
from finetune.files import digest_of
from finetune.types import Bucket


@dataclass(frozen=True)
class Fingerprints:
    """Which encoders, at which precision."""

    vae: str
    text_encoder: str
    dtype: Dtype
    """``bf16``, ``fp16`` or ``fp32``: what both encoders compute in."""


def full_fingerprints(model: ModelConfig, cache: Cache) -> Fingerprints:
    """Digests of both encoders, fetched from the hub if they live there; file digests are remembered in the cache.

    Raises:
        ModelError: if a component cannot be found.
    """
    folder = resolve_pretrained(model.pretrained, model.revision, components=["vae", "text_encoder", "tokenizer"])
    return Fingerprints(
        vae=fingerprint(folder, "vae", digest_file=cache.digest_file),
        text_encoder=fingerprint(folder, "text_encoder", digest_file=cache.digest_file),
        dtype=dtype_name(model.torch_dtype()),
    )


def local_fingerprints(model: ModelConfig, cache: Cache) -> Fingerprints:
    """The same without fetching anything: ``UNKNOWN`` for an encoder whose files are not all on this machine.

    Training from a complete cache needs neither encoder, and T5 alone is 10 GB.
    """
    folder = _local_folder(model)

    def taken(component: Literal["vae", "text_encoder"]) -> str:
        if folder is None or not _has_weights(folder / component):
            return UNKNOWN
        return fingerprint(folder, component, digest_file=cache.digest_file)

    return Fingerprints(taken("vae"), taken("text_encoder"), dtype_name(model.torch_dtype()))


def _local_folder(model: ModelConfig) -> Path | None:
    folder = Path(model.pretrained)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.pretrained, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _has_weights(folder: Path) -> bool:
    """Whether every shard of a component is there: half of them would give the fingerprint of another model."""
    try:
        indices = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json")]
        shards = {shard for index in indices for shard in index["weight_map"].values()}
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / shard).is_file() for shard in shards) and any(folder.glob("*.safetensors"))


def dtype_name(dtype: torch.dtype) -> Dtype:
    """``bf16`` for ``torch.bfloat16``, and so on."""
    return next(name for name, candidate in DTYPES.items() if candidate == dtype)


def make_request(config: RunConfig, facts: Facts, encoders: Fingerprints) -> dict[str, Any]:
    """Everything that decides which entries a dataset needs, under the names that the configuration has for it.

    Paths are ``Path`` objects (``manifest.portable`` writes them out). Of ``data``, every field counts but those of
    caption and image dropout, which are applied to what the cache holds.
    """
    data = config.data.model_dump(mode="python", exclude=set(DropoutConfig.model_fields))
    samples = config.validation.samples
    images = sorted({sample.image for sample in samples if sample.image} if facts.image_to_video else ())
    return {
        "format": {"cache": FORMAT, "pixels": PIXEL_RULE},
        "data": {**data, "fps": config.data.fps or facts.native_fps},
        "model": {
            "vae": encoders.vae,
            "text_encoder": encoders.text_encoder,
            "dtype": encoders.dtype,
            "max_text_seq_length": facts.max_text_seq_length,
            "image_to_video": facts.image_to_video,
        },
        "cache": {
            "latents_dtype": config.cache.latents_dtype,
            "image_draws": config.cache.image_draws if facts.image_to_video else None,
        },
        "validation": {
            "prompts": sorted({sample.prompt for sample in samples}),
            "images": images,
            "bucket": str(sample_bucket(config)) if images else None,
        },
    }


def sample_bucket(config: RunConfig) -> Bucket:
    """The shape of validation videos."""
    return config.validation.bucket or config.data.buckets[0]


# ---------------------------------------------------------------------------------------------------------- answer


@dataclass(frozen=True)
class Answer:
    """What the cache has for a request."""

    manifest: Manifest | None
    """The manifest of this very request, or None."""
    faults: tuple[str, ...] = ()
    """Why it cannot be used: fields that differ, files that changed, entries that are gone. Empty if it can."""
    absent: tuple[str, ...] = ()
    """Files it was made from that are not on this machine; it can be used if that is meant to be so."""
    unknown: tuple[str, ...] = ()
    """Encoders that are not on this machine, so that nobody knows whether they are the ones it was made with."""


def find_manifest(config: RunConfig, facts: Facts, cache: Cache) -> Answer:
    """Look for a manifest that answers this configuration, and say what stands against it.

    Raises:
        CacheError: if a manifest cannot be read.
        ModelError: if the dtype of the model cannot be told.
    """
    encoders = local_fingerprints(config.model, cache)
    request = make_request(config, facts, encoders)
    candidates = sorted(_compare(request, config.base, cache), key=lambda candidate: candidate.rank)
    if not candidates:
        return Answer(None, (f"nothing has been precomputed in {cache.root} yet",))
    nearest = candidates[0]
    if nearest.differences:
        return Answer(None, nearest.differences)
    manifest = cache.read_manifest(nearest.path, nearest.base)
    faults, absent = [], []
    if not manifest.complete:
        faults.append("precompute was begun for this configuration and not finished")
    for path, stamp in manifest.inputs.items():
        unchanged = cache.is_unchanged(Path(path), stamp)
        if unchanged is None:
            absent.append(path)
        elif not unchanged:
            faults.append(f"{path} has changed")
    faults += [f"{path} is new" for path in _sources_now(config) if path not in manifest.inputs]
    for kind in KINDS:
        if gone := manifest.keys(kind) - cache.keys(kind):
            faults.append(f"{len(gone)} of {len(manifest.keys(kind))} entries under {cache.root / kind} are missing")
    named = (("vae", encoders.vae), ("text_encoder", encoders.text_encoder))
    unknown = tuple(component for component, value in named if value == UNKNOWN)
    return Answer(manifest, tuple(faults), tuple(absent), unknown)


def _sources_now(config: RunConfig) -> list[str]:
    """The files and folders that decide what is read today; none where the sources are not on this machine."""
    try:
        return [str(path) for path in source_files(config.data.sources, config.base)]
    except DataError:
        return []


@dataclass(frozen=True)
class _Candidate:
    path: Path
    base: Path
    differences: tuple[str, ...]
    complete: bool
    last_used: float

    @property
    def rank(self) -> tuple[int, bool, float]:
        return len(self.differences), not self.complete, -self.last_used


def _compare(request: dict[str, Any], base: Path, cache: Cache) -> Iterator[_Candidate]:
    """Every manifest and how its request differs, with paths taken from our base folder or from the one it was made in.

    Both, because a project may be moved as a whole (same relative paths), and its resolved configuration may be used
    from the run's folder (same absolute paths).
    """
    exact = cache.root / "manifests" / f"{digest_of(portable(request, base))}.json"
    for path, content in cache.manifests(only=exact if exact.is_file() else None):
        for start in dict.fromkeys((base, Path(content["base"]))):
            found = differences(content["request"], portable(request, start))
            yield _Candidate(path, start, tuple(found), content["complete"], path.stat().st_mtime)
