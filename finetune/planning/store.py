"""Rehearsals that were made already, kept in the user's cache folder; nothing is lost when it is deleted."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finetune.config import RunConfig
from finetune.files import atomic_write_text, digest_file, digest_of
from finetune.planning.curve import Phase
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.parts import Part
from finetune.planning.rehearse import Rehearsal, rehearse

_log = logging.getLogger(__name__)
_PHASES = TypeAdapter(tuple[Phase, ...])
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy")


def user_folder() -> Path:
    """Where this package keeps what can be made again: ``$XDG_CACHE_HOME/cogvideox-finetune``, or in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "cogvideox-finetune"


def stored(part: Part) -> tuple[Phase, ...]:
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
) -> Rehearsal:
    """As ``rehearse``, part by part from the user's cache."""
    return rehearse(config, layers=layers, phases=phases, card_bytes=card_bytes, through=stored)


def is_stored(config: RunConfig, layers: int | None, phases: Collection[PhaseName], card_bytes: int | None) -> bool:
    """Whether ``rehearsed`` would find it all."""

    def found(part: Part) -> tuple[Phase, ...]:
        return _PHASES.validate_json(_path(part).read_bytes())

    try:
        rehearse(config, layers=layers, phases=phases, card_bytes=card_bytes, through=found)
    except (OSError, ValidationError):
        return False
    return True


def _path(part: Part) -> Path:
    return user_folder() / "rehearsals" / f"{digest_of({**part.depends_on, 'versions': _versions()})}.json"


@cache
def _versions() -> dict[str, str]:
    """Of the libraries, and of this package's own code, which may be edited without a new version."""
    package = Path(__file__).parents[1]
    code = digest_of(
        {path.relative_to(package).as_posix(): digest_file(path) for path in sorted(package.rglob("*.py"))}
    )
    return {"finetune": code} | {name: importlib.metadata.version(name) for name in _LIBRARIES}
