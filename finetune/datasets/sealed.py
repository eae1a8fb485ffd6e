"""Files of the cache that can prove themselves whole, and what becomes of those that cannot."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.files import checksum_bytes

ZEROS = b"0" * 32
"""What stands in the place of a checksum while it is taken."""
_OPENING = b'{"checksum":"'


def seal(text: str) -> bytes:
    """The file of a JSON object, with its checksum as the first member.

    Args:
        text: a JSON object with at least one member.
    """
    body = _OPENING + ZEROS + b'",' + text[1:].encode("utf-8")
    return fill(body, len(_OPENING))


def unseal(content: bytes) -> dict[str, Any]:
    """The object in a file that ``seal`` made, ``checksum`` included.

    Raises:
        ValueError: if it is not, to the bit, what was written.
    """
    if not content.startswith(_OPENING) or not is_filled(content, len(_OPENING)):
        raise ValueError("its checksum does not fit")
    value: dict[str, Any] = json.loads(content)
    return value


def fill(content: bytes, at: int) -> bytes:
    """``content`` with the 32 zeros at ``at`` replaced by the checksum of the whole."""
    return content[:at] + checksum_bytes(content).encode("ascii") + content[at + len(ZEROS) :]


def is_filled(content: bytes | memoryview, at: int) -> bool:
    """Whether the 32 characters at ``at`` are the checksum of ``content`` with zeros in their place."""
    whole = memoryview(content)
    end = at + len(ZEROS)
    return bytes(whole[at:end]) == checksum_bytes(whole[:at], ZEROS, whole[end:]).encode("ascii")


def move_aside(path: Path, fault: Callable[[bytes], str]) -> Path:
    """Give a damaged file a name that nobody reads, ``<name>.<unique>.damaged``.

    If another process has removed it already, nothing is left to do; if one has written it anew meanwhile, it keeps its
    name.

    Args:
        path: the file.
        fault: says why content is damaged; empty if it is whole.

    Returns:
        The new name.

    Raises:
        OSError: if it cannot be renamed, as on a drive that is read-only.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return aside
    try:
        content = aside.read_bytes()
    except OSError:
        return aside
    if not fault(content):
        os.replace(aside, path)
    return aside
