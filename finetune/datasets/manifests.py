"""Manifests: which entries of a cache a configuration needs, in which order, and which files they were made from.

A *request* is everything in a configuration and a model that decides what is encoded. A manifest answers one, and is
trusted as long as its request and its files are what they were, so that training starts without opening a video, a
dataset file or an encoder. ``docs/cache.md`` describes the files for other tools.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from finetune.core.checksums import canonical_json, checksummed_json, digest_of, parse_checksummed_json
from finetune.core.errors import CacheError
from finetune.core.types import Bucket
from finetune.datasets.geometry import parse_bucket

FORMAT = 2
"""Of entries and manifests. Part of every content address: a new number re-encodes everything. 1 had no checksums."""

_OPENING_OF_1 = b'{\n "format": 1,'
"""How manifests of format 1 begin. From 2 on all begin with their checksum, in later formats too, so that a damaged
manifest is never taken for one of another format."""

UNKNOWN = "unknown"
"""In a request: a fingerprint that cannot be taken here, because the component's files are not on this machine. It
matches whatever a manifest recorded."""

WARNING = "warning: "
"""How a note begins that is more than advice."""

Kind = Literal["latents", "prompts", "images"]

KINDS: tuple[Kind, ...] = ("latents", "prompts", "images")
"""``latents`` of clips, embeddings of ``prompts``, and ``images`` that validation videos start from."""


@dataclass(frozen=True)
class ManifestItem:
    """One clip of the dataset with its caption: where both are in the cache, and how it takes part in training."""

    clip: str
    """A name for messages, such as ``videos/a.mp4#2``."""
    where: str
    """The row it came from, such as ``metadata.jsonl:17``."""
    caption: str
    """As it was encoded: prefix, suffix and trigger word included."""
    bucket: Bucket
    repeats: float
    holdout: bool
    """Whether it is only ever validated on."""
    latents_key: str
    prompt_key: str
    media_digest: str
    """Digest of the video file's bytes: the identity of the video, whatever its name."""
    # What few datasets have is left out of a manifest's file and digest where it is not there: so older ones hold.
    variants: tuple[tuple[str, str], ...] = ()
    """Further captions, each with the key of its embedding: training takes any of them or ``caption``."""
    caption_dropout: float | None = None
    """In place of the configuration's."""
    weight: float = 1.0
    """What its loss is multiplied by in training."""
    flipped_key: str = ""
    """The entry of the clip mirrored left to right, which training takes half of the time; empty: it is never."""
    prior: bool = False
    """Whether training on it aims at what the base model predicts, not at the clip."""
    unmasked_key: str = ""
    """What ``latents_key`` would be without the clip's mask; empty where it has none."""

    @property
    def content_key(self) -> str:
        """Identity of what is shown: measurements draw their noise by it, so that a mask does not change them."""
        return self.unmasked_key or self.latents_key

    @property
    def latents_keys(self) -> tuple[str, ...]:
        """The entries of the clip: as it is, then mirrored."""
        return (self.latents_key, self.flipped_key) if self.flipped_key else (self.latents_key,)

    @property
    def prompt_keys(self) -> tuple[str, ...]:
        """The embeddings of all its captions, that of ``caption`` first."""
        return self.prompt_key, *(key for _, key in self.variants)

    def with_caption(self, number: int) -> ManifestItem:
        """The clip with its ``number``-th caption, from 0, in the place of the first."""
        if number == 0:
            return self
        caption, prompt_key = self.variants[number - 1]
        return replace(self, caption=caption, prompt_key=prompt_key)

    def extras(self) -> dict[str, Any]:
        """Values that few items have, by field, as far as this one has them."""
        return {name: value for name, default in _extras().items() if (value := getattr(self, name)) != default}

    def to_content(self) -> dict[str, Any]:
        """What a manifest's file says of it."""
        common = {name: value for name, value in vars(self).items() if name not in _extras()}
        return {**common, **self.extras(), "bucket": str(self.bucket)}

    @classmethod
    def from_content(cls, content: Mapping[str, Any], bucket: Bucket) -> ManifestItem:
        """From what a manifest's file says of it."""
        variants = tuple((caption, key) for caption, key in content.get("variants", ()))
        return cls(**{**content, "bucket": bucket, "variants": variants})


@cache
def _extras() -> Mapping[str, Any]:
    """The fields of a ``ManifestItem`` that have a default, and the default."""
    return {one.name: one.default for one in fields(ManifestItem) if one.default is not MISSING}


@dataclass(frozen=True)
class FileStamp:
    """What a file looked like when it was read."""

    size: int
    mtime_ns: int
    """-1 where the file was too young for its time to tell two versions apart: such a stamp is compared by digest."""
    digest: str
    """Of a file's bytes, or of the names in a folder."""


