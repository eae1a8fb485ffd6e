"""What a source file looked like when it was read, and whether it is still that: digests, each taken once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.datasets.manifest import FileStamp
from finetune.datasets.sealed import seal, unseal
from finetune.errors import DataError
from finetune.facts import hub_sha256
from finetune.files import atomic_write_bytes, canonical_json, digest_file, digest_of

YOUNG_S = 2.0
"""A file changed less than this long ago may change again within one tick of its file system's clock (2 s on FAT), with
neither size nor time showing it; its digest is then not remembered."""


def take_stamp(path: Path, memos: Path) -> FileStamp:
    """What a file looks like now; for a folder, the names of the files in it, without those that begin with a dot.

    Args:
        path: the file or folder.
        memos: folder where digests are remembered by path, size and time.

    Raises:
        DataError: if it cannot be read, or came from the hub and is not what the hub sent.
    """
    try:
        if path.is_dir():
            names = [entry.name for entry in path.iterdir() if entry.name[0] != "." and entry.is_file()]
            return FileStamp(-1, -1, digest_of(sorted(names)))
        return _stamp_file(path, memos)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _stamp_file(path: Path, memos: Path) -> FileStamp:
    name = str(path.absolute())
    memo = memos / f"{digest_of(name)}.json"
    status = path.stat()
    known = _remembered(memo)
    if (known.get("path"), known.get("size"), known.get("mtime_ns")) == (name, status.st_size, status.st_mtime_ns):
        return FileStamp(status.st_size, status.st_mtime_ns, str(known["digest"]))
    began_ns = time.time_ns()
    digest = _digest(path)
    if began_ns - status.st_mtime_ns < YOUNG_S * 1e9:
        return FileStamp(status.st_size, -1, digest)
    stamp = FileStamp(status.st_size, status.st_mtime_ns, digest)
    with suppress(OSError):  # a cache that cannot be written to can still be read
        atomic_write_bytes(memo, seal(canonical_json({"path": name, **asdict(stamp)})))
    return stamp


def _digest(path: Path) -> str:
    """``digest_file``, and on the way whether the file is what the hub sent, where it came from there."""
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


def _remembered(memo: Path) -> Mapping[str, Any]:
    try:
        return unseal(memo.read_bytes())
    except (OSError, ValueError):
        return {}  # none, or a damaged one: the digest is taken anew


def is_unchanged(path: Path, stamp: FileStamp, memos: Path) -> bool | None:
    """Whether a file or folder is still what ``stamp`` says; None if it is gone. Equal bytes are enough."""
    try:
        status = path.stat()
    except OSError:
        return None
    if stamp.mtime_ns >= 0 and (status.st_size, status.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
        return True
    return take_stamp(path, memos).digest == stamp.digest
