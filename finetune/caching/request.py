"""What a run asks of a cache, and the recorded manifest that answers it: no video and no encoder is opened for that."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.caching.check import named, row_files_of, sample_bucket
from finetune.cogvideox.components import require_plain_index
from finetune.cogvideox.config import DropoutConfig
from finetune.cogvideox.model_files import local_folder, resolve_pretrained
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.config.rules import pin_model
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_of
from finetune.core.collector import collector_paused
from finetune.core.errors import CacheError, DataError, ModelError
from finetune.core.files import from_here
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.decode_pool import PIXEL_RULE
from finetune.datasets.manifests import (
    FORMAT,
    KINDS,
    UNKNOWN,
    DamagedManifestError,
    Manifest,
    differences,
    portable,
    read_content,
)
from finetune.datasets.rows import MediaPlace
from finetune.datasets.samples import source_files
from finetune.datasets.sources import source_since

_PLANNING_RULES = 1
"""By which headers are read and captions cleaned. Another number has every dataset planned anew; what is encoded anew
is only what then has another address."""


def encoding_of(config: RunConfig, spec: ModelSpec, cache: Cache, *, fetch: bool) -> Encoding:
    """How a run's clips and captions are encoded; digests of files are remembered in the cache.

    Args:
        config: the run's configuration.
        spec: of its model.
        cache: what is filled.
        fetch: take encoders from the hub if they live there. Without it, the fingerprint of one whose files are not all
            on this machine is ``UNKNOWN``: training from a complete cache needs neither, and T5 alone is 10 GB.

    Raises:
        ModelError: if an encoder is to be fetched and cannot be found, or the model's dtype cannot be told.
    """
    from finetune.cogvideox.load import fingerprint  # which imports torch

    model = config.model
    if fetch:
        parts = ["vae", "text_encoder", "tokenizer"]
        folder: Path | None = resolve_pretrained(model.pretrained, model.revision, components=parts)
    else:
        folder = local_folder(model.pretrained, model.revision)

    def digest(component: Literal["vae", "text_encoder"], form: str = "") -> str:
        if folder is None or not (fetch or _has_weights(folder / component)):
            return UNKNOWN
        return fingerprint(folder, component, digest_file=cache.digest_file, form=form)

    return Encoding(
        vae=digest("vae"),
        # Streamed embeddings are the same to the bit, and those of a cache from before there was a choice.
        text_encoder=digest("text_encoder", "int8" if config.memory.text_encoder == "int8" else ""),
        dtype=model.dtype_name(),
        max_length=spec.max_text_seq_length,
        latents_dtype=config.cache.latents_dtype,
        image_draws=config.cache.image_draws if spec.image_to_video else None,
        pixel_rule=PIXEL_RULE,
        condition_frames=config.data.condition_frames.stored if spec.image_to_video else None,
    )


def _has_weights(folder: Path) -> bool:
    """Whether every shard of a component is there: half of them would give the fingerprint of another model."""
    try:
        shards = [name for path in folder.glob("*.safetensors.index.json") for name in require_plain_index(path)]
    except ModelError:
        return False
    return all((folder / shard).is_file() for shard in shards) and any(folder.glob("*.safetensors"))


def make_request(config: RunConfig, spec: ModelSpec, encoding: Encoding, streams: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that decides which entries a dataset needs, under the names that the configuration has for it.

    Paths are ``Path`` objects (``portable`` writes them out). Of ``data``, every field counts but those of
    caption and image dropout, which are applied to what the cache holds. ``streams`` are the identities of those
    sources that are read as streams; how much of them may lie on the disk does not count.
    """
    data = config.data.model_dump(mode="python", exclude=set(DropoutConfig.model_fields))
    if data["unreadable_captions"] == "warn":  # what was done before there was a choice: such manifests still answer
        del data["unreadable_captions"]
    if data["image_buckets"] is None:  # likewise
        del data["image_buckets"]
    data["sources"] = [
        {
            name: value
            for name, value in source.items()
            if name != "stream_room" and source_since(source["kind"]).get(name, _NEW) != value
        }
        for source in data["sources"]
    ]
    samples = config.validation.samples
    images = sorted({image for sample in samples for image in sample.images} if spec.image_to_video else ())
    further = encoding.condition_frames
    companions = [name for name in row_files_of(config, spec) if name != "image"]
    controls = sorted({sample.control for sample in samples if sample.control} if spec.control else ())
    return {
        "format": {"cache": FORMAT, "pixels": encoding.pixel_rule, "headers": _PLANNING_RULES},
        "data": {**data, "fps": config.data.fps or spec.native_fps},
        "model": {
            "vae": encoding.vae,
            "text_encoder": encoding.text_encoder,
            "dtype": encoding.dtype,
            "max_text_seq_length": encoding.max_length,
            "image_to_video": spec.image_to_video,
        },
        "cache": {
            "latents_dtype": encoding.latents_dtype,
            "image_draws": encoding.image_draws,
            **({"condition_frames": further} if further else {}),
        },
        "validation": {
            "prompts": sorted({sample.prompt for sample in samples}),
            "images": images,
            "bucket": str(sample_bucket(config)) if images or controls else None,
            **({"controls": controls} if controls else {}),
        },
        **({"streams": list(streams)} if streams else {}),
        **({"companions": companions} if companions else {}),
    }


