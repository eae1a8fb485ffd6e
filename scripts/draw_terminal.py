#!/usr/bin/env python3
"""Draw ``docs/terminal-*.svg``: what commands leave on a terminal, typed in a quickstart's folder.

make quickstart && python scripts/draw_terminal.py quickstart
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = 100

CASTS = {
    "check": ("check --config run.yaml", 40),
    "plan": ("plan --config cogvideox-5b-lora.yaml --card 24GB", 40),
    "train": ("train --config run.yaml --set train.steps=120 output_dir=runs/terminal", 16),
}
"""Of each picture: the command, and how many of its last lines are shown."""

_CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\r\n|\r|\n)")


def typed(words: list[str], folder: Path) -> str:
    """What a command writes to a terminal, its controls too. Raises CalledProcessError if it fails."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune", *words]
    child = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the last process at the other end is gone
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    if code := child.wait():
        raise subprocess.CalledProcessError(code, command)
    return b"".join(parts).decode("utf-8", "replace")


def screen(written: str) -> list[str]:
    """The lines that stand in the end, colours kept: as far as tqdm's bars and rich's panel move the cursor."""
    lines, row = [""], 0
    for part in _CONTROL.split(written):
        if part in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[row] = ""
        elif not part.startswith("\x1b") or part.endswith("m"):
            lines[row] += part
    while lines and not re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]).strip():
        lines.pop()
    return lines


def draw(name: str, command: str, lines: list[str]) -> None:
    """Write the picture of a command and its lines."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), f"finetune {command}"))
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=False)
    svg = console.export_svg(title="finetune", theme=MONOKAI, unique_id=f"terminal-{name}")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.S)  # nothing is fetched
    (ROOT / "docs" / f"terminal-{name}.svg").write_text(svg.replace("Fira Code", "ui-monospace"), encoding="utf-8")


def main(folder: Path) -> None:
    """Type every command, and draw what it leaves."""
    recipe = (ROOT / "configs" / "cogvideox-5b-lora.yaml").read_text(encoding="utf-8")
    (folder / "cogvideox-5b-lora.yaml").write_text(recipe.replace("../", ""), encoding="utf-8")
    for name, (command, most) in CASTS.items():
        lines = screen(typed(shlex.split(command), folder))
        draw(name, command, [line.replace(f"{folder.resolve()}/", "") for line in lines[-most:]])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
