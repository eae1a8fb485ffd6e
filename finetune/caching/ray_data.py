"""Precompute on a Ray cluster: each part of a dataset is a row of ``ray.data``, encoded by a task of its own.

Ray starts the tasks, retries those whose machine went away, and keeps GPUs apart; all else is ``caching.parts``. The
cache, the clips and the model have to lie where every machine sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.caching.precompute import PrecomputeReport, merge_parts, precompute
from finetune.config.rules import pin_model
from finetune.config.schema import RunConfig, as_config
from finetune.core.errors import ConfigError
from finetune.datasets.parts import Part


def precompute_on_ray(
    config: RunConfig | Mapping[str, Any] | str | Path, parts: int, *, num_gpus: float = 1.0, num_cpus: float = 1.0
) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset in ``parts`` Ray tasks, and prove that all of it is there.

    Connects to the cluster as Ray does by itself (``RAY_ADDRESS``); ``ray.init`` before this decides otherwise. Killed
    at any moment, the next call goes on where this one stopped.

    Args:
        config: a configuration, the values of one, or its file. Its ``memory`` must be ``manual``.
        parts: how many tasks; twice as many as there are GPUs even their work out.
        num_gpus: of each task; 0 encodes on CPUs.
        num_cpus: of each task, its decode workers included.

    Raises:
        ConfigError: if Ray is not installed, or ``parts`` is below 1.
        CacheError: naming what is missing or damaged in the end.
        Exception: as ``precompute``, by a task.
    """
    try:
        import ray.data
    except ImportError:
        fix = "pip install 'cogvideox-finetune[ray]'"
        raise ConfigError("Ray is not installed", fix=fix) from None
    if parts < 1:
        raise ConfigError(f"a dataset has no {parts} parts", where="parts", fix="ask for 1 or more")
    chosen = pin_model(as_config(config))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        report = precompute(chosen, progress=False, part=Part.parse(row["part"]))
        return {"part": row["part"], "encoded": sum(report.encoded.values())}

    rows = [{"part": f"{number}/{parts}"} for number in range(1, parts + 1)]
    tasks = ray.data.from_items(rows, override_num_blocks=parts)
    tasks.map(encode, num_gpus=num_gpus, num_cpus=num_cpus).take_all()
    return merge_parts(chosen)
