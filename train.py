#!/usr/bin/env python3
"""Train as a configuration says: ``accelerate launch train.py --config run.yaml [--set optimizer.lr=2e-4]``.

The same as ``finetune train``, as a file that ``accelerate launch`` and ``torchrun`` can start. Exit codes: 0 done, 75
stopped by SIGTERM, SIGUSR1 or SIGINT with a checkpoint saved (the same command continues), 2 something in the
configuration or the data to mend, 1 a bug; the launchers themselves turn every other code into 1.
"""

import sys

from finetune.cli.main import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
