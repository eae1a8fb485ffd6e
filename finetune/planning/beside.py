"""A training's own prediction: made when it starts, compared with what was measured when it ends.

It is made in a process of its own that sees no GPU. Under fake tensors the package's code must not find a device, and a
training must not depend on whether a prediction could be made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.cards import GIB, to_gib, usable
from finetune.config import RunConfig
from finetune.errors import first_line
from finetune.planning.ahead import child_environment
from finetune.planning.card import WORKSPACES
from finetune.planning.names import OF_THE_RUN, PHASES

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Prediction:
    """What a run was predicted to allocate while it trains, validation sampling included."""

    nbytes: int | None
    """None where it could not be predicted."""
    said: str
    """In words, or why there is no figure."""
    workspaces: int = 0
    """Bytes that cuBLAS holds beside the tensors, which are allocated, and so measured, with them."""

    def compared(self, measured_gib: float) -> str:
        """Predicted beside measured, for a log; empty where nothing was predicted."""
        if self.nbytes is None:
            return ""
        predicted = (self.nbytes + self.workspaces) / GIB
        off = 100 * (measured_gib / predicted - 1)
        return f"peak memory: predicted {predicted:.2f} GiB, measured {measured_gib:.2f} GiB ({off:+.1f} %)"


class Forecaster:
    """Predicts a run in a process beside this one, from now until ``prediction`` is asked for.

    Args:
        config: of the run, its memory section resolved.
        card_bytes: memory of the GPU, less what other programs hold; None where there is none.
        device: name of the GPU; empty for one of which nothing is known.
        processes: how many train a whole model each (DDP).
    """

    def __init__(self, config: RunConfig, card_bytes: int | None, *, device: str = "", processes: int = 1) -> None:
        self._card_bytes = card_bytes
        self._folder = tempfile.TemporaryDirectory()
        self._child: subprocess.Popen[str] | None = None
        self._failed = ""
        file = Path(self._folder.name) / "run.yaml"
        command = [
            sys.executable,
            "-m",
            "finetune",
            "plan",
            "--json",
            "--config",
            str(file),
            "--processes",
            str(processes),
            *(["--device", device] if device else []),
        ]
        try:
            file.write_text(config.to_yaml(), encoding="utf-8")
            self._child = subprocess.Popen(
                command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            self._failed = first_line(error)

    def prediction(self) -> Prediction:
        """Wait for it; nothing is raised, because a run is worth more than its prediction."""
        try:
            if self._child is None:
                return Prediction(None, f"could not be made: {self._failed}")
            output, errors = self._child.communicate(timeout=_TIMEOUT_S)
            if not output.strip():
                last = errors.strip().splitlines()[-1:]
                return Prediction(None, f"could not be made: {' '.join(last)}")
            return _read(json.loads(output), self._card_bytes)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            return Prediction(None, f"could not be made: {first_line(error)}")
        finally:
            self.close()

    def close(self) -> None:
        """End the process, if it still runs, and forget its files."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.communicate()
        self._folder.cleanup()


def _read(found: Mapping[str, Any], card_bytes: int | None) -> Prediction:
    run = [phase for phase in found["phases"] if phase["name"] in {PHASES[name] for name in OF_THE_RUN}]
    top = max(run, key=lambda phase: int(phase["peak_bytes"]))
    nbytes = int(top["peak_bytes"])
    processes, workspaces = int(found["processes"]), int(found["beside_bytes"][WORKSPACES])
    each = " in each process" if processes > 1 else ""
    said = f"{to_gib(nbytes)} predicted{each}, in {top['name']}: {top['where']}"
    if card_bytes is not None and (over := nbytes - usable(card_bytes, processes)) > 0:
        said += (
            f"; with {to_gib(card_bytes - usable(card_bytes, processes))} for the CUDA context, libraries and"
            f" fragmentation that is {to_gib(over)} more than this GPU has (finetune plan --budget finds what fits)"
        )
    return Prediction(nbytes, said, workspaces)
