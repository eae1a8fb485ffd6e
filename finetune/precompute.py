"""``finetune.precompute``: fill the cache. What it does stands in ``caching.precompute``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.caching.precompute import PrecomputeReport
    from finetune.config.schema import RunConfig


def precompute(config: RunConfig | Mapping[str, Any] | str | Path, *, progress: bool = True) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: the run's configuration, its values, or its file.
        progress: draw progress bars, on the main process.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    from finetune.caching.precompute import precompute

    return precompute(config, progress=progress)
