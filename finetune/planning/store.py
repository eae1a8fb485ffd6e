"""Rehearsals that were made already, kept in the user's cache folder; nothing is lost when it is deleted."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune.config import RunConfig
from finetune.facts import CONFIG_FILES, json_folder
from finetune.files import atomic_write_text, digest_file, digest_of
from finetune.planning.names import PHASES, PhaseName
from finetune.planning.rehearse import Rehearsal, rehearse

_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy")


def user_folder() -> Path:
    """Where this package keeps what can be made again: ``$XDG_CACHE_HOME/cogvideox-finetune``, or in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "cogvideox-finetune"


def rehearsed(
    config: RunConfig,
    *,
    layers: int | None = None,
    phases: Collection[PhaseName] = tuple(PHASES),
    card_bytes: int | None = None,
    make: Callable[..., Rehearsal] = rehearse,
) -> Rehearsal:
    """As ``rehearse``, from the user's cache where the same was rehearsed by the same code.

    Args:
        config: see ``rehearse``.
        layers: see ``rehearse``.
        phases: see ``rehearse``.
        card_bytes: see ``rehearse``.
        make: what makes one that is not there.
    """
    path = _path(config, layers, phases, card_bytes)
    adapter = TypeAdapter(Rehearsal)
    with contextlib.suppress(OSError, ValidationError):  # absent, or cut short: it is made again
        return adapter.validate_json(path.read_bytes())
    rehearsal = make(config, layers=layers, phases=phases, card_bytes=card_bytes)
    with contextlib.suppress(OSError):  # a home that cannot be written costs time, and nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, adapter.dump_json(rehearsal).decode())
    return rehearsal


def is_stored(config: RunConfig, layers: int | None, phases: Collection[PhaseName], card_bytes: int | None) -> bool:
    """Whether ``rehearsed`` would find it."""
    return _path(config, layers, phases, card_bytes).is_file()


def _path(config: RunConfig, layers: int | None, phases: Collection[PhaseName], card_bytes: int | None) -> Path:
    return user_folder() / "rehearsals" / f"{_key(config, layers, phases, card_bytes)}.json"


def _key(config: RunConfig, layers: int | None, phases: Collection[PhaseName], card_bytes: int | None) -> str:
    return digest_of(
        {
            "config": relevant(config),
            "layers": layers,
            "phases": sorted(phases),
            "card_bytes": card_bytes if config.cache.vae_tiling == "auto" and "encode" in phases else None,
            "versions": _versions(),
        }
    )


def relevant(config: RunConfig) -> dict[str, Any]:
    """What of a configuration, and of its model's JSON, a rehearsal depends on."""
    folder = json_folder(config.model.pretrained, config.model.revision)
    values = config.to_dict()
    train, validation = values["train"], values["validation"]
    return {
        "model": {name: digest_file(folder / name) for name in CONFIG_FILES.values() if (folder / name).is_file()},
        "dtype": values["model"]["dtype"],
        "buckets": values["data"]["buckets"],
        "cache": {name: values["cache"][name] for name in ("text_batch_size", "vae_tiling")},
        "method": values["method"],
        "optimizer": {name: value for name, value in values["optimizer"].items() if name != "lr"},
        "train": {name: train[name] for name in ("batch_size", "accumulation", "max_grad_norm", "ema_decay")},
        "memory": values["memory"],
        "sampling": {name: validation[name] for name in ("bucket", "guidance_scale", "sample_every")}
        | {"samples": bool(validation["samples"])},
    }


@cache
def _versions() -> dict[str, str]:
    """Of the libraries, and of this package's own code, which may be edited without a new version."""
    package = Path(__file__).parents[1]
    code = digest_of(
        {path.relative_to(package).as_posix(): digest_file(path) for path in sorted(package.rglob("*.py"))}
    )
    return {"finetune": code} | {name: importlib.metadata.version(name) for name in _LIBRARIES}
