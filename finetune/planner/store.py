"""Rehearsals that were made already, kept in the user's cache folder; nothing is lost when it is deleted."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Collection
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_file, digest_of
from finetune.core.files import atomic_write_text, user_folder
from finetune.planner.estimate import Estimate, estimate
from finetune.planner.memory_tracker import Phase
from finetune.planner.phases import PHASES, EstimatedPart, PhaseName

_log = logging.getLogger(__name__)

_PHASES = TypeAdapter(tuple[Phase, ...])

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy")


def stored(part: EstimatedPart) -> tuple[Phase, ...]:
    """A part's phases from the user's cache, where the same was made by the same code; made and kept otherwise."""
    path = _path(part)
    with contextlib.suppress(OSError, ValidationError):  # absent, or cut short: it is made again
        return _PHASES.validate_json(path.read_bytes())
    layers = part.depends_on.get("layers")
    name = PHASES.get(part.depends_on.get("phase", ""), PHASES["train"])  # the run's phases are rehearsed together
    _log.info("rehearsing: %s%s", name, f", with {layers} blocks" if layers else "")
    phases = part.make()
    with contextlib.suppress(OSError):  # a home that cannot be written costs time, and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, _PHASES.dump_json(phases).decode())
    return phases


def rehearsed(
    config: RunConfig,
    *,
    layers: int | None = None,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
) -> Estimate:
    """As ``rehearse``, part by part from the user's cache."""
    return estimate(config, layers=layers, phases=phases, card_bytes=card_bytes, through=stored)


def is_stored(config: RunConfig, layers: int | None, phases: Collection[PhaseName], card_bytes: int | None) -> bool:
    """Whether ``rehearsed`` would find it all."""

    def found(part: EstimatedPart) -> tuple[Phase, ...]:
        return _PHASES.validate_json(_path(part).read_bytes())

    try:
        estimate(config, layers=layers, phases=phases, card_bytes=card_bytes, through=found)
    except (OSError, ValidationError):
        return False
    return True


def _path(part: EstimatedPart) -> Path:
    return user_folder() / "rehearsals" / f"{digest_of({**part.depends_on, 'versions': _versions()})}.json"


@cache
def _versions() -> dict[str, str]:
    """Of the libraries, and of this package's own code, which may be edited without a new version."""
    package = Path(__file__).parents[1]
    code = digest_of(
        {path.relative_to(package).as_posix(): digest_file(path) for path in sorted(package.rglob("*.py"))}
    )
    return {"finetune": code} | {name: importlib.metadata.version(name) for name in _LIBRARIES}
