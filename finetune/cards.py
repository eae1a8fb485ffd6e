"""Amounts of memory as people write them, and what of a card is not left for tensors."""

from __future__ import annotations

import re

OVERHEAD_GIB = 1.2
"""What a CUDA context, libraries' workspaces and fragmentation take beside what torch allocates."""

GIB = 2**30

_UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as ``24GiB``, ``12.5 GB`` or ``24``; a bare number is GiB, as cards are sold.

    Raises:
        ValueError: if it is none, or not more than nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 24GiB, 24GB or 800MiB")
    nbytes = round(float(match[1]) * _UNITS[match[2]])
    if nbytes <= 0:
        raise ValueError(f"{text!r} is no memory at all")
    return nbytes


def to_gib(nbytes: float) -> str:
    """Such as ``12.34 GiB``."""
    return f"{nbytes / GIB:.2f} GiB"


def usable(card_bytes: int) -> int:
    """What of a card's memory torch may allocate."""
    return card_bytes - round(OVERHEAD_GIB * GIB)
