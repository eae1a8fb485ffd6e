"""A content-addressed store of VAE latents and text embeddings, in safetensors files that carry checksums.

The *address* of an entry says everything that decides its tensors: the digest of the media's bytes, how the clip is
cut, which encoder at which precision. Its key is the digest of that address, so two clips with one file name stay
apart, the same clip under two names is stored once, and whatever changes is encoded again while everything else is
found. Entries appear whole or not at all and are never changed. ``docs/cache.md`` describes the files for other tools.

Reading needs neither a video decoder nor the ``datasets`` library.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import Field

from finetune.cogvideox.config import StoredFrames
from finetune.cogvideox.model_files import hub_sha256
from finetune.core import locks
from finetune.core.checksums import canonical_json, checksummed_json, digest_file, digest_of, parse_checksummed_json
from finetune.core.errors import CacheError, DataError
from finetune.core.files import atomic_write_bytes, disk_fix, free_space, human_size
from finetune.core.types import (
    Bucket,
    CacheEntry,
    ClipPlan,
    CompanionName,
    Decoder,
    DtypeName,
    Strict,
    torch_dtype,
)
from finetune.datasets.entries import fault_of, read_metadata, serialise, tensors_in
from finetune.datasets.manifests import (
    FORMAT,
    KINDS,
    FileStamp,
    Kind,
    Manifest,
    ManifestItem,
    manifest_fault,
    read_content,
)
from finetune.datasets.shards import Shards

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
    random each time. Of the other frames that ``data.condition_frames`` needs, as many each."""
    latents_dtype: DtypeName = "fp16"
    """Precision of stored latents. fp16 keeps 11 significant bits, far finer than the VAE's own noise; bf16 keeps 8."""
    decode_workers: int | None = Field(None, ge=0, le=64)
    """Processes that decode videos ahead of the encoder; left out: one per two CPU cores, at most 4. 0 decodes in the
    main process, without limits on memory and time, where a damaged file can end the run: for files you made."""
    decoder: Decoder = "pyav"
    """What decodes clips. The pixels are the same to the bit, since PyAV decodes what ``decord`` cannot or gives
    otherwise; so the cache is the same too, and PyAV takes less processor time."""
    text_batch_size: int = Field(8, ge=1, le=1024)
    """Captions that T5 encodes at a time."""
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    """Encode large frames in overlapping tiles, which takes less GPU memory, about 40 % more time, and gives slightly
    different latents. ``auto`` does so only where the GPU's free memory does not hold a whole frame's activations."""


# ------------------------------------------------------------------------------------------------------------ addresses


