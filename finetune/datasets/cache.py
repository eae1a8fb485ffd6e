"""A content-addressed store of VAE latents and text embeddings, in safetensors files.

The address of an entry says everything that decides its tensors: the digest of the media's bytes, how the clip is cut,
which encoder at which precision. Its key is the digest of that address, so two clips with one file name stay apart, the
same clip under two names is stored once, and whatever changes is encoded again while everything else is found. Entries
appear whole or not at all and are never changed. ``docs/cache.md`` describes the files for other tools.

Reading needs neither a video decoder nor the ``datasets`` library.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from finetune.datasets import upkeep
from finetune.datasets.entries import DTYPES, Dtype, serialise, split
from finetune.datasets.manifest import FileStamp, Kind, Manifest, ManifestItem
from finetune.datasets.manifest import check_format as _check_format
from finetune.errors import CacheError, DataError
from finetune.files import atomic_write_bytes, atomic_write_text, canonical_json, digest_file, digest_of
from finetune.section import Strict
from finetune.types import CacheEntry

__all__ = ["Cache", "CacheConfig", "FileStamp", "Kind", "Manifest", "ManifestItem"]

YOUNG_S = 2.0
"""A file changed less than this long ago may change again within one tick of its file system's clock (2 s on FAT), with
neither size nor time showing it; its digest is then not remembered."""


class CacheConfig(Strict):
    """Where latents and text embeddings are kept, and how they are made."""

    dir: Path = Path("cache")
    """Folder of the cache; runs and datasets may share one. A relative path starts at the configuration's folder."""
    mode: Literal["auto", "require"] = "auto"
    """What training does when the cache does not hold what it needs: ``auto`` encodes it first, ``require`` stops,
    naming what differs, and accepts that the videos themselves are not on this machine."""
    image_draws: int = Field(4, ge=1, le=64)
    """Image-to-video: how many noise-augmented encodings of each clip's first frame are stored; training picks one at
    random each time."""
    latents_dtype: Dtype = "fp16"
    """Precision of stored latents. fp16 keeps 11 significant bits, far finer than the VAE's own noise; bf16 keeps 8."""
    decode_workers: int | None = Field(None, ge=0, le=64)
    """Processes that decode videos ahead of the encoder; left out: one per two CPU cores, at most 4; 0 for none."""
    text_batch_size: int = Field(8, ge=1, le=1024)
    """Captions that T5 encodes at a time."""
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    """Encode large frames in overlapping tiles, which takes less GPU memory, about 40 % more time, and gives slightly
    different latents. ``auto`` does so only where the GPU's free memory does not hold a whole frame's activations."""


