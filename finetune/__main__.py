"""``python -m finetune`` is the ``finetune`` command."""

import sys

from finetune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