@dataclass(frozen=True)
class Encoding:
    """What decides how a run's clips and captions are encoded, beside themselves; and the address of each entry."""

    vae: str
    """The VAE's fingerprint."""
    text_encoder: str
    """T5's and its tokenizer's."""
    dtype: DtypeName
    """What both compute in, and embeddings are stored in."""
    max_length: int
    """Tokens of a caption."""
    latents_dtype: DtypeName
    """What latents are stored in."""
    image_draws: int | None
    """K for image-to-video, None for text-to-video."""
    pixel_rule: str
    """Names the arithmetic from a decoded frame to pixels."""
    condition_frames: StoredFrames | None = None
    """Which frames beside the first are stored as images, for image-to-video."""

    def latents_address(
        self,
        media: str,
        plan: ClipPlan,
        *,
        image: str | None = None,
        corrections: Sequence[str] = (),
        companions: Mapping[CompanionName, Sequence[str]] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Everything that decides the latents of one clip.

        Args:
            media: digest of the video file's bytes.
            plan: how the clip is cut out of the video, and whether it is mirrored; the latter is left out where it is
                not, so that clips keep the addresses they had before any was.
            image: digest of the image file that stands for the first frame; None where the first frame itself does.
            corrections: what is done to the frames of a video that is not plain. Left out where there is none, so that
                plain videos keep the addresses they had before there were any.
            companions: of what goes with the clip frame for frame, by name, the digest of its file and then its own
                corrections. Left out where there is none. They are cut as the clip is.

        Frames beside the first are left out likewise where none is stored.
        """
        cut = {name: value for name, value in asdict(plan).items() if name != "flip" or value}
        return {
            "kind": "latents",
            "format": FORMAT,
            "media": media,
            "image": image,
            "plan": {**cut, "bucket": str(plan.bucket)},
            "pixels": self.pixel_rule,
            "vae": self.vae,
            "vae_dtype": self.dtype,
            "dtype": self.latents_dtype,
            "image_draws": self.image_draws,
            **({"corrections": list(corrections)} if corrections else {}),
            **({"companions": {name: list(one) for name, one in companions.items()}} if companions else {}),
            **({"condition_frames": self.condition_frames} if self.condition_frames else {}),
        }

    def prompt_address(self, text: str) -> dict[str, Any]:
        """Everything that decides the embedding of one caption."""
        return {
            "kind": "prompts",
            "format": FORMAT,
            "text": text,
            "text_encoder": self.text_encoder,
            "max_length": self.max_length,
            "dtype": self.dtype,
        }

    def image_address(self, image: str, bucket: Bucket) -> dict[str, Any]:
        """Everything that decides the pixels of one validation image; ``image`` is the digest of its file."""
        return {
            "kind": "images",
            "format": FORMAT,
            "image": image,
            "height": bucket.height,
            "width": bucket.width,
            "pixels": self.pixel_rule,
        }

    def control_address(self, control: str, plan: ClipPlan) -> dict[str, Any]:
        """Everything that decides the pixels of one control video of validation; ``control`` is its file's digest."""
        return {
            "kind": "images",
            "format": FORMAT,
            "control": control,
            "plan": {**asdict(plan), "bucket": str(plan.bucket)},
            "pixels": self.pixel_rule,
        }


def stored_frames(which: StoredFrames | None, frames: int) -> range:
    """Which of ``frames`` latent frames an entry holds as single images beside the first: none, the last, or all."""
    return range({None: frames, "last": max(1, frames - 1), "all": 1}[which], frames)


def move_aside(path: Path, fault: Callable[[bytes], str]) -> Path:
    """Give a damaged file a name that nobody reads, ``<name>.<unique>.damaged``, and return it.

    If another process has removed it already, nothing is left to do; if one has written it anew meanwhile, so that
    ``fault`` finds nothing in its content, it keeps its name.

    Raises:
        OSError: if it cannot be renamed, as on a drive that is read-only.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
    with suppress(FileNotFoundError):
        os.replace(path, aside)
        try:
            content = aside.read_bytes()
        except OSError:
            return aside
        if not fault(content):
            os.replace(aside, path)
    return aside


class Cache:
    """One cache folder. Any number of processes and threads may read and write it at the same time.

    Args:
        root: ``CacheConfig.dir``, absolute. It is created by the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards = Shards(root / "shards")
        """Entries that are packed (``cache_packing``). What is packed is read there first."""
        self._verified: dict[str, tuple[int, ...]] = {}
        """Of every entry that was found whole: inode, offset, size and time of change, by its key."""

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

        def waiting(collection: object) -> None:
            note(f"waiting for {collection}, in {self.root}")

        with ExitStack() as lock:
            try:
                lock.enter_context(locks.hold(self.lock, user, shared=True, waiting=waiting))
            except OSError as error:
                why = f"cannot be locked ({error.strerror})"
                note(f"{self.root} {why}: `finetune cache gc` does not see that it is used")
            yield

    # --------------------------------------------------------------------------------------------------------- listing

    def path(self, kind: Kind, key: str) -> Path:
        """Where an entry is filed that has a file of its own."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: Kind, key: str) -> bool:
        """Whether an entry is there. Entries appear whole, so being there is being complete."""
        return self.path(kind, key).is_file() or key in self.shards.entries()[kind]

    def sizes(self, kind: Kind) -> dict[str, int]:
        """Every entry of a kind and its bytes on disk, by listing folders: far quicker than asking for each."""
        sizes = {}
        for entry in self._listing(kind):
            with suppress(FileNotFoundError):  # moved aside since it was listed
                sizes[entry.name.removesuffix(".safetensors")] = entry.stat().st_size
        # Listed last, for what is packed meanwhile is there before its file goes.
        return sizes | {key: packed.size for key, packed in self.shards.entries()[kind].items()}

    def keys(self, kind: Kind) -> set[str]:
        """Every entry of a kind, as ``sizes``."""
        own = {entry.name.removesuffix(".safetensors") for entry in self._listing(kind)}
        return own | self.shards.entries()[kind].keys()

    def all_keys(self) -> dict[Kind, set[str]]:
        """``keys`` of every kind."""
        return {kind: self.keys(kind) for kind in KINDS}

    def files(self, kind: Kind) -> list[Path]:
        """The files of those entries of a kind that have one of their own, sorted."""
        return sorted(Path(entry.path) for entry in self._listing(kind))

    def _listing(self, kind: Kind) -> Iterator[os.DirEntry[str]]:
        folders = [entry.path for entry in _scan(self.root / kind) if len(entry.name) == 2]
        return (entry for folder in folders for entry in _scan(folder) if entry.name.endswith(".safetensors"))

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
                if content := read_content(path):
                    yield path, content

    # --------------------------------------------------------------------------------------------------------- writing

    def write_latents(
        self,
        address: Mapping[str, Any],
        mean: Tensor,
        std: Tensor,
        image_latents: Tensor | None,
        *,
        further: Mapping[str, Tensor] = MappingProxyType({}),
        made_with: Mapping[str, Any] | None = None,
    ) -> int:
        """Store one clip's posterior in the dtype its address names.

        Args:
            address: from ``Encoding.latents_address``.
            mean: [C, F, H, W] before any scaling factor.
            std: the same shape.
            image_latents: [K, C, 1, H, W], image-to-video only.
            further: what else the entry holds, by the names that ``CacheEntry`` has for it, such as
                ``control_latents``, [C, F, H, W].
            made_with: how it was made on this machine (tiling, say). Recorded, but no part of the address: an entry
                must not become unusable on another machine.

        Returns:
            Bytes written.

        Raises:
            CacheError: if a value is not finite, in the encoder's output or after rounding to the stored dtype.
        """
        dtype = torch_dtype(address["dtype"])
        tensors = {"latents_mean": mean, "latents_std": std, **further}
        if image_latents is not None:
            tensors["image_latents"] = image_latents
        # To the host at once: each look at a tensor on a GPU would wait for what the encoder was given meanwhile.
        tensors = {name: tensor.to(dtype).cpu() for name, tensor in tensors.items()}
        return self._write(address, tensors, made_with=canonical_json(made_with or {}))

    def write_prompt(self, address: Mapping[str, Any], embeds: Tensor, *, tokens: int) -> int:
        """Store the embedding [L, D] of one caption as it is, and how many tokens the caption has, uncut.

        Returns and raises as ``write_latents``.
        """
        return self._write(address, {"prompt_embeds": embeds}, tokens=str(tokens))

    def write_image(self, address: Mapping[str, Any], pixels: Tensor) -> int:
        """Store a validation image, uint8 RGB [3, H, W], or control video [3, F, H, W]. Returns the bytes written."""
        return self._write(address, {"pixels": pixels})

    def _write(self, address: Mapping[str, Any], tensors: Mapping[str, Tensor], **metadata: str) -> int:
        key = digest_of(address)
        path = self.path(address["kind"], key)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CacheError(
                    f"{name} has values that are not finite in {tensor.dtype}",
                    where=str(path),
                    fix="encode in bf16 or fp32 (model.dtype), and store in fp32 (cache.latents_dtype)",
                )
        content = serialise(tensors, {"key": key, "address": canonical_json(address), **metadata})
        self.publish(path, content)
        return len(content)

    def save_manifest(self, manifest: Manifest, base: Path) -> Path:
        """File a manifest under its request; paths inside ``base`` are written relative to it.

        Raises:
            CacheError: if it cannot be written.
        """
        path = self.root / "manifests" / f"{manifest.name}.json"
        self.publish(path, manifest.to_bytes(base))
        for damaged in path.parent.glob(f"{path.name}.*.damaged"):  # made anew
            with suppress(OSError):
                damaged.unlink()
        return path

    def publish(self, path: Path, content: bytes) -> None:
        """Write a file of the cache, which appears whole.

        Raises:
            CacheError: if it cannot be written.
        """
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

    # --------------------------------------------------------------------------------------------------------- reading

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
            control_latents=latents.get("control_latents"),
            mask=latents.get("mask"),
            frame_latents=latents.get("frame_latents"),
        )

    def read_prompt(self, key: str) -> Tensor:
        """The embedding of a caption, [L, D]. Raises as ``read``."""
        return self._read("prompts", key)["prompt_embeds"]

    def read_image(self, key: str) -> Tensor:
        """The pixels of a validation image, uint8 RGB [3, H, W], or control video [3, F, H, W]. Raises as ``read``."""
        return self._read("images", key)["pixels"]

    def prompt_tokens(self, key: str) -> int:
        """How many tokens a stored caption has; above the model's ``max_text_seq_length``, its end is not encoded.

        Raises as ``read``; only the header is read, and verified.
        """
        with self._open("prompts", key) as (entry, _):
            return int(read_metadata(entry, key)["tokens"])

    def check(self, kind: Kind, key: str) -> None:
        """Read an entry and compare it with its checksums. Raises as ``read``."""
        with self._open(kind, key) as (entry, size):
            if fault := fault_of(entry.read(size), kind, key):
                raise ValueError(fault)

    def content(self, kind: Kind, key: str) -> bytes:
        """The bytes of an entry, which are not verified. Raises as ``read``."""
        with self._open(kind, key) as (entry, size):
            return entry.read(size)

    def _read(self, kind: Kind, key: str, clip: str = "", *, again: bool = True) -> dict[str, Tensor]:
        """The tensors of an entry, which is verified when this process first reads its file.

        ``again`` reads once more where another machine has put an equal file in its place (NFS).
        """
        import torch

        with self._open(kind, key, clip) as (entry, size):
            status = os.fstat(entry.fileno())
            identity = (status.st_ino, entry.tell(), size, status.st_mtime_ns)
            buffer = torch.empty(size, dtype=torch.uint8)
            content: memoryview = buffer.numpy().data
            try:
                if entry.readinto(content) < len(content):  # type: ignore[attr-defined]
                    raise ValueError("it is cut off")
            except OSError as error:
                if error.errno != errno.ESTALE or not again:
                    raise
                return self._read(kind, key, clip, again=False)
            if self._verified.get(key) != identity and (fault := fault_of(content, kind, key)):
                raise ValueError(fault)
            tensors = tensors_in(buffer)
        self._verified[key] = identity
        return tensors

    @contextmanager
    def _open(self, kind: Kind, key: str, clip: str = "") -> Iterator[tuple[BinaryIO, int]]:
        """Open an entry at its first byte, with its size; say in words what is wrong. ``clip`` is whose it is.

        A damaged one (ValueError) is moved aside, or dropped from its shard's index, so that it counts as missing.
        """
        path = self.path(kind, key)
        packed = self.shards.entries(refresh=False)[kind].get(key)
        if (packed is None and not path.exists()) or (packed is not None and not packed.shard.exists()):
            packed = self.shards.entries()[kind].get(key)  # another process has packed it, or written its shard anew
        where = str(path) if packed is None else f"{packed.shard} ({kind}/{key})"
        where = f"{where} ({clip})" if clip else where
        try:
            with (path if packed is None else packed.shard).open("rb") as entry:
                if packed is None:
                    yield entry, os.fstat(entry.fileno()).st_size
                else:
                    entry.seek(packed.offset)
                    yield entry, packed.size
        except FileNotFoundError:
            raise CacheError("a cache entry is missing", where=where, fix=_ENCODE_AGAIN) from None
        except ValueError as reason:
            fix = _ENCODE_AGAIN
            try:
                if packed is None:
                    self.move_entry_aside(path, kind)
                else:
                    self.shards.drop(kind, key)
            except OSError as error:
                fix = (
                    f"it cannot be moved aside from here ({error.strerror}): where it can, run"
                    " `finetune cache verify --delete` and then `finetune precompute`"
                )
            raise CacheError(f"a cache entry is damaged: {reason}", where=where, fix=fix) from None
        except OSError as error:
            raise CacheError(
                f"a cache entry cannot be read: {error.strerror}",
                where=where,
                fix="look at the disk or the network drive, and at the file's permissions; the same command then"
                " continues. A file that stays unreadable is taken out by `finetune cache verify --delete`",
            ) from None

    def move_entry_aside(self, path: Path, kind: Kind) -> Path:
        """``move_aside`` for an entry."""
        return move_aside(path, lambda content: fault_of(content, kind, path.stem))

    def move_manifest_aside(self, path: Path) -> Path:
        """``move_aside`` for a manifest; what it refers to stays (``gc``)."""
        return move_aside(path, lambda content: manifest_fault(content, path.stem))

    # ------------------------------------------------------------------------------------------------ source files

    def digest_file(self, path: Path) -> str:
        """Digest of a file's bytes, remembered in a cache that is there by path, size and time: a touched file is read
        once more, no more.
        """
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
        if not self.root.is_dir():  # a check makes no cache; jobs that use one have locked it, which makes the folder
            return stamp
        with suppress(OSError):  # a cache that cannot be written to can still be read
            content = checksummed_json(canonical_json({"path": name, **asdict(stamp)}))
            atomic_write_bytes(memo, content, durable=False)  # what a power cut takes is digested again
        return stamp

    def is_unchanged(self, path: str | Path, stamp: FileStamp) -> bool | None:
        """Whether a file or folder is still what ``stamp`` says; None if it is gone. Equal bytes are enough."""
        try:
            status = os.stat(path)  # noqa: PTH116 - a hundred thousand times when a run begins
        except OSError:
            return None
        if stamp.mtime_ns >= 0 and (status.st_size, status.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
            return True
        return self.stamp(Path(path)).digest == stamp.digest


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where there is none, or what is there cannot be listed and so not be read either."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
        return list(entries)
    return []


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