_NEW = object()


def stream_identities(config: RunConfig, *, recorded: bool) -> list[str]:
    """What tells whether the streams among the sources are what they were.

    Args:
        config: of the run.
        recorded: as they were listed when they were read last; else as they are now, and ``UNKNOWN`` for one that is on
            the hub, or is not on this machine.
    """
    identities = []
    for source in config.data.sources:
        if (stream := source.stream(config.base)) is not None:
            listing = (
                stream.recorded(MediaPlace.of(config.cache.dir).records, config.base) if recorded else stream.current()
            )
            identities.append(UNKNOWN if listing is None else listing.identity)
    return identities


@collector_paused()
def find_manifest(config: RunConfig, spec: ModelSpec, cache: Cache) -> Manifest | None:
    """The manifest that answers a configuration; None, and why is printed, if something has to be planned or encoded.

    Recorded manifests alone are asked; no dataset, video or encoder is opened. A damaged one is moved aside with a
    warning in mode ``auto``: the one that is made anew finds its entries.

    Raises:
        CacheError: if none answers and ``cache.mode`` is ``require``, naming what differs or which one is damaged; if
            source files are gone and it is ``auto``; or if a manifest cannot be read.
        ModelError: if the dtype of the model cannot be told.
    """
    encoding = encoding_of(config, spec, cache, fetch=False)
    request = make_request(config, spec, encoding, stream_identities(config, recorded=False))
    require = config.cache.mode == "require"
    contents, damaged = _read_manifests(
        [cache.root / "manifests" / f"{digest_of(portable(request, config.base))}.json"]
    )
    if not any(contents.values()):
        contents, damaged = _read_manifests(cache.manifest_paths())
    if require:  # the videos need not be here to read their headers again
        request["format"]["headers"] = UNKNOWN
    nearest = min(_candidates(request, config.base, contents), key=lambda one: one.rank, default=None)
    if not require:
        _move_aside(damaged, cache)
    elif damaged and (nearest is None or nearest.differences):
        raise next(iter(damaged.values()))
    manifest = None
    absent: list[str] = []
    if nearest is None:
        old = f"; {len(contents)} manifests of an older format, without checksums, are of no use any more"
        faults = [f"nothing has been precomputed in {cache.root} yet{old if contents else ''}"]
    elif nearest.differences:
        faults = nearest.differences
    else:
        manifest = Manifest.from_content(nearest.content, nearest.base)
        faults, absent = _changes(manifest, config, cache)
    if faults and require:
        raise CacheError(
            "the cache does not hold what this run needs, and cache.mode is require\n" + _listed(faults),
            where=str(cache.root),
            fix="run `finetune precompute` where the videos and the encoders are, or set cache.mode: auto",
        )
    if manifest is None or faults:
        print(f"cache {from_here(cache.root)} has to be brought up to date:\n{_listed(faults)}", flush=True)
        return None
    if absent and not require:
        raise CacheError(
            f"files that the cache was made from are not on this machine: {named(absent)}",
            where=str(cache.root),
            fix="bring them back, or set cache.mode: require to train from the cache alone",
        )
    with suppress(OSError):  # `gc --unused-days` goes by this time; a cache may be read-only
        os.utime(cache.root / "manifests" / f"{manifest.name}.json")
    val = sum(item.holdout for item in manifest.items)
    counts = f"complete, {len(manifest.items)} clips ({val} held out), nothing to encode"
    print(f"cache {from_here(cache.root)}: {counts}", flush=True)
    if absent:
        print(f"note: source files are not on this machine and were not compared: {named(absent)}", flush=True)
    if manifest.request["format"].get("headers") != _PLANNING_RULES:
        print(
            "warning: an older version read the videos' headers. If some are upside-down, stretched, interlaced, HDR or"
            " transparent, run `finetune precompute` where the videos are: it encodes those anew and no other",
            flush=True,
        )
    if unknown := [name for name in ("vae", "text_encoder") if getattr(encoding, name) == UNKNOWN]:
        print(f"note: not on this machine and not compared: {', '.join(unknown)}", flush=True)
    return manifest


