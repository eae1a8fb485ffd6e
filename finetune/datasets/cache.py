"""A content-addressed store of VAE latents and text embeddings, in safetensors files.

The address of an entry says everything that decides its tensors: the digest of the media's bytes, how the clip is cut,
which encoder at which precision. Its key is the digest of that address, so two clips with one file name stay apart, the
same clip under two names is stored once, and whatever changes is encoded again while everything else is found. Entries
appear whole or not at all and are never changed. ``docs/cache.md`` describes the files for other tools.

Reading needs neither a video decoder nor the ``datasets`` library.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import Field

from finetune.cogvideox.model_files import hub_sha256
from finetune.core import locks
from finetune.core.checksums import canonical_json, checksummed_json, digest_file, digest_of, parse_checksummed_json
from finetune.core.errors import CacheError, DataError
from finetune.core.files import atomic_write_bytes, disk_fix, free_space, human_size
from finetune.core.types import CacheEntry, DtypeName, Strict, torch_dtype
from finetune.datasets.cache_entries import (
    FileStamp,
    Kind,
    Manifest,
    ManifestItem,
    fault_of,
    manifest_fault,
    move_aside,
    read_content,
    read_metadata,
    read_tensors,
    serialise,
)

if TYPE_CHECKING:
    from torch import Tensor

YOUNG_S = 2.0
"""A file changed less than this long ago may change again within one tick of its file system's clock (2 s on FAT), with
neither size nor time showing it; its digest is then not remembered."""

_ENCODE_AGAIN = (
    "run the same command again: it encodes that entry anew. With cache.mode: require, run `finetune precompute` where"
    " the videos and the encoders are, first"
)


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
    latents_dtype: DtypeName = "fp16"
    """Precision of stored latents. fp16 keeps 11 significant bits, far finer than the VAE's own noise; bf16 keeps 8."""
    decode_workers: int | None = Field(None, ge=0, le=64)
    """Processes that decode videos ahead of the encoder; left out: one per two CPU cores, at most 4. 0 decodes in the
    main process, without limits on memory and time, where a damaged file can end the run: for files you made."""
    text_batch_size: int = Field(8, ge=1, le=1024)
    """Captions that T5 encodes at a time."""
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    """Encode large frames in overlapping tiles, which takes less GPU memory, about 40 % more time, and gives slightly
    different latents. ``auto`` does so only where the GPU's free memory does not hold a whole frame's activations."""


