"""``precompute(config)``: fill the cache with latents and embeddings. The work is done in ``caching.precompute``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.api import checked

if TYPE_CHECKING:
    from finetune.caching.precompute import PrecomputeReport
    from finetune.config.schema import RunConfig


@checked
def precompute(config: RunConfig | Mapping[str, Any] | str | Path, *, progress: bool = True) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: a configuration, the values of one, or its file.
        progress: draw progress bars, on the main process.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    import logging

    from finetune.caching.precompute import precompute
    from finetune.cogvideox.spec import read_spec
    from finetune.config.loading import as_config
    from finetune.config.rules import pin_model, require_valid
    from finetune.core.distributed import ProcessGroup
    from finetune.planner.plan import choose_memory

    ranks = ProcessGroup.current()
    config = pin_model(as_config(config), ranks.run_on_main)
    spec = read_spec(config.model.pretrained, config.model.revision)
    for warning in require_valid(config, spec) if ranks.is_main else ():
        logging.getLogger("finetune").warning(warning)
    config, _ = choose_memory(config)  # it decides how T5 is held
    return precompute(config, spec=spec, distributed=ranks, progress=progress)
