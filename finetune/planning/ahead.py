"""Rehearsals on a second core: ``python -m finetune.planning.ahead`` makes one, and leaves it in the user's cache.

Whoever needs it later finds it there, or, where the cache cannot be written or the process came to grief, makes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.config import RunConfig, load_config
from finetune.planning.store import is_stored, rehearsed

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT_S = 300.0


def child_environment() -> dict[str, str]:
    """Of a process that is no part of the launch, sees no GPU and asks nobody."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@contextmanager
def beside(config: RunConfig, *jobs: Mapping[str, Any]) -> Iterator[None]:
    """Have ``rehearsed`` made in another process while what is inside runs; at the end it is there, if all went well.

    Args:
        config: see ``rehearse``.
        jobs: arguments of ``rehearsed`` beside it, ``layers``, ``phases`` (empty for nothing to do) and ``card_bytes``.
    """
    asked = [dict(job) for job in jobs if job["phases"] and not is_stored(config, **job)]
    if not asked or (os.cpu_count() or 1) < 2:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        command = [sys.executable, "-m", "finetune.planning.ahead", str(file), json.dumps(asked)]
        try:
            file.write_text(config.to_yaml(), encoding="utf-8")
            child = subprocess.Popen(
                command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError:
            yield
            return
        with child:
            try:
                yield
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_TIMEOUT_S)
            finally:
                child.kill()


if __name__ == "__main__":
    for told in json.loads(sys.argv[2]):
        rehearsed(load_config(Path(sys.argv[1])), **told)
