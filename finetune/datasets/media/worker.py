"""One decode worker process: ``python -m finetune.datasets.media.worker``, driven by ``video.DecodePool``.

It says ``("ready", None)``, then reads pickled ``(task, *arguments)`` from standard input and answers each with a
pickled ``(kind, value)`` on standard output; kind is ``done``, ``unusable`` (a DataError) or ``bug`` (a traceback). It
ends when its input does, so it does not outlive the process that started it.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from finetune.errors import DataError


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C libraries print; a stray line must not land between two answers
    from finetune.datasets.media.frames import probe_file, read_clip

    tasks: dict[str, Callable[..., object]] = {"probe": probe_file, "decode": read_clip}
    _send(answers, ("ready", None))
    while True:
        try:
            task, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            answer = ("done", tasks[task](*arguments))
        except DataError as error:
            answer = ("unusable", error)
        except MemoryError:
            answer = ("unusable", DataError("not enough memory to decode this file", where=str(arguments[0])))
        except Exception:
            answer = ("bug", traceback.format_exc())
        try:
            _send(answers, answer)
        except BrokenPipeError:  # the main process is gone
            return


def _send(answers: BinaryIO, answer: tuple[str, Any]) -> None:
    pickle.dump(answer, answers, protocol=5)
    answers.flush()


if __name__ == "__main__":
    main()