@dataclass(frozen=True)
class Manifest:
    """Paths are absolute here; in its file, those inside the configuration's folder are relative."""

    items: tuple[ManifestItem, ...]
    empty_prompt_key: str
    request: Mapping[str, Any]
    """What was asked for, JSON types only; ``differences`` names what changed between two of them."""
    inputs: Mapping[str, FileStamp]
    """Every file and folder that decided the items, media files included."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Further captions (validation prompts) and the keys of their embeddings."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Further images (validation images), by absolute path, and the keys of their pixels."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Why clips of the dataset are not among the items, and how many."""
    notes: tuple[str, ...] = ()
    """Advice that was given when it was made, such as captions that are cut."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """By bucket: how much of pictures and seconds its clips show, in words. Older manifests do not tell."""
    complete: bool = True
    """False while its entries are being encoded: it then only keeps them from being collected as garbage."""

    @cached_property
    def digest(self) -> str:
        """Identity of the training data: every entry in its order, and how it takes part."""
        rows = [
            [item.latents_key, item.prompt_key, item.repeats, item.holdout, *([extras] if extras else [])]
            for item, extras in ((item, item.extras()) for item in self.items)
        ]
        return digest_of([FORMAT, rows, self.empty_prompt_key])

    @property
    def name(self) -> str:
        """Digest of the request, under which it is filed."""
        return digest_of(self.request)

    def keys(self, kind: Kind) -> set[str]:
        """The entries of one kind that it refers to."""
        if kind == "latents":
            return {key for item in self.items for key in item.latents_keys}
        if kind == "images":
            return set(self.images.values())
        captions = {key for item in self.items for key in item.prompt_keys}
        return captions | {self.empty_prompt_key} | set(self.prompts.values())

    def to_bytes(self, base: Path) -> bytes:
        """Its file: one JSON document with its checksum, with paths in ``base`` written relative to it."""
        content = {
            "format": FORMAT,
            "complete": self.complete,
            "base": str(base),
            "request": self.request,
            "digest": self.digest,
            "items": [item.to_content() for item in self.items],
            "empty_prompt_key": self.empty_prompt_key,
            "prompts": self.prompts,
            "images": {portable(Path(path), base): key for path, key in self.images.items()},
            "inputs": {
                portable(Path(path), base): [stamp.size, stamp.mtime_ns, stamp.digest]
                for path, stamp in self.inputs.items()
            },
            "skipped": self.skipped,
            "notes": self.notes,
            "kept": self.kept,
        }
        return checksummed_json(json.dumps(content, ensure_ascii=False, indent=1))

    @classmethod
    def from_content(cls, content: Mapping[str, Any], base: Path) -> Manifest:
        """From what ``read_content`` gave; relative paths start at ``base``."""
        bucket = cache(parse_bucket)
        return cls(
            items=tuple(ManifestItem.from_content(item, bucket(item["bucket"])) for item in content["items"]),
            empty_prompt_key=content["empty_prompt_key"],
            request=content["request"],
            inputs={
                # As `base / path` is spelled, which takes four times as long; "." is a source that is `base` itself.
                str(base) if path == "." else os.path.join(base, path): FileStamp(*stamp)  # noqa: PTH118
                for path, stamp in content["inputs"].items()
            },
            prompts=content["prompts"],
            images={str(base / path): key for path, key in content["images"].items()},
            skipped=content["skipped"],
            notes=tuple(content["notes"]),
            kept=content.get("kept", {}),
            complete=content["complete"],
        )

    def pending(self) -> Manifest:
        """The same, marked as not encoded yet."""
        return replace(self, complete=False)


def portable(value: Any, base: Path) -> Any:
    """``value`` in JSON types: paths inside ``base`` become relative to it, so that a folder can move as a whole."""
    if isinstance(value, Path):
        return (value.relative_to(base) if value.is_relative_to(base) else value).as_posix()
    if isinstance(value, Mapping):
        return {str(key): portable(entry, base) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [portable(entry, base) for entry in value]
    return value


_ABSENT = object()


def differences(recorded: Any, requested: Any, at: str = "") -> list[str]:
    """What changed between two requests, field by field: ``["data.fps: 8 -> 16"]``; empty if they ask for the same."""
    if requested == UNKNOWN or recorded == requested:
        return []
    if isinstance(recorded, Mapping) and isinstance(requested, Mapping):
        names = sorted(set(recorded) | set(requested))
        pairs = [
            (f"{at}.{name}" if at else name, recorded.get(name, _ABSENT), requested.get(name, _ABSENT))
            for name in names
        ]
    elif _is_list(recorded) and _is_list(requested) and len(recorded) == len(requested):
        pairs = [(f"{at}[{i}]", old, new) for i, (old, new) in enumerate(zip(recorded, requested, strict=True))]
    else:
        return [f"{at}: {_shown(recorded)} -> {_shown(requested)}"]
    return [line for name, old, new in pairs for line in differences(old, new, name)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(nothing)"
    text = canonical_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


class DamagedManifestError(CacheError):
    """A manifest is not, to the bit, what was written."""


def manifest_fault(content: bytes, name: str) -> str:
    """Why a file is not, to the bit, the manifest of this name; empty if it is, or is of the oldest format."""
    try:
        _parse(content, name)
    except ValueError as error:
        return str(error)
    return ""


def _parse(content: bytes, name: str) -> dict[str, Any] | None:
    """What stands in a manifest; None for the oldest format. ValueError says why it is not what was written."""
    if content.startswith(_OPENING_OF_1):
        return None
    parsed = parse_checksummed_json(content)
    if digest_of(parsed["request"]) != name:
        raise ValueError("it is another manifest under this name")
    return parsed


def read_content(path: Path) -> dict[str, Any] | None:
    """What stands in a manifest's file; None for one of an older format, which nothing can use any more.

    Raises:
        DamagedManifestError: if it is not what was written.
        CacheError: if it cannot be read, or is of a newer format, whose entries this version must not touch.
        FileNotFoundError: if it is gone.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CacheError(f"a manifest of the cache cannot be read: {error.strerror}", where=str(path)) from None
    try:
        content = _parse(text, path.stem)
    except ValueError as reason:
        raise DamagedManifestError(
            f"a manifest of the cache is damaged: {reason}",
            where=str(path),
            fix="run `finetune precompute` with its configuration, which makes it anew and encodes nothing twice; or"
            " delete it",
        ) from None
    if content is None:
        return None
    number = content["format"]
    if number > FORMAT:
        raise CacheError(
            f"this cache was written by a newer version of this package (format {number}; this one knows {FORMAT})",
            where=str(path),
            fix="use that version, or another cache.dir",
        )
    return content if number == FORMAT else None
