"""``precompute`` as a function of the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.caching.precompute import PrecomputeReport
    from finetune.config.schema import RunConfig


@checked
def precompute(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    shard: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: a configuration, the values of one, or its file.
        shard: such as ``3/16``: encode only the third of sixteen parts, in a process that knows nothing of the others.
            Who ends last of all merges them.
        merge: encode nothing; file the manifest of parts that were encoded so, if all of it is there and whole.
        progress: draw progress bars, on the main process.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    import logging

    from finetune.caching.precompute import merge_parts, precompute
    from finetune.cogvideox.spec import spec_of
    from finetune.config.rules import pin_model, require_valid
    from finetune.config.schema import as_config
    from finetune.core.distributed import ProcessGroup
    from finetune.core.errors import ConfigError
    from finetune.datasets.parts import Part
    from finetune.planner.plan import choose_memory

    if merge and shard is not None:
        raise ConfigError("shard and merge are two steps", fix="run every shard first, then merge")
    part = None if shard is None else Part.parse(shard)
    ranks = ProcessGroup.current()
    config = pin_model(as_config(config), ranks.run_on_main)
    spec = spec_of(config.model)
    for warning in require_valid(config, spec) if ranks.is_main else ():
        logging.getLogger("finetune").warning(warning)
    config, _ = choose_memory(config)  # it decides how T5 is held
    if merge:
        return ranks.run_on_main(lambda: merge_parts(config, spec=spec, progress=progress))
    return precompute(config, spec=spec, distributed=ranks, progress=progress, part=part)
