"""Running one command line: which exit code it ends with, and what is said of an error."""

from __future__ import annotations

import atexit
import gc
import os
import platform
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import typer

import finetune
from finetune.cli import data, runs, sampling, sharing  # noqa: F401  (their functions become verbs of the app, in this order)
from finetune.cli.app import BUG, INTERRUPTED, OK, USER_ERROR, app
from finetune.cli.streams import lasting_streams, open_streams, own_log, quiet_libraries
from finetune.core.errors import ConfigError, FinetuneError, first_line, is_out_of_memory, is_refusal
from finetune.core.text import shown

_SYSTEM_FIX = "name a folder that can be written and has room, or change its owner and rights"

_MEMORY_FIX = (
    "free the GPU (is another program on it?), ask `finetune plan --budget` what fits, give `generate` a smaller"
    " --bucket or --offload, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
)

_LASTING = (
    *("caption", "prepare", "precompute", "train", "lr-find", "replay", "export", "convert", "merge", "push"),
    *("quickstart", "generate", "invert", "vae", "enhance", "story", "ui"),
)
"""Verbs whose outcome is not what they print: that nobody can read it is no reason to stop."""


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line in a process of its own, which ends with it.

    Importing torch and diffusers makes half a million objects that stay. Python would search them for cycles on the way
    and take them apart at the end, for seconds (docs/performance.md): it searches less often, and ends the process when
    all that was to be done at exit has been done.

    Args:
        argv: see ``main``.
    """
    gc.set_threshold(10_000, 10, 10)
    codes: list[int] = []

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # there may be none, or nobody who reads it
                stream.flush()
        if codes:
            os._exit(codes[0])

    atexit.register(leave)  # what is registered first is called last
    codes.append(main(argv))
    sys.exit(codes[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; ``_EXITS`` lists them.

    Args:
        argv: the words after the program's name; None takes the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    lasting = bool(words) and words[0] in _LASTING
    open_streams()
    quiet_libraries()
    with lasting_streams() if lasting else nullcontext(), own_log():
        try:
            _require_folder()
            command = typer.main.get_command(app)
            with command.make_context("finetune", list(one_value_each(words))) as context:
                from finetune.core.gpu import grow_segments

                grow_segments()
                code = command.invoke(context)
            sys.stdout.flush()
            return code or OK
        except typer.Exit as stop:  # after --help and --version
            return stop.exit_code
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and not lasting:
                # The reader of `finetune ... | head` has seen enough. Without this the flush at exit would fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return OK
            code, message = _outcome(error)
            if code == BUG:
                traceback.print_exc()
            if message:
                # A traceback has the notes already.
                notes = [] if code == BUG else getattr(error, "__notes__", [])
                print("\n".join([f"{_rank()}{message}", *notes]), file=sys.stderr)
            return code


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of what ended a command, and what is said of it."""
    if isinstance(error, typer.TyperException):  # words that do not parse
        message = error.format_message().replace("Value error, ", "")
        if not message:  # no word at all: the help has been printed
            return USER_ERROR, ""
        if choice := re.search("'(.*)' is not one of (.*)[.]", message):
            from finetune.config.messages import did_you_mean

            message += did_you_mean(choice[1], re.findall("'(.*?)'", choice[2]))
        return USER_ERROR, f"error: {message}"
    if isinstance(error, FinetuneError):
        return USER_ERROR, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if is_refusal(error):
        where = f"\n  where: {shown(str(error.filename))}" if error.filename else ""
        return USER_ERROR, f"error: {error.strerror}{where}\n  fix:   {_SYSTEM_FIX}"
    if is_out_of_memory(error):
        return USER_ERROR, f"error: out of memory: {first_line(error)}\n  fix:   {_MEMORY_FIX}"
    torch_version = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    return BUG, (
        "This is a bug in finetune, not in your configuration. Please report it in the project's issue tracker, with\n"
        f"the lines above and: finetune {finetune.__version__}, Python {platform.python_version()}, torch"
        f" {torch_version}, {platform.system()} {platform.machine()}"
    )


def one_value_each(words: Sequence[str]) -> Iterator[str]:
    """``--set a=1 b=2`` as ``--set a=1 --set b=2``, and ``--limit`` alike: typer's options take one word each."""
    option = ""
    for index, word in enumerate(words):
        if word.startswith("-") or not option:  # no assignment begins with a dash: -h does not belong to --set
            option = word if word in ("--set", "--limit") else ""
        elif words[index - 1] != option:
            yield option
        yield word


def _require_folder() -> None:
    try:
        Path.cwd()
    except OSError:
        raise ConfigError(
            "the current folder is gone: somebody deleted or moved it", fix="cd to one that exists"
        ) from None


def _rank() -> str:
    """Which process speaks, where several do."""
    return f"[rank {os.environ.get('RANK', '0')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
