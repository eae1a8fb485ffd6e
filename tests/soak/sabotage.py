"""Ways to break what makes a run survive a kill: a soak that does not notice them proves nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from soak.probe import replace_everywhere


def plain_writes() -> None:
    """Files are written under their final names."""

    def instead(_: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: Path, parts: Iterable[memoryview]) -> str:
            from finetune.core.checksums import checksum_bytes

            path.parent.mkdir(parents=True, exist_ok=True)
            content = b"".join(parts)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.write(descriptor, content)
            os.fsync(descriptor)
            os.close(descriptor)
            return checksum_bytes(content)

        return write

    replace_everywhere("finetune.core.files:atomic_write", instead)


def forgotten_optimizer() -> None:
    """A resumed run begins with an empty optimizer."""
    replace_everywhere("finetune.optim.optimizers:load_optimizer_state", lambda _: lambda *_a, **_k: None)


def old_one_first() -> None:
    """Old checkpoints are removed before the new one is written."""

    def instead(save: Callable[..., Any]) -> Callable[..., Any]:
        def saving(run_dir: Path, *args: Any, **kwargs: Any) -> Any:
            import shutil

            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
            return save(run_dir, *args, **kwargs)

        return saving

    replace_everywhere("finetune.trainers.checkpoint:save_checkpoint", instead)


def immortal_workers() -> None:
    """Decode workers outlive the process that started them."""
    import subprocess

    real = subprocess.Popen

    def popen(command: Any, *args: Any, **kwargs: Any) -> Any:
        if "worker.serve(decode_pool.handle)" in str(command):
            real(["sleep", "15"])
        return real(command, *args, **kwargs)

    subprocess.Popen = popen  # type: ignore[misc, assignment]


def endless_patience() -> None:
    """A process that loses another waits instead of ending."""
    import time

    from finetune.cli import main as cli

    main = cli.main

    def waiting(*args: Any, **kwargs: Any) -> int:
        code = main(*args, **kwargs)
        if code:
            time.sleep(300)
        return code

    cli.main = waiting


SABOTAGE: dict[str, Callable[[], None]] = {
    "plain-writes": plain_writes,
    "forgotten-optimizer": forgotten_optimizer,
    "old-one-first": old_one_first,
    "immortal-workers": immortal_workers,
    "endless-patience": endless_patience,
}
