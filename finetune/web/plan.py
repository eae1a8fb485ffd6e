"""What a configuration will take, for the page: the planner as a child process, asked once for each configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_of
from finetune.core.types import GIB
from finetune.memory.config import MemoryConfig
from finetune.web.jobs import Job, Jobs
from finetune.web.yaml_edit import on_one_line

DEVICES = ("", "H200", "H100", "A100", "4090")
"""GPUs that seconds are known of; empty for the one that is here."""

_KEPT = 40
"""Plans that stay remembered."""


@dataclass(frozen=True)
class Machine:
    """What a plan is for."""

    card: str = ""
    """Memory of the GPU, such as ``24GB``; empty for the one that is here."""
    device: str = ""
    """One of ``DEVICES``."""


@dataclass(frozen=True)
class Part:
    """A piece of the memory bar."""

    name: str
    gib: float
    start: float
    """Of the bar's length, 0 to 1."""
    share: float


@dataclass(frozen=True)
class Outlook:
    """A prediction, or that it is on its way, or why there is none."""

    pending: bool = False
    fault: str = ""
    parts: Sequence[Part] = ()
    peak_gib: float = 0.0
    card_gib: float | None = None
    card_at: float = 1.0
    """Where the card ends on the bar."""
    fits: bool | None = None
    where: str = ""
    """Of the peak, in words."""
    step_s: float | None = None
    hours: float | None = None
    """Of all steps, where their number is written."""
    memory: str = ""
    """A memory section that fits, as YAML, where the file's own does not."""


def outlook(plans: Jobs, config: RunConfig, file: str, machine: Machine, *, start: bool) -> Outlook:
    """What is known of a configuration.

    Args:
        plans: where predictions are kept.
        config: the configuration.
        file: of it, from the workspace.
        machine: that it is planned for.
        start: whether the planner is asked where nothing is known.
    """
    card, device = machine.card, machine.device
    key = digest_of([config.digest, card, device])
    words = ["plan", f"--config={file}", "--json"]
    words += [f"--card={card}"] if card else []
    words += [f"--device={device}"] if device else []
    jobs = [job for job in plans.all() if job.state not in ("stopped", "lost")]
    job = next((job for job in jobs if job.label == key), None)
    if job is None and not start:
        return Outlook(pending=True)
    if job is None:
        for other in jobs:
            other.stop()  # of an earlier text
        plans.prune(_KEPT)
        job = plans.start(words, label=key, in_line=False)
    if job.is_alive:
        return Outlook(pending=True)
    document = _document(job)
    if document is None:
        return Outlook(fault=job.log)
    found = _read(document, config)
    if found.fits is not False or not card or config.memory.kind == "auto":
        return found
    search = next((job for job in jobs if job.label == f"{key}+budget"), None)
    if search is None:
        search = plans.start([*words, f"--budget={card}"], label=f"{key}+budget", in_line=False)
    chosen = _document(search)
    section = MemoryConfig.model_validate(chosen["memory"]).changed() if chosen else {}
    return Outlook(**{**vars(found), "pending": search.is_alive, "memory": on_one_line(section) if section else ""})


def _document(job: Job) -> dict[str, Any] | None:
    """The JSON in what the planner printed."""
    _, brace, rest = f"\n{job.log}".partition("\n{")
    try:
        return dict(json.JSONDecoder().raw_decode(brace.strip() + rest)[0])
    except ValueError:
        return None


def _read(document: Mapping[str, Any], config: RunConfig) -> Outlook:
    phase = max(document["phases"], key=lambda phase: phase["peak_bytes"])
    sizes = {**phase["parts"], **document["beside_bytes"]}
    needed = document["peak_bytes"] + document["overhead_bytes"]
    card = document["card_bytes"]
    length = max(needed, card or 0)
    parts, at = [], 0.0
    for name, nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
        parts.append(Part(name, nbytes / GIB, at / length, nbytes / length))
        at += nbytes
    step_s, steps = document["s_per_step"], config.train.steps
    return Outlook(
        parts=parts,
        peak_gib=needed / GIB,
        card_gib=None if card is None else card / GIB,
        card_at=1.0 if card is None else card / length,
        fits=document["fits"],
        where=f"{phase['name']}: {phase['where']}",
        step_s=step_s,
        hours=None if step_s is None or steps is None else step_s * steps / 3600,
    )
