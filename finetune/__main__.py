"""``python -m finetune`` is the ``finetune`` command."""

from finetune.cli.main import program

if __name__ == "__main__":
    program()
