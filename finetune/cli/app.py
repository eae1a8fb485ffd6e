"""What every verb of the ``finetune`` command shares: the application, exit codes, options, what is printed last."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

import finetune

F = TypeVar("F", bound=Callable[..., Any])

OK, BUG, USER_ERROR, WARNED, INTERRUPTED = 0, 1, 2, 3, 130

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: a failure that goes away by trying again."""

_OVERVIEW = """\
Fine-tune CogVideoX: LoRA or full, from clips and captions to an export that diffusers loads.

From one's own clips to a video, in five commands:

\b
  finetune init --model 5b --method lora --card 24GB --data clips
  finetune doctor --config run.yaml
  finetune train --config run.yaml
  finetune export runs/run
  finetune generate --adapter runs/run/export --prompt "a red kite at sea"
"""

_EXITS = """\
Exit codes: 0 done, 2 something to mend (the message says where), 3 the doctor has warnings and found nothing that stops
training, 1 a bug, 130 interrupted, 75 training was stopped by a signal and saved, or a collection or packing met a job
that uses the cache (the same command continues).
"""

app = typer.Typer(
    help=_OVERVIEW,
    epilog=_EXITS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},  # verbs inherit it
)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_next(*words: str) -> None:
    """End with the command that follows, to be typed in this folder."""
    print(f"next: {shlex.join(['finetune', *words])}")


def print_notes(notes: Sequence[str], kind: str = "note") -> None:
    for note in notes if is_main() else ():
        print(f"{kind}: {note}", file=sys.stderr)


def config_words(config: Path, overrides: Sequence[str]) -> list[str]:
    """How a call was told its configuration."""
    return ["--config", str(config), *(["--set", *overrides] if overrides else [])]


# ---------------------------------------------------------------------------------------------- options and their kinds


def option(help: str, metavar: str | None = None, panel: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel)


def flag(name: str, help: str, panel: str | None = None) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel)  # named, so that there is no --no-...


_CONFIG_HELP = "The run's YAML file."

_SET_HELP = r"Override fields, such as optimizer.lr=2e-4 data.buckets=\[49x480x720]; values are YAML."

Config = Annotated[Path, typer.Option(metavar="FILE", help=_CONFIG_HELP)]

Overrides = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE ...", help=_SET_HELP)]

Model = Annotated[str | None, option("Where the base model is now, if not where the run had it.", "MODEL")]

Device = Annotated[str | None, option("Such as cuda:1 or cpu; left out: a GPU where there is one.", "NAME")]


def verb(panel: str, *examples: str) -> Callable[[F], F]:
    """Make a function a verb; its examples stand below its options, and are parsed by a test.

    Args:
        panel: heading in the list of verbs.
        examples: command lines.
    """
    epilog = "Examples:\n\n\b\n" + "\n".join(f"  {example}" for example in examples)
    return app.command(epilog=epilog, rich_help_panel=panel)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"finetune {finetune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None: ...
