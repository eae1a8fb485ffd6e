"""One decode worker process: ``python -m finetune.datasets.decode_worker``, driven by ``media.child``.

It puts itself under the limits of ``limits``, says that it is ready, then reads requests of ``wire`` from standard
input and answers each on standard output. It ends when its input does, so it does not outlive the process that started
it.
"""

from __future__ import annotations

import os
import sys
import traceback

from finetune.datasets import decode_limits


def main() -> None:
    """Answer requests until standard input ends."""
    decode_limits.limit_process()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C libraries print; a stray line must not land between two answers
    from finetune.datasets import decode_pool as tasks
    from finetune.datasets import decode_pool as wire

    wire.send(answers, {"kind": "ready"})
    while True:
        try:
            request, number = wire.read_request(sys.stdin.buffer)
        except EOFError:
            return
        decode_limits.limit_memory(2 * wire.answer_bytes(request))
        answer: wire.DecodeAnswer | wire.BugError
        try:
            answer = tasks.answer(request)
        except Exception:
            answer = wire.BugError(traceback.format_exc())
        try:
            wire.write_answer(answers, answer, number)
        except BrokenPipeError:  # the main process is gone
            return


if __name__ == "__main__":
    main()
