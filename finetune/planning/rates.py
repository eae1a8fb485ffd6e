"""What a machine can do: rates that were measured on it, or published and assumed ones for its kind of card."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from finetune.files import atomic_write_text
from finetune.planning.store import user_folder
from finetune.section import Strict


class Rates(Strict):
    """Of one device and its host. Operations or bytes per second."""

    device: str
    """Its name, as torch gives it."""
    source: Literal["measured", "published or assumed", "of another card"]
    """Where the numbers come from."""
    gemm: float = Field(gt=0)
    """Matrix products in bf16."""
    attention_forward: float = Field(gt=0)
    """Attention of head dimension 64 over some ten thousand tokens."""
    attention_backward: float = Field(gt=0)
    memory: float = Field(gt=0)
    """Reads and writes of device memory."""
    host_to_device: float = Field(gt=0)
    """From page-locked memory."""
    device_to_host: float = Field(gt=0)
    """To page-locked memory."""
    pageable: float = Field(gt=0)
    """To the device from ordinary memory."""
    host_memory: float = Field(gt=0)
    """Reads and writes of host memory."""


def _card(
    name: str, tera: tuple[float, float, float], memory: float, bus: float, *, host: float = 100e9
) -> tuple[str, Rates]:
    gemm, forward, backward = (rate * 1e12 for rate in tera)
    rates = Rates(
        device=name,
        source="published or assumed",
        gemm=gemm,
        attention_forward=forward,
        attention_backward=backward,
        memory=memory * 1e12,
        host_to_device=bus * 1e9,
        device_to_host=bus * 1e9,
        pageable=bus * 1e9 / 3,
        host_memory=host,
    )
    return name, rates


DEFAULTS: Mapping[str, Rates] = dict(
    (
        # GEMM: others measured 798 on large squares; less for these shapes. Attention: cuDNN, as the
        # FlashAttention-3 paper has it.
        _card("H100", (720, 413, 433), 2.7, 50, host=150e9),
        # An H100 with faster memory, 4.8 TB/s at most.
        _card("H200", (720, 413, 433), 3.8, 50, host=150e9),
        # GEMM: 312 at most, 265 seen. Attention: FlashAttention-2 paper. The bus: PCIe 4.
        _card("A100", (265, 192, 170), 1.65, 25),
        # GEMM: 165 at most. Attention: assumed; no figure for its backward pass at head dimension 64 was found.
        _card("4090", (150, 155, 120), 0.9, 25, host=60e9),
    )
)
"""By a part of the device's name. None of these was measured by us."""
OTHER = "A100"
"""Whose rates a card is given that is none of these: orders of plans then still mean something, seconds do not."""


OF_ANOTHER: Final = "of another card"


def known_devices() -> list[str]:
    """What ``rates_of`` has rates of its own for: kinds of cards, and names of devices that were calibrated here."""
    measured = []
    for path in sorted(calibration_file("any").parent.glob("*.json")):
        with contextlib.suppress(OSError, ValidationError):
            measured.append(Rates.model_validate_json(path.read_bytes()).device)
    return [*DEFAULTS, *measured]


def rates_of(device: str) -> Rates:
    """Measured rates of a device where it was calibrated, else its kind's.

    Args:
        device: its name.
    """
    with contextlib.suppress(OSError, ValidationError):
        return Rates.model_validate_json(calibration_file(device).read_bytes())
    for part, rates in DEFAULTS.items():
        if re.search(rf"\b{part}\b", device, re.IGNORECASE):
            return rates.model_copy(update={"device": device})
    return DEFAULTS[OTHER].model_copy(update={"device": device, "source": OF_ANOTHER})


def calibration_file(device: str) -> Path:
    """Where the measured rates of a device are kept."""
    return user_folder() / "calibration" / f"{re.sub('[^A-Za-z0-9]+', '-', device).strip('-').lower()}.json"


def keep(rates: Rates) -> Path:
    """Write measured rates to where ``rates_of`` finds them, and return the file.

    Raises:
        OSError: if it cannot be written.
    """
    path = calibration_file(rates.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, rates.model_dump_json(indent=1) + "\n")
    return path