class Cache:
    """One cache folder. Any number of processes and threads may read and write it at the same time.

    Args:
        root: ``CacheConfig.dir``, absolute. It is created by the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: dict[str, tuple[int, int, int]] = {}
        """Of every entry that was found whole: inode, size and time of change, by its key."""

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

    @property
    def lock(self) -> Path:
        """Its lock file: shared by jobs, exclusive for ``gc``."""
        return self.root / "lock"

    @contextmanager
    def in_use(self, user: str, *, quiet: bool = False) -> Iterator[None]:
        """Keep ``gc`` from deleting anything for as long as the block runs; to be entered before entries are listed.

        Waits for a collection that is under way. A cache that cannot be locked is used all the same, with a note.

        Args:
            user: what uses it, for messages.
            quiet: print nothing.
        """

        def note(text: str) -> None:
            if not quiet:
                print(f"note: {text}", flush=True)

        with ExitStack() as lock:
            try:
                lock.enter_context(
                    locks.hold(
                        self.lock, user, shared=True, waiting=lambda gc: note(f"waiting for {gc}, in {self.root}")
                    )
                )
            except OSError as error:
                note(
                    f"{self.root} cannot be locked ({error.strerror}): `finetune cache gc` does not see that it is used"
                )
            yield

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
        dtype = torch_dtype(address["dtype"])
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
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CacheError(
                    f"{name} has values that are not finite in {tensor.dtype}",
                    where=str(self.path(kind, key)),
                    fix="encode in bf16 or fp32 (model.dtype), and store in fp32 (cache.latents_dtype)",
                )
        content = serialise(tensors, {"key": key, "address": canonical_json(address), **extra})
        self._publish(self.path(kind, key), content)
        return len(content)

    def _publish(self, path: Path, content: bytes) -> None:
        try:
            atomic_write_bytes(path, content)
        except OSError as error:
            free = "an unknown amount"
            with suppress(OSError):
                free = human_size(free_space(path))
            raise CacheError(
                f"the cache cannot be written: {error.strerror}; {human_size(len(content))} to write, {free} free",
                where=str(path),
                fix=f"{disk_fix(error)}; what is encoded already stays",
            ) from error

    # -------------------------------------------------------------------------------------------------------- read

    def read(self, item: ManifestItem) -> CacheEntry:
        """One clip and its caption.

        Raises:
            CacheError: if an entry is missing, cannot be read, or is damaged; it is then moved aside, so that it counts
                as missing from now on.
        """
        latents = self._read("latents", item.latents_key, item.clip)
        return CacheEntry(
            latents_mean=latents["latents_mean"],
            latents_std=latents["latents_std"],
            prompt_embeds=self.read_prompt(item.prompt_key),
            image_latents=latents.get("image_latents"),
        )

    def read_prompt(self, key: str) -> Tensor:
        """The embedding of a caption, [L, D]. Raises as ``read``."""
        return self._read("prompts", key)["prompt_embeds"]

    def read_image(self, key: str) -> Tensor:
        """The pixels of a validation image, uint8 RGB [3, H, W]. Raises as ``read``."""
        return self._read("images", key)["pixels"]

    def prompt_tokens(self, key: str) -> int:
        """How many tokens a stored caption has; above the model's ``max_text_seq_length``, its end is not encoded.

        Raises as ``read``; only the header is read, and verified.
        """
        with self._open("prompts", key) as entry:
            return int(read_metadata(entry, key)["tokens"])

    def size(self, kind: Kind, key: str) -> int:
        """Bytes of an entry's file. Raises as ``read``."""
        with self._open(kind, key) as entry:
            return os.fstat(entry.fileno()).st_size

    def _read(self, kind: Kind, key: str, clip: str = "", *, again: bool = True) -> dict[str, Tensor]:
        """The tensors of an entry, which is verified when this process first reads its file.

        ``again`` reads once more where another machine has put an equal file in its place (NFS).
        """
        with self._open(kind, key, clip) as entry:
            status = os.fstat(entry.fileno())
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            try:
                tensors = read_tensors(entry, key, verify=self._verified.get(key) != identity)
            except OSError as error:
                if error.errno != errno.ESTALE or not again:
                    raise
                return self._read(kind, key, clip, again=False)
        self._verified[key] = identity
        return tensors

    @contextmanager
    def _open(self, kind: Kind, key: str, clip: str = "") -> Iterator[BinaryIO]:
        """Open an entry, and say in words what is wrong with it. ``clip`` is whose it is, for messages."""
        path = self.path(kind, key)
        where = f"{path} ({clip})" if clip else str(path)
        try:
            with path.open("rb") as entry:
                yield entry
        except FileNotFoundError:
            raise CacheError("a cache entry is missing", where=where, fix=_ENCODE_AGAIN) from None
        except ValueError as error:
            raise self._damaged(kind, key, str(error), where) from None
        except OSError as error:
            raise CacheError(
                f"a cache entry cannot be read: {error.strerror}",
                where=where,
                fix="look at the disk or the network drive, and at the file's permissions; the same command then"
                " continues. A file that stays unreadable is taken out by `finetune cache verify --delete`",
            ) from None

    def _damaged(self, kind: Kind, key: str, reason: str, where: str) -> CacheError:
        """Move a damaged entry aside, so that it counts as missing, and say what is to be done."""
        fix = _ENCODE_AGAIN
        try:
            move_aside(self.path(kind, key), lambda content: fault_of(content, kind, key))
        except OSError as error:
            fix = (
                f"it cannot be moved aside from here ({error.strerror}): where it can, run"
                " `finetune cache verify --delete` and then `finetune precompute`"
            )
        return CacheError(f"a cache entry is damaged: {reason}", where=where, fix=fix)

    # --------------------------------------------------------------------------------------------------- manifests

    def save_manifest(self, manifest: Manifest, base: Path) -> Path:
        """File a manifest under its request; paths inside ``base`` are written relative to it.

        Raises:
            CacheError: if it cannot be written.
        """
        path = self.root / "manifests" / f"{manifest.name}.json"
        self._publish(path, manifest.to_bytes(base))
        for damaged in path.parent.glob(f"{path.name}.*.damaged"):  # made anew
            with suppress(OSError):
                damaged.unlink()
        return path

    def manifest_paths(self) -> list[Path]:
        """Every manifest file."""
        return sorted((self.root / "manifests").glob("*.json"))

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every manifest file of this format and its JSON.

        Raises:
            CacheError: if one cannot be read, is damaged, or is of a newer format: its entries must not be taken for
                garbage.
        """
        for path in self.manifest_paths():
            with suppress(FileNotFoundError):  # dropped since it was listed
                content = read_content(path)
                if content is not None:
                    yield path, content

    def move_manifest_aside(self, path: Path) -> Path:
        """Give a damaged manifest a name that nobody reads, and return it; what it refers to stays (``gc``).

        Raises:
            OSError: if it cannot be renamed.
        """
        return move_aside(path, lambda content: manifest_fault(content, path.stem))

    # ------------------------------------------------------------------------------------------------ source files

    def digest_file(self, path: Path) -> str:
        """Digest of a file's bytes, remembered by path, size and time: a touched file is read once more, no more."""
        return self.stamp(path).digest

    def stamp(self, path: Path) -> FileStamp:
        """What a file looks like now; for a folder, the names of the files in it, without those that begin with a dot.

        Raises:
            DataError: if it cannot be read, or came from the hub and is not what the hub sent.
        """
        try:
            if path.is_dir():
                names = [entry.name for entry in path.iterdir() if entry.name[0] != "." and entry.is_file()]
                return FileStamp(-1, -1, digest_of(sorted(names)))
            return self._stamp_file(path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None

    def _stamp_file(self, path: Path) -> FileStamp:
        name = str(path.absolute())
        memo = self.root / "digests" / f"{digest_of(name)}.json"
        status = path.stat()
        now = {"path": name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        with suppress(OSError, ValueError):  # there is none, or a damaged one: the digest is taken anew
            known = parse_checksummed_json(memo.read_bytes())
            if known.items() >= now.items():
                return FileStamp(status.st_size, status.st_mtime_ns, str(known["digest"]))
        began_ns = time.time_ns()
        digest = _digest_as_sent(path)
        if began_ns - status.st_mtime_ns < YOUNG_S * 1e9:
            return FileStamp(status.st_size, -1, digest)
        stamp = FileStamp(status.st_size, status.st_mtime_ns, digest)
        with suppress(OSError):  # a cache that cannot be written to can still be read
            atomic_write_bytes(memo, checksummed_json(canonical_json({"path": name, **asdict(stamp)})))
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


def _digest_as_sent(path: Path) -> str:
    """``digest_file``; where the file came from the hub, it must be what the hub sent."""
    sent = hub_sha256(path)
    sha256 = hashlib.sha256()
    digest = digest_file(path, *([] if sent is None else [sha256]))
    if sent is not None and sha256.hexdigest() != sent:
        raise DataError(
            f"the file is damaged: its SHA-256 is {sha256.hexdigest()[:12]}..., the hub's is {sent[:12]}...",
            where=str(path),
            fix="delete it and fetch it again (`hf download`); if it was changed on purpose, move it to another folder",
        )
    return digest
