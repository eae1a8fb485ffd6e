"""The process of one job: waits for its turn, runs ``python -m finetune ...`` and writes down how that ended.

It holds the job's lock for as long as it lives, in a session of its own: neither the page's server nor a terminal takes
it along. Nothing is imported here that a command would not import, and no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from finetune.core.files import atomic_write_text
from finetune.core.locks import hold
from finetune.web.jobs import ENDED, JOB, LOCK, PROCESS, ends_of, identity

_SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP")]
"""As far as the system has them."""


def main(folder: Path) -> None:
    """Run the job of a folder."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    with hold(folder / LOCK, "this job", waiting=lambda _: None):
        _write(folder, None)
        for earlier in job["after"]:
            ends_of(folder.parent / earlier)
        signals: list[int] = []
        for number in _SIGNALS:  # the command is what is stopped, and we note how
            signal.signal(number, lambda caught, _: signals.append(caught))
        with subprocess.Popen([*job["program"], *job["words"]], stdin=subprocess.DEVNULL) as child:
            _write(folder, child.pid)
            for number in _SIGNALS:
                signal.signal(number, lambda caught, _: child.send_signal(caught))
            for caught in signals:
                child.send_signal(caught)
            code = child.wait()
        atomic_write_text(folder / ENDED, json.dumps({"code": code}))


def _write(folder: Path, child: int | None) -> None:
    """Who runs: this process while it waits, then the command's."""
    atomic_write_text(folder / PROCESS, json.dumps({"began": child is not None, **identity(child or os.getpid())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
