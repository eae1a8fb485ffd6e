"""Whether bytes are still what was written: digests, checksums, and files and folders that carry theirs.

Checksums (xxh3, tens of GB/s) are against damage, not against forgery: who can change a file on purpose can change its
checksum as well. Digests (blake2b, about 1 GB/s) are identities: of a source file, a request, a model. The same
checksum stands in three places: in the marker of a published folder (``ChecksummedFolder``), as the first member of a
JSON file (``checksummed_json``), and in the header of a cache entry (``datasets.entries``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from finetune.core.files import CHUNK, COMPLETE

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------ digests


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """A 128-bit hexadecimal digest of a JSON-serialisable value: its identity."""
    return hashlib.blake2b(canonical_json(value).encode("utf-8"), digest_size=16).hexdigest()


def digest_file(path: Path, *others: Any) -> str:
    """A 128-bit hexadecimal digest of a file's bytes: their identity.

    ``others``, further digests of ``hashlib``, are updated on the way.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as source:
        while chunk := source.read(CHUNK):
            for one in (digest, *others):
                one.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- checksums


def checksum_bytes(*parts: bytes | memoryview) -> str:
    """A 128-bit hexadecimal checksum of the parts' bytes laid end to end."""
    return checksum_parts(parts)


def checksum_parts(parts: Iterable[bytes | memoryview]) -> str:
    """``checksum_bytes`` of parts that are made one at a time."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def checksum_file(path: Path) -> str:
    """``checksum_bytes`` of a file."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


# ------------------------------------------------------------------------------- content that carries its own checksum

NO_CHECKSUM = b"0" * 32
"""What stands in the place of a checksum while it is taken."""


def insert_checksum(content: bytes, at: int) -> bytes:
    """``content`` with ``NO_CHECKSUM`` at ``at`` replaced by the checksum of the whole."""
    return content[:at] + checksum_bytes(content).encode("ascii") + content[at + len(NO_CHECKSUM) :]


def checksum_fits(content: bytes | memoryview, at: int) -> bool:
    """Whether the 32 characters at ``at`` are what ``insert_checksum`` put there."""
    content, end = memoryview(content), at + len(NO_CHECKSUM)
    return bytes(content[at:end]) == checksum_bytes(content[:at], NO_CHECKSUM, content[end:]).encode("ascii")


_OPENING = b'{"checksum":"'


def checksummed_json(text: str) -> bytes:
    """The file of a JSON object of at least one member, with its checksum as the first."""
    return insert_checksum(_OPENING + NO_CHECKSUM + b'",' + text[1:].encode("utf-8"), len(_OPENING))


def parse_checksummed_json(content: bytes) -> dict[str, Any]:
    """The object in a file of ``checksummed_json``, ``checksum`` included.

    Raises:
        ValueError: if it is not, to the bit, what was written.
    """
    if not content.startswith(_OPENING) or not checksum_fits(content, len(_OPENING)):
        raise ValueError("its checksum does not fit")
    value: dict[str, Any] = json.loads(content)
    return value


# --------------------------------------------------------------------------------------------------- published folders