class Cache:
    """One cache folder. Any number of processes may read and write it at the same time.

    Args:
        root: ``CacheConfig.dir``, absolute. It is created by the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: Kind, key: str) -> Path:
        """Where an entry is filed."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: Kind, key: str) -> bool:
        """Whether an entry is there. Entries appear whole, so being there is being complete."""
        return self.path(kind, key).is_file()

    def keys(self, kind: Kind) -> set[str]:
        """Every entry of a kind, by listing folders: far quicker than asking for each, above all on a network drive."""
        return {path.stem for path in self.entries(kind)}

    def entries(self, kind: Kind) -> Iterator[Path]:
        """The files of a kind's entries."""
        return (self.root / kind).glob("??/*.safetensors")

    # ------------------------------------------------------------------------------------------------------- write

    def write_latents(
        self,
        address: Mapping[str, Any],
        mean: Tensor,
        std: Tensor,
        image_latents: Tensor | None,
        *,
        made_with: Mapping[str, Any] | None = None,
    ) -> int:
        """Store one clip's posterior in the dtype its address names.

        Args:
            address: from ``latents_address``.
            mean: [C, F, H, W] before any scaling factor.
            std: the same shape.
            image_latents: [K, C, 1, H, W], image-to-video only.
            made_with: how it was made on this machine (decoder, tiling). Recorded, but no part of the address: an entry
                must not become unusable on another machine.

        Returns:
            Bytes written.

        Raises:
            CacheError: if a value is not finite, in the encoder's output or after rounding to the stored dtype.
        """
        dtype = DTYPES[address["dtype"]]
        tensors = {"latents_mean": mean.to(dtype), "latents_std": std.to(dtype)}
        if image_latents is not None:
            tensors["image_latents"] = image_latents.to(dtype)
        return self._write("latents", address, tensors, {"made_with": canonical_json(made_with or {})})

    def write_prompt(self, address: Mapping[str, Any], embeds: Tensor, *, tokens: int) -> int:
        """Store the embedding [L, D] of one caption as it is, and how many tokens the caption has, uncut.

        Returns and raises as ``write_latents``.
        """
        return self._write("prompts", address, {"prompt_embeds": embeds}, {"tokens": str(tokens)})

    def write_image(self, address: Mapping[str, Any], pixels: Tensor) -> int:
        """Store a validation image, uint8 RGB [3, H, W]. Returns the bytes written."""
        return self._write("images", address, {"pixels": pixels}, {})

    def _write(
        self, kind: Kind, address: Mapping[str, Any], tensors: Mapping[str, Tensor], extra: Mapping[str, str]
    ) -> int:
        key = digest_of(address)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CacheError(
                    f"{name} has values that are not finite in {tensor.dtype}",
                    where=str(self.path(kind, key)),
                    fix="encode in bf16 or fp32 (model.dtype), and store in fp32 (cache.latents_dtype)",
                )
        content = serialise(tensors, {"key": key, "address": canonical_json(address), **extra})
        try:
            atomic_write_bytes(self.path(kind, key), content)
        except OSError as error:
            raise CacheError(
                f"the cache cannot be written: {error.strerror}",
                where=str(self.path(kind, key)),
                fix="make room, or choose another cache.dir; what is encoded already stays",
            ) from error
        return len(content)

    # -------------------------------------------------------------------------------------------------------- read

    def read(self, item: ManifestItem) -> CacheEntry:
        """One clip and its caption.

        Raises:
            CacheError: if an entry is missing or damaged.
        """
        latents = self._read("latents", item.latents_key, of=item.clip)
        return CacheEntry(
            latents_mean=latents["latents_mean"],
            latents_std=latents["latents_std"],
            prompt_embeds=self.read_prompt(item.prompt_key),
            image_latents=latents.get("image_latents"),
        )

    def read_prompt(self, key: str) -> Tensor:
        """The embedding of a caption, [L, D]. Raises as ``read``."""
        return self._read("prompts", key)["prompt_embeds"]

    def prompt_tokens(self, key: str) -> int:
        """How many tokens a stored caption has; above the model's ``max_text_seq_length``, its end is not encoded."""
        with self.path("prompts", key).open("rb") as entry:
            length = int.from_bytes(entry.read(8), "little")
            return int(json.loads(entry.read(length))["__metadata__"]["tokens"])

    def read_image(self, key: str) -> Tensor:
        """The pixels of a validation image, uint8 RGB [3, H, W]. Raises as ``read``."""
        return self._read("images", key)["pixels"]

    def _read(self, kind: Kind, key: str, of: str = "") -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(kind, key)
        where = f"{path} ({of})" if of else str(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise CacheError("a cache entry is missing", where=where, fix="run `finetune precompute`") from None
        try:
            if split(content)[1]["key"] != key:
                raise ValueError("it is another entry under this name")
            tensors: dict[str, Tensor] = load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CacheError(
                f"a cache entry is damaged: {error}",
                where=where,
                fix="run `finetune cache verify --delete`, then `finetune precompute`",
            ) from None
        return tensors

    # --------------------------------------------------------------------------------------------------- manifests

    def save_manifest(self, manifest: Manifest, base: Path) -> Path:
        """File a manifest under its request; paths inside ``base`` are written relative to it."""
        path = self.root / "manifests" / f"{manifest.name}.json"
        atomic_write_text(path, manifest.to_json(base))
        return path

    def manifests(self, *, only: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every manifest file of this format (or ``only`` one) and its JSON.

        Raises:
            CacheError: if one cannot be read, or is of a newer format: its entries must not be taken for garbage.
        """
        for path in [only] if only else sorted((self.root / "manifests").glob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                current = _check_format(content, path)
            except (ValueError, AttributeError) as error:
                raise CacheError(
                    f"a manifest of the cache is damaged: {error}",
                    where=str(path),
                    fix="delete it; `finetune precompute` makes it anew without encoding anything twice",
                ) from None
            if current:
                yield path, content

    def read_manifest(self, path: Path, base: Path) -> Manifest:
        """A manifest from its file; relative paths in it start at ``base``.

        Raises:
            CacheError: if it cannot be read.
        """
        try:
            return Manifest.from_json(path.read_text(encoding="utf-8"), base)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"a manifest of the cache is damaged: {error}", where=str(path), fix="delete it") from None

    # ------------------------------------------------------------------------------------------------------ upkeep

    def verify(self, *, delete: bool = False, progress: bool = False) -> upkeep.VerifyReport:
        """``upkeep.verify``: read every entry and compare it with the digest it carries."""
        return upkeep.verify(self, delete=delete, progress=progress)

    def gc(self, *, delete: bool = False, unused_days: float | None = None) -> upkeep.GcReport:
        """``upkeep.gc``: find, and on demand delete, what no manifest refers to."""
        return upkeep.gc(self, delete=delete, unused_days=unused_days)

    def stats(self) -> upkeep.CacheStats:
        """``upkeep.stats``: count what is there."""
        return upkeep.stats(self)

    # ----------------------------------------------------------------------------------------------------- digests

    def digest_file(self, path: Path) -> str:
        """Digest of a file's bytes, remembered by path, size and time: a touched file is read once more, no more."""
        return self.stamp(path).digest

    def stamp(self, path: Path) -> FileStamp:
        """What a file looks like now; for a folder, the names of the files in it, without those that begin with a dot.

        Raises:
            DataError: if it cannot be read.
        """
        try:
            if path.is_dir():
                names = [entry.name for entry in path.iterdir() if entry.name[0] != "." and entry.is_file()]
                return FileStamp(-1, -1, digest_of(sorted(names)))
            return self._stamp_file(path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None

    def _stamp_file(self, path: Path) -> FileStamp:
        memo = self.root / "digests" / f"{digest_of(str(path.absolute()))}.json"
        status = path.stat()
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
            if (known["size"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
                return FileStamp(status.st_size, status.st_mtime_ns, str(known["digest"]))
        except (OSError, ValueError, KeyError, TypeError):
            known = None  # no memo, or a damaged one
        began_ns = time.time_ns()
        digest = digest_file(path)
        if began_ns - status.st_mtime_ns < YOUNG_S * 1e9:
            return FileStamp(status.st_size, -1, digest)
        stamp = FileStamp(status.st_size, status.st_mtime_ns, digest)
        with suppress(OSError):  # a cache that cannot be written to can still be read
            atomic_write_text(memo, canonical_json({"path": str(path.absolute()), **asdict(stamp)}))
        return stamp

    def is_unchanged(self, path: Path, stamp: FileStamp) -> bool | None:
        """Whether a file or folder is still what ``stamp`` says; None if it is gone. Equal bytes are enough."""
        try:
            status = path.stat()
        except OSError:
            return None
        if stamp.mtime_ns >= 0 and (status.st_size, status.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
            return True
        return self.stamp(path).digest == stamp.digest
