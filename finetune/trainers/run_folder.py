"""A run's folder among processes: one job writes to it, and all processes of the job continue from one checkpoint."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from finetune import leases
from finetune.errors import CheckpointError
from finetune.leases import Holder, Lease
from finetune.ranks import Ranks
from finetune.space import disk_fix
from finetune.trainers.checkpoint import LoadedCheckpoint, choose_checkpoint, load_checkpoint, sweep

LEASES = ".in-use"
"""In the run's folder: who writes to it."""


@contextmanager
def hold_run_folder(
    run_dir: Path,
    ranks: Ranks,
    say: Callable[[str], object],
    *,
    beat_s: float = leases.BEAT_S,
    stale_s: float = leases.STALE_S,
) -> Iterator[None]:
    """Write to a run's folder as the only job that does, and clear away what a killed one left half done.

    All processes of a launch are one job: the main process holds the folder for them. A job of this machine whose
    process is gone has let go at that moment. Of another machine's nobody can ask: if it does not show itself within
    ``stale_s`` seconds it counts as dead, and until then this job waits.

    Args:
        run_dir: the run's folder; made if need be.
        ranks: this launch.
        say: prints a line for a person.
        beat_s: how often the job shows itself.
        stale_s: how long a silent one is believed in.

    Raises:
        CheckpointError: if another job writes to the folder, or the folder cannot be written to.
    """
    with ExitStack() as held:

        def acquire() -> None:
            try:
                _acquire(run_dir, held, say, beat_s, stale_s)
                sweep(run_dir)
            except OSError as error:
                raise CheckpointError(
                    f"the run folder cannot be written to: {error.strerror or error}",
                    where=str(run_dir),
                    fix=disk_fix(error),
                ) from error

        ranks.first(acquire)
        yield


def _acquire(run_dir: Path, held: ExitStack, say: Callable[[str], object], beat_s: float, stale_s: float) -> None:
    folder = run_dir / LEASES
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    while True:
        with ExitStack() as arriving:
            # First say so, then look: of two that arrive together at least one sees the other.
            lease = arriving.enter_context(leases.hold(folder, {"since": since, "writes": False}, beat_s=beat_s))
            others = _others(folder, lease, stale_s)
            if not others:
                lease.update({"since": since, "writes": True})
                leases.clear_dead(folder, stale_s=stale_s)
                held.push(arriving.pop_all())
                return
        writers = [other for other in others if other.about.get("writes") is not False]
        if writers:
            _wait_or_refuse(run_dir, writers[0], say, stale_s)
        else:
            time.sleep(random.uniform(0.05, 0.5))  # both step back, and not by the same time


def _others(folder: Path, own: Lease, stale_s: float) -> list[Holder]:
    return [holder for holder in leases.live(folder, stale_s=stale_s) if holder.path != own.path]


def _wait_or_refuse(run_dir: Path, writer: Holder, say: Callable[[str], object], stale_s: float) -> None:
    """Return when ``writer`` has let go or counts as dead; refuse once it is known to live."""
    words = f"host {writer.host}, process {writer.pid}, since {writer.about.get('since', 'an unknown time')}"
    if not writer.here:
        say(f"waiting up to {stale_s:.0f} s for the job that wrote to {run_dir} before: {words}")
    age_s = writer.age_s
    while not writer.here:
        time.sleep(min(1.0, stale_s / 20))
        seen = {holder.path: holder for holder in leases.live(run_dir / LEASES, stale_s=stale_s)}.get(writer.path)
        if seen is None:
            return
        if seen.age_s < age_s:  # touched since, so somebody is there
            break
        age_s = seen.age_s
    raise CheckpointError(
        f"another training writes to this run folder: {words}",
        where=str(run_dir),
        fix="wait for it or stop it; for a second run choose another output_dir",
    )


def checkpoint_to_continue(run_dir: Path, resume: str | Path, ranks: Ranks) -> LoadedCheckpoint | None:
    """The checkpoint that every process of the launch continues from: chosen by the main one, read by each.

    Raises:
        CheckpointError: as ``choose_checkpoint`` and ``load_checkpoint``, on every process.
    """
    chosen: list[LoadedCheckpoint | None] = []

    def choose() -> Path | None:
        chosen.append(choose_checkpoint(run_dir, resume))
        return None if chosen[0] is None else chosen[0].path

    path = ranks.first(choose)
    if path is None:
        return None

    def read() -> None:
        if not chosen:
            chosen.append(load_checkpoint(path))

    ranks.all(read)
    return chosen[0]