class DamageError(Exception):
    """A file is not what was written.

    Args:
        path: the file.
        reason: why, as words after its name.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path.name} {reason}")


def folder_checksums(folder: Path, written: Mapping[str, str] | None = None) -> str:
    """The text of ``COMPLETE`` for everything in ``folder``; return it from the ``fill`` of ``files.publish_dir``.

    Args:
        folder: about to be published.
        written: checksums that writing the files returned already, by name relative to ``folder``; others are read.
    """
    written = written or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _marker({name: written.get(name) or checksum_file(folder / name) for name in names})


def read_published(path: Path) -> bytes:
    """A file's content, verified if it stands in a published folder that names it; a file from elsewhere as it is.

    Raises:
        DamageError: if it is not as it was written, or the folder's marker is not.
        OSError: if it cannot be read.
    """
    if (path.parent / COMPLETE).is_file():
        folder = ChecksummedFolder.open(path.parent)
        if path.name in folder.checksums:
            return folder.read_bytes(path.name)
    return path.read_bytes()


MAPPED_ABOVE = 2 << 30
"""Safetensors files up to so many bytes are read once: what is verified is what is used. Larger ones are verified and
then mapped, which reads them from the page cache again: held in memory they would take tens of GB for every process of
a machine, mapped they share one copy that the system can drop."""


@dataclass(frozen=True)
class ChecksummedFolder:
    """A published folder whose ``COMPLETE`` holds a checksum of every file; files are verified as they are read.

    The marker reads like the output of ``xxhsum -H2``, one line per file (checksum, two spaces, name) in the order of
    the names, and ends with the checksum of these lines. So any change of any byte in the folder, the marker included,
    is found when the file is read, and it is known which file it was.
    """

    folder: Path
    checksums: Mapping[str, str]
    """By name relative to ``folder``."""

    @classmethod
    def open(cls, folder: Path) -> ChecksummedFolder:
        """Read and verify the marker.

        Raises:
            DamageError: if it is missing or not as it was written.
            OSError: if it cannot be read for another reason than damage, such as permissions.
        """
        marker = folder / COMPLETE
        content = _attempt(marker, marker.read_bytes)
        try:
            pairs = [line.split("  ", 1) for line in content.decode("ascii").splitlines()[:-1]]
            checksums = {str(json.loads(f'"{name}"')): checksum for checksum, name in pairs}
            intact = content == _marker(checksums).encode("ascii")
        except ValueError:  # not ASCII, a line without a name, or no name
            intact = False
        if not intact:
            raise DamageError(marker, "is not as it was written")
        return cls(folder, checksums)

    def __contains__(self, name: str) -> bool:
        return name in self.checksums

    def verify(self, name: str) -> None:
        """Read a file for its checksum alone.

        Raises:
            DamageError, OSError: as ``read_bytes``.
        """
        path = self.folder / name
        self._compare(name, _attempt(path, lambda: checksum_file(path)))

    def read_bytes(self, name: str) -> bytes:
        """A file's content.

        Raises:
            DamageError: if it is missing or not as it was written, or the disk cannot read it.
            OSError: if it cannot be read for another reason.
        """
        path = self.folder / name
        content = _attempt(path, path.read_bytes)
        self._compare(name, checksum_bytes(content))
        return content

    def read_json(self, name: str) -> Any:
        """A JSON file's value.

        Raises:
            DamageError, OSError: as ``read_bytes``.
        """
        content = self.read_bytes(name)
        try:
            return json.loads(content)
        except ValueError as error:
            raise DamageError(self.folder / name, f"is no JSON: {error}") from None

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """A safetensors file's tensors, on the CPU; see ``MAPPED_ABOVE``.

        Raises:
            DamageError, OSError: as ``read_bytes``.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file

        path = self.folder / name
        try:
            if _attempt(path, path.stat).st_size <= MAPPED_ABOVE:
                tensors: dict[str, Tensor] = load(self.read_bytes(name))
            else:
                self.verify(name)
                tensors = _attempt(path, lambda: load_file(path))
        except SafetensorError as error:
            raise DamageError(path, f"is no safetensors file: {error}") from None
        return tensors

    def _compare(self, name: str, checksum: str) -> None:
        if name not in self.checksums:
            raise DamageError(self.folder / COMPLETE, f"does not name {name}")
        if checksum != self.checksums[name]:
            raise DamageError(self.folder / name, "is not as it was written")


def _marker(checksums: Mapping[str, str]) -> str:
    # JSON's escapes keep a name on its line, and in ASCII.
    lines = "".join(f"{checksums[name]}  {json.dumps(name)[1:-1]}\n" for name in sorted(checksums))
    return f"{lines}{checksum_bytes(lines.encode())}\n"


def _attempt(path: Path, read: Callable[[], T]) -> T:
    """Tell damage from what has nothing to do with the file: permissions, a lost network, too many open files."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end, nor would a device
            raise DamageError(path, "is no regular file")
        return read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise DamageError(path, "is missing") from None
        if error.errno == errno.EIO:
            raise DamageError(path, "cannot be read from the disk any more (input/output error)") from None
        raise
