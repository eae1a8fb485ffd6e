"""Sealed folders: the ``COMPLETE`` marker holds a checksum of every file, and files are read against it.

The marker reads like the output of ``xxhsum -H2``, one line per file (checksum, two spaces, name) in the order of the
names, and ends with the checksum of these lines. So any change of any byte in the folder, the marker included, is found
when the file is read, and it is known which file it was. Against damage, not against forgery.
"""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.core.files import COMPLETE, checksum_bytes, checksum_file

if TYPE_CHECKING:
    from torch import Tensor

READ_AT_ONCE = 2 << 30
"""Files up to so many bytes are read once: what is verified is what is used. Larger ones are verified and then mapped,
which reads them from the page cache again: held in memory they would take tens of GB for every process of a machine,
mapped they share one copy that the system can drop."""

T = TypeVar("T")


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


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """The marker's text for everything in ``folder``; return it from the ``fill`` of ``files.publish_dir``.

    Args:
        folder: about to be published.
        known: checksums that writing the files returned already, by name relative to ``folder``; others are read.
    """
    known = known or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _text({name: known.get(name) or checksum_file(folder / name) for name in names})


def read_published(path: Path) -> bytes:
    """A file's content, verified if it stands in a sealed folder that names it; a file from elsewhere as it is.

    Raises:
        DamageError: if it is not as it was written, or the folder's marker is not.
        OSError: if it cannot be read.
    """
    if not (path.parent / COMPLETE).is_file():
        return path.read_bytes()
    sealed = ChecksummedFolder.open(path.parent)
    return sealed.read_bytes(path.name) if path.name in sealed else path.read_bytes()


@dataclass(frozen=True)
class ChecksummedFolder:
    """A published folder whose marker was found whole. Its files are verified as they are read."""

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
            lines = content.decode("ascii").splitlines()
            pairs = [line.split("  ", 1) for line in lines[:-1]]
            checksums = {str(json.loads(f'"{name}"')): checksum for checksum, name in pairs}
            whole = content == _text(checksums).encode("ascii")
        except ValueError:  # not ASCII, a line without a name, or no name
            whole = False
        if not whole:
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
        """A safetensors file's tensors, on the CPU; see ``READ_AT_ONCE``.

        Raises:
            DamageError, OSError: as ``read_bytes``.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file

        path = self.folder / name
        try:
            if _attempt(path, path.stat).st_size <= READ_AT_ONCE:
                tensors: dict[str, Tensor] = load(self.read_bytes(name))
            else:
                self.verify(name)
                tensors = _attempt(path, lambda: load_file(path))
        except SafetensorError as error:
            raise DamageError(path, f"is no safetensors file: {error}") from None
        return tensors

    def _compare(self, name: str, found: str) -> None:
        if name not in self.checksums:
            raise DamageError(self.folder / COMPLETE, f"does not name {name}")
        if found != self.checksums[name]:
            raise DamageError(self.folder / name, "is not as it was written")


def _text(checksums: Mapping[str, str]) -> str:
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
