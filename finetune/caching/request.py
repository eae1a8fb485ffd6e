"""Does the cache hold what a run needs? Asked of recorded manifests alone; no dataset, video or encoder is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.cogvideox.components import require_plain_index
from finetune.cogvideox.config import DropoutConfig, ModelConfig
from finetune.cogvideox.model_files import canonical_name, id_in_cache, resolve_pretrained
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_of
from finetune.core.errors import DataError, ModelError
from finetune.core.types import Bucket, DtypeName
from finetune.datasets.cache import Cache
from finetune.datasets.cache_entries import (
    FORMAT,
    KINDS,
    UNKNOWN,
    DamagedManifestError,
    Manifest,
    differences,
    portable,
    read_content,
)
from finetune.datasets.decode_pool import PIXEL_RULE
from finetune.datasets.sources import source_files
from finetune.memory.config import TextEncoder

_HEADERS = 1
"""Of the rules by which headers are read. Another number has every dataset planned anew; what is encoded anew is only
what then has another address."""


@dataclass(frozen=True)
class Fingerprints:
    """Which encoders, at which precision."""

    vae: str
    text_encoder: str
    dtype: DtypeName
    """``bf16``, ``fp16`` or ``fp32``: what both encoders compute in."""


def full_fingerprints(model: ModelConfig, cache: Cache, text_encoder: TextEncoder = "device") -> Fingerprints:
    """Digests of both encoders, fetched from the hub if they live there; file digests are remembered in the cache.

    Args:
        model: whose they are.
        cache: what they fill.
        text_encoder: how T5 is held while it encodes.

    Raises:
        ModelError: if a component cannot be found.
    """
    from finetune.cogvideox.load import fingerprint  # which imports torch

    folder = resolve_pretrained(model.pretrained, model.revision, components=["vae", "text_encoder", "tokenizer"])
    return Fingerprints(
        vae=fingerprint(folder, "vae", digest_file=cache.digest_file),
        text_encoder=fingerprint(folder, "text_encoder", digest_file=cache.digest_file, form=_form(text_encoder)),
        dtype=model.dtype_name(),
    )


def local_fingerprints(model: ModelConfig, cache: Cache, text_encoder: TextEncoder = "device") -> Fingerprints:
    """The same without fetching anything: ``UNKNOWN`` for an encoder whose files are not all on this machine.

    Training from a complete cache needs neither encoder, and T5 alone is 10 GB.
    """
    from finetune.cogvideox.load import fingerprint  # which imports torch

    folder = local_folder(model)

    def taken(component: Literal["vae", "text_encoder"]) -> str:
        if folder is None or not _has_weights(folder / component):
            return UNKNOWN
        form = _form(text_encoder) if component == "text_encoder" else ""
        return fingerprint(folder, component, digest_file=cache.digest_file, form=form)

    return Fingerprints(taken("vae"), taken("text_encoder"), model.dtype_name())


def _form(text_encoder: TextEncoder) -> str:
    # Streamed embeddings are the same to the bit, and those of a cache from before there was a choice.
    return text_encoder if text_encoder == "int8" else ""


def local_folder(model: ModelConfig) -> Path | None:
    """Where a checkpoint's files are on this machine, so far as they are; None if none of them is."""
    folder = Path(model.pretrained)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        repo = id_in_cache(canonical_name(model.pretrained))
        return Path(snapshot_download(repo, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _has_weights(folder: Path) -> bool:
    """Whether every shard of a component is there: half of them would give the fingerprint of another model."""
    try:
        shards = [name for path in folder.glob("*.safetensors.index.json") for name in require_plain_index(path)]
    except ModelError:
        return False
    return all((folder / shard).is_file() for shard in shards) and any(folder.glob("*.safetensors"))


def make_request(config: RunConfig, spec: ModelSpec, encoders: Fingerprints) -> dict[str, Any]:
    """Everything that decides which entries a dataset needs, under the names that the configuration has for it.

    Paths are ``Path`` objects (``portable`` writes them out). Of ``data``, every field counts but those of
    caption and image dropout, which are applied to what the cache holds.
    """
    data = config.data.model_dump(mode="python", exclude=set(DropoutConfig.model_fields))
    if data["unreadable_captions"] == "warn":  # what was done before there was a choice: such manifests still answer
        del data["unreadable_captions"]
    samples = config.validation.samples
    images = sorted({sample.image for sample in samples if sample.image} if spec.image_to_video else ())
    return {
        "format": {"cache": FORMAT, "pixels": PIXEL_RULE, "headers": _HEADERS},
        "data": {**data, "fps": config.data.fps or spec.native_fps},
        "model": {
            "vae": encoders.vae,
            "text_encoder": encoders.text_encoder,
            "dtype": encoders.dtype,
            "max_text_seq_length": spec.max_text_seq_length,
            "image_to_video": spec.image_to_video,
        },
        "cache": {
            "latents_dtype": config.cache.latents_dtype,
            "image_draws": config.cache.image_draws if spec.image_to_video else None,
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


# ---------------------------------------------------------------------------------------- the manifest that answers it


@dataclass(frozen=True)
class ManifestMatch:
    """What the cache has for a request."""

    manifest: Manifest | None
    """The manifest of this very request, or None."""
    faults: tuple[str, ...] = ()
    """Why it cannot be used: fields that differ, files that changed, entries that are gone. Empty if it can."""
    absent: tuple[str, ...] = ()
    """Files it was made from that are not on this machine; it can be used if that is meant to be so."""
    unknown: tuple[str, ...] = ()
    """Encoders that are not on this machine, so that nobody knows whether they are the ones it was made with."""
    outdated: bool = False
    """Whether headers were read by an older version's rules, which took videos that are not plain for plain ones."""


def find_manifest(config: RunConfig, spec: ModelSpec, cache: Cache) -> ManifestMatch:
    """Look for a manifest that answers this configuration, and say what stands against it.

    A damaged manifest is moved aside with a warning in mode ``auto``: the one that is made anew finds its entries.

    Raises:
        CacheError: if a manifest cannot be read; or if one is damaged, no other answers, and ``cache.mode`` is
            ``require``.
        ModelError: if the dtype of the model cannot be told.
    """
    encoders = local_fingerprints(config.model, cache, config.memory.text_encoder)
    request = make_request(config, spec, encoders)
    exact = cache.root / "manifests" / f"{digest_of(portable(request, config.base))}.json"
    manifests = _read_manifests([exact])
    if not manifests.contents:
        manifests = _read_manifests(cache.manifest_paths())
    if config.cache.mode == "require":  # the videos need not be here to read their headers again
        request["format"]["headers"] = UNKNOWN
    nearest = min(_compare(request, config.base, manifests.contents), key=_distance, default=None)
    if config.cache.mode == "auto":
        _move_aside(manifests.damaged, cache)
    elif manifests.damaged and (nearest is None or nearest.differences):
        raise next(iter(manifests.damaged.values()))
    if nearest is None:
        count = manifests.outdated
        outdated = f"; {count} manifests of an older format, without checksums, are of no use any more" if count else ""
        return ManifestMatch(None, (f"nothing has been precomputed in {cache.root} yet{outdated}",))
    if nearest.differences:
        return ManifestMatch(None, nearest.differences)
    manifest = Manifest.from_content(nearest.content, nearest.base)
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
        if missing := manifest.keys(kind) - cache.keys(kind):
            faults.append(f"{len(missing)} of {len(manifest.keys(kind))} entries under {cache.root / kind} are missing")
    fingerprints = (("vae", encoders.vae), ("text_encoder", encoders.text_encoder))
    unknown = tuple(component for component, value in fingerprints if value == UNKNOWN)
    outdated_headers = manifest.request["format"].get("headers") != _HEADERS
    return ManifestMatch(manifest, tuple(faults), tuple(absent), unknown, outdated_headers)


def _sources_now(config: RunConfig) -> list[str]:
    """The files and folders that decide what is read today; none where the sources are not on this machine."""
    try:
        return [str(path) for path in source_files(config.data.sources, config.base)]
    except DataError:
        return []


@dataclass
class _Manifests:
    contents: dict[Path, Mapping[str, Any]] = field(default_factory=dict)
    damaged: dict[Path, DamagedManifestError] = field(default_factory=dict)
    outdated: int = 0
    """How many are of an older format."""


def _read_manifests(paths: Iterable[Path]) -> _Manifests:
    manifests = _Manifests()
    for path in paths:
        try:
            content = read_content(path)
        except FileNotFoundError:
            continue
        except DamagedManifestError as error:
            manifests.damaged[path] = error
            continue
        if content is None:
            manifests.outdated += 1
        else:
            manifests.contents[path] = content
    return manifests


def _move_aside(damaged: Mapping[Path, DamagedManifestError], cache: Cache) -> None:
    for path, error in damaged.items():
        try:
            aside = cache.move_manifest_aside(path)
            print(
                f"warning: {error.what}: moved aside as {aside}. The entries that it referred to stay, and are found"
                " again by the run it belongs to",
                flush=True,
            )
        except OSError:  # a cache that is read-only may still hold another that answers
            print(f"warning: {error.what}: {path}", flush=True)


@dataclass(frozen=True)
class _Comparison:
    content: Mapping[str, Any]
    base: Path
    differences: tuple[str, ...]
    used_at: float


def _compare(request: dict[str, Any], base: Path, contents: Mapping[Path, Mapping[str, Any]]) -> Iterator[_Comparison]:
    """How every manifest's request differs, with paths taken from our base folder or from the one it was made in.

    Both, because a project may be moved as a whole (same relative paths), and its resolved configuration may be used
    from the run's folder (same absolute paths).
    """
    for path, content in contents.items():
        used_at = path.stat().st_mtime if path.exists() else 0.0
        for start in dict.fromkeys((base, Path(content["base"]))):
            changes = differences(content["request"], portable(request, start))
            yield _Comparison(content, start, tuple(changes), used_at)


def _distance(comparison: _Comparison) -> tuple[int, bool, float]:
    """The fewest differences first, then complete ones, then the one that was used last."""
    return len(comparison.differences), not comparison.content["complete"], -comparison.used_at