def require_manifest(config: RunConfig, cache: Cache) -> Manifest:
    """The complete manifest that answers a configuration, whose ``memory`` says what is done.

    Raises:
        CacheError: if there is none. Otherwise as ``find_manifest``.
    """
    config = pin_model(config)
    manifest = find_manifest(config, spec_of(config.model), cache)
    if manifest is None:
        what = "the cache does not hold what this configuration needs"
        raise CacheError(what, where=str(cache.root), fix="run `finetune precompute` with it first")
    return manifest


_Contents = dict[Path, dict[str, Any] | None]
"""What stands in manifests, by their files; None for one of an older format."""


def _read_manifests(paths: Iterable[Path]) -> tuple[_Contents, dict[Path, DamagedManifestError]]:
    contents: _Contents = {}
    damaged = {}
    for path in paths:
        try:
            with suppress(FileNotFoundError):
                contents[path] = read_content(path)
        except DamagedManifestError as error:
            damaged[path] = error
    return contents, damaged


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
class _Candidate:
    """A manifest's content, with its paths taken from one folder, beside a request."""

    content: Mapping[str, Any]
    base: Path
    differences: list[str]
    rank: tuple[int, bool, float]
    """The fewest differences first, then complete ones, then the one that was used last."""


def _candidates(request: dict[str, Any], base: Path, contents: _Contents) -> Iterator[_Candidate]:
    """Every manifest, with paths taken from our base folder and from the one it was made in.

    Both, because a project may be moved as a whole (same relative paths), and its resolved configuration may be used
    from the run's folder (same absolute paths).
    """
    for path, content in contents.items():
        if content is not None:
            used_at = path.stat().st_mtime if path.exists() else 0.0
            for start in dict.fromkeys((base, Path(content["base"]))):
                changes = differences(content["request"], portable(request, start))
                yield _Candidate(content, start, changes, (len(changes), not content["complete"], -used_at))


def _changes(manifest: Manifest, config: RunConfig, cache: Cache) -> tuple[list[str], list[str]]:
    """Why a manifest of this very request cannot be used; and files it was made from that are not on this machine."""
    faults, absent = [], []
    if not manifest.complete:
        faults.append("precompute was begun for this configuration and not finished")
    for path, stamp in manifest.inputs.items():
        unchanged = cache.is_unchanged(path, stamp)
        if unchanged is None:
            absent.append(path)
        elif not unchanged:
            faults.append(f"{path} has changed")
    with suppress(DataError):  # the sources may not be on this machine
        sources = map(str, source_files(config.data.sources, config.base))
        faults += [f"{path} is new" for path in sources if path not in manifest.inputs]
    for kind in KINDS:
        if missing := manifest.keys(kind) - cache.keys(kind):
            faults.append(f"{len(missing)} of {len(manifest.keys(kind))} entries under {cache.root / kind} are missing")
    return faults, absent


def _listed(lines: Sequence[str], limit: int = 12) -> str:
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([*(f"  {line}" for line in lines[:limit]), *more])
