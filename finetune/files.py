"""Files that appear whole or not at all, and digests of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

COMPLETE = "COMPLETE"
"""Name of the marker file that ``publish_dir`` writes last into a directory."""


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that readers see the old file or the whole new one, also after a crash."""
    _atomically(path, lambda partial: partial.write_bytes(content))


def atomic_write_text(path: Path, content: str) -> None:
    """``atomic_write_bytes`` for UTF-8 text."""
    atomic_write_bytes(path, content.encode("utf-8"))


def atomic_save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are made contiguous and moved to the CPU first."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    _atomically(path, lambda partial: save_file(ready, str(partial), metadata=dict(metadata or {})))


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique per writer, so two processes that write the same file cannot mix their bytes.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        write(partial)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def publish_dir(path: Path, fill: Callable[[Path], None]) -> None:
    """Create a directory whose content appears at once, ending with the ``COMPLETE`` marker.

    ``fill`` writes into a sibling ``<name>.<unique>.partial``; only when it returns does the directory get its marker
    and its real name. An existing directory of that name is replaced, and removed only after the new one stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        fill(partial)
        atomic_write_text(partial / COMPLETE, "")
        if path.exists():
            old = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.old.partial")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(path: Path) -> bool:
    """Whether ``path`` is a directory that ``publish_dir`` finished."""
    return (path / COMPLETE).is_file()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """A 128-bit hexadecimal digest of a JSON-serialisable value."""
    return hashlib.blake2b(canonical_json(value).encode("utf-8"), digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """A 128-bit hexadecimal digest of a file's bytes; about 1 GB/s."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as source:
        while chunk := source.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
