"""Amounts of memory as people write them, and what of a card is not left for tensors."""

from __future__ import annotations

import os
import re

from finetune.core.errors import ConfigError
from finetune.core.types import GIB, MIB

OVERHEAD_GIB = 1.2
"""What a CUDA context, libraries' workspaces and fragmentation take beside the tensors of a training."""

NCCL_BYTES = 32 * 2 * (4096 + 4800 + 512) * 1024
"""More, where several processes train: at most 32 channels, each with two neighbours, and for each the buffers of
NCCL's three protocols. From the defaults in NCCL's source; few machines take all of it."""

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that torch reads its allocator's settings from; the first is torch's name for it from 2.9 on."""

_LEAST_CARD, _MOST_CARD = GIB, 1024 * GIB

_UNITS = {
    "": GIB,
    "g": GIB,
    "gib": GIB,
    "gb": GIB,
    "mib": MIB,
    "mb": MIB,
    "kib": 1024,
    "kb": 1024,
    "tib": 1024 * GIB,
    "tb": 1024 * GIB,
}
"""Memory is made in powers of two whatever it is called: a card of "24 GB" has 24 GiB."""


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as ``24GB``, ``24GiB`` or ``24``, which all are what people call a card of 24 GB.

    Raises:
        ValueError: if it is none, or not more than nothing.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r:.60} is no amount of memory; write it like 24GB or 800MB")
    nbytes = round(float(match[1]) * _UNITS[match[2]])
    if nbytes <= 0:
        raise ValueError(f"{text!r} is no memory at all")
    return nbytes


def amount(option: str, text: str | None) -> int | None:
    """``parse_bytes`` of what an option of the command line says; None where it is not given.

    Raises:
        ConfigError: if it is no amount.
    """
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise ConfigError(str(error), where=f"{option} {text:.60}") from None


def card_size(text: str | None) -> int | None:
    """Bytes of a card that ``--card`` names by its memory; None where it is not given.

    Raises:
        ConfigError: if it is no amount, or none that a card has.
    """
    nbytes = amount("--card", text)
    if nbytes is not None and not _LEAST_CARD <= nbytes <= _MOST_CARD:
        raise ConfigError(
            f"no card has {nbytes / GIB:g} GiB",
            where=f"--card {text:.60}",
            fix="give the memory of the card, such as 24GB; `plan` and `doctor` take its kind as --device",
        )
    return nbytes


def to_gib(nbytes: float) -> str:
    """Such as ``12.34 GiB``."""
    return f"{nbytes / GIB:.2f} GiB"


def usable(card_bytes: int, processes: int = 1) -> int:
    """What of a card's memory there is for tensors.

    Args:
        card_bytes: of the card.
        processes: how many train together, each on a card of its own.
    """
    return card_bytes - round(OVERHEAD_GIB * GIB) - (NCCL_BYTES if processes > 1 else 0)


def grow_segments() -> None:
    """Ask torch's allocator for segments that grow, unless the user has set it otherwise; before CUDA is first used.

    Buckets of several sizes, and the VAE beside the transformer, otherwise leave gaps that nothing fits into.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
