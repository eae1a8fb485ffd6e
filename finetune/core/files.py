"""Files that appear whole or not at all, and the room that a disk has for them.

Everything this package writes itself goes through five calls to the operating system (``_create``, ``_write``,
``_sync``, ``_rename``, ``_mkdir``), so that a test can let each of them fail in turn (``tests/broken_disk.py``).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from finetune.core.types import GIB, MIB

COMPLETE = "COMPLETE"
"""Name of the marker file that ``publish_dir`` writes last into a directory."""

PARTIAL = ".partial"
"""Ending of what is being written or removed; readers pass it over."""

_REPLACED = f".old{PARTIAL}"
"""Ending of a directory whose successor is about to take its name."""

TRAINABLE = "trainable.safetensors"
"""In checkpoints and fault reports: what trains, by the names of the model's parameters."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""In exports: an adapter, as diffusers names it."""

CONTROL_FILE = "control_projection.safetensors"
"""Beside it, of an adapter that follows a control video: the patch embedding's projection, which trained whole."""

CHUNK = 1 << 22
"""Bytes hashed and written at a time, while they are in the processor's cache."""


# ------------------------------------------------------------------------------------ calls to the operating system


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _write(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _mkdir(path: Path) -> None:
    path.mkdir(exist_ok=True)


# ------------------------------------------------------------------------------------------------------------ writing


def atomic_write_bytes(path: Path, content: bytes, *, durable: bool = True) -> str:
    """Write ``content`` so that readers see the old file or the whole new one, also after a crash or a power cut.

    Args:
        path: the file.
        content: all of it.
        durable: wait until the disk has it, twice. Without it a power cut may leave anything under the name, so only
            for what carries a checksum and can be made again.

    Returns:
        The content's ``checksum_bytes``.

    Raises:
        OSError: the old file stands then, and nothing is left of the new one. (Only if the very last step fails, the
            flush of the directory, does the new one stand already.)
    """
    return atomic_write(path, [memoryview(content)], durable=durable)


def atomic_write_text(path: Path, content: str) -> str:
    """``atomic_write_bytes`` for UTF-8 text."""
    return atomic_write_bytes(path, content.encode("utf-8"))


def atomic_write(path: Path, parts: Iterable[memoryview], *, durable: bool = True) -> str:
    """``atomic_write_bytes`` of parts laid end to end, each made when the one before is written."""
    _make_folders(path.parent)
    # The name is unique per writer, so two processes that write the same file cannot mix their bytes.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL}")
    digest = xxhash.xxh3_128()
    try:
        descriptor = _create(partial)
        try:
            for part in parts:
                for first in range(0, len(part), CHUNK):
                    chunk = part[first : first + CHUNK]
                    digest.update(chunk)
                    _write(descriptor, chunk)
            if durable:
                _sync(descriptor)
        finally:
            os.close(descriptor)
        _rename(partial, path)
    except OSError as error:
        if error.filename == str(partial):  # nobody has asked for a file of that name
            error.filename = str(path)
            del error.filename2  # None would be shown
        raise
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        _sync_folder(path.parent)
    return digest.hexdigest()


def publish_dir(path: Path, fill: Callable[[Path], str | None]) -> None:
    """Create a directory whose content appears at once, ending with the ``COMPLETE`` marker.

    ``fill`` writes into a sibling ``<name>.<unique>.partial``, in whatever way, and may return the marker's text; only
    when all it wrote is on the disk does the directory get its marker and its real name. An existing directory of that
    name is replaced, and removed only after the new one stands.

    Raises:
        OSError: nothing has changed at ``path`` then, and nothing is left of the new directory.
    """
    partial = begin_dir(path)
    try:
        finish_dir(partial, path, fill(partial) or "")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def begin_dir(path: Path, *folders: str) -> Path:
    """The beginning of ``publish_dir``, where several processes fill the directory: it, and ``folders`` in it."""
    _make_folders(path.parent)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        for folder in (partial, *(partial / name for name in folders)):
            _mkdir(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial


def finish_dir(partial: Path, path: Path, marker: str) -> None:
    """The end of ``publish_dir``: what ``begin_dir`` made gets its marker and its name."""
    _sync_tree(partial)
    atomic_write_text(partial / COMPLETE, marker)
    _take_place(partial, path)


def _take_place(new: Path, path: Path) -> None:
    old = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_REPLACED}")
    replaces = path.exists()
    if replaces:
        _rename(path, old)
    try:
        _rename(new, path)
        _sync_folder(path.parent)
    except BaseException:
        if path.exists():  # it stands, and nobody knows whether it still will after a power cut
            _rename(path, new)
        if replaces:
            _rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


_UNFINISHED = re.compile(rf"(.+)\.(?:\d+-[0-9a-f]{{8}}|[0-9a-f]{{8}}(\.old)?){re.escape(PARTIAL)}")
"""How ``publish_dir`` and ``remove_dir`` name what is under way: the directory's name first."""


def undo_interrupted(folder: Path, name: str | None = None) -> list[Path]:
    """Undo and remove what killed calls of ``publish_dir`` and ``remove_dir`` left in ``folder``.

    If one died between its two renames, the directory that it was about to replace gets its name back. Only for who
    alone writes there: another's call may be under way.

    Args:
        folder: that holds the directories.
        name: of the one that is meant; None for all.

    Returns:
        What stands again.

    Raises:
        OSError: if a directory cannot get its name back.
    """
    restored = []
    for leftover in sorted(folder.glob(f"*{PARTIAL}")):
        match = _UNFINISHED.fullmatch(leftover.name)
        if match is None or name not in (None, match[1]):
            continue
        if match[2] and not (folder / match[1]).exists():
            _rename(leftover, folder / match[1])
            restored.append(folder / match[1])
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    return restored


def move(source: Path, target: Path) -> None:
    """Rename within one file system, so that a power cut does not undo it."""
    _rename(source, target)
    _sync_folder(target.parent)


def remove_dir(path: Path) -> None:
    """Remove a directory so that an interruption leaves no half of it under its name.

    Raises:
        OSError: if it cannot be renamed; what is left of it otherwise ends in ``PARTIAL``.
    """
    doomed = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    _rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _make_folders(path: Path) -> None:
    if path.is_dir():
        return
    if path.parent != path:
        _make_folders(path.parent)
    _mkdir(path)
    _sync_folder(path.parent)


def _sync_tree(folder: Path) -> None:
    """Flush every file and directory below ``folder``, whoever wrote them."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_path(Path(root, name))
        _sync_folder(Path(root))


def _sync_folder(path: Path) -> None:
    """Flush a directory's entries, so that a rename survives a power cut, on file systems that can."""
    try:
        _sync_path(path)
    except OSError as error:
        # Some network and FUSE file systems, and Windows, know no such thing; a disk's own fault is another number.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a directory that ``publish_dir`` finished."""
    return (path / COMPLETE).is_file()


# ------------------------------------------------------------------------------------------------------- room on a disk


def human_size(size: int) -> str:
    """Bytes for a person: GiB from a tenth of one up, MiB below."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.3f} MiB"


def require_space(
    path: Path, needed: int, *, kind: Callable[..., Exception], what: str, fix: str, files: int = 32
) -> None:
    """Refuse to begin what the disk has no room for, in bytes or in files.

    Args:
        path: what will be written, or where; it need not exist yet.
        needed: bytes that must be free.
        kind: the error to raise: any ``FinetuneError``.
        what: the subject of the message, such as ``the checkpoint``.
        fix: how to make room.
        files: how many files and folders will be made, at most.

    Raises:
        Exception: of ``kind``, with the path, what is needed and what is free.
    """
    free = free_space(path)
    if free < needed:
        raise kind(
            f"{what} needs {human_size(needed)} and the disk has {human_size(free)} free", where=str(path), fix=fix
        )
    room = free_files(path)
    if room is not None and room < files:
        raise kind(
            f"{what} makes up to {files:,} files and the disk has room for {room:,} more (`df -i`), whatever its bytes",
            where=str(path),
            fix=fix,
        )


def free_space(path: Path) -> int:
    """Bytes that this user may still write on the disk of ``path`` or of the nearest folder above that exists."""
    return shutil.disk_usage(_existing(path)).free


def free_files(path: Path) -> int | None:
    """Files that may still be made there (inodes); None where the file system does not count them."""
    if not hasattr(os, "statvfs"):
        return None
    status = os.statvfs(_existing(path))
    return status.f_favail if status.f_files > 0 else None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def disk_fix(error: OSError) -> str:
    """What a person can do about a failed write, by its error number."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room, in bytes or in files (`df -h`, `df -i`, quotas of either), and run the same command again"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "let the process open more files (`ulimit -n`) and run the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable, or choose another one, and run the same command again"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a part of the path is a file: choose another folder"
    return "look at the disk or the network drive (the kernel's log says more), then run the same command again"


def require_writable(folder: Path, *, kind: Callable[..., Exception], what: str, where: str) -> None:
    """Refuse to begin work whose outcome cannot be written to ``folder``, which is made if need be.

    The arguments are those of ``require_space``; ``where`` is the option or path that names the folder.
    """
    try:
        _make_folders(folder)
        probe = folder / f".{uuid.uuid4().hex[:8]}{PARTIAL}"
        os.close(_create(probe))
        probe.unlink()
    except OSError as error:
        message = f"{what} cannot be written: {error.strerror or error}"
        raise kind(message, where=where, fix=disk_fix(error)) from error


# ---------------------------------------------------------------------------------------------------------------- paths


def user_folder() -> Path:
    """Where this package keeps what can be made again: ``$XDG_CACHE_HOME/cogvideox-finetune``, or in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "cogvideox-finetune"


def from_here(path: Path) -> str:
    """How commands and code that are typed in the current folder name a path: below it, without what leads to it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
