"""The notebooks, run whole: every cell as it stands, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import finetune
from finetune.cli.app import OK, WARNED
from finetune.cli.main import main
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against
from finetune.config.schema import load_config

ROOT = Path(finetune.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts" / "make_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(path: Path) -> list[str]:
    document = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def program(cell: str) -> str:
    """A cell as Python: ``!finetune train {OPTIONS}`` is a call of ``shell``, with what stands in braces put in."""
    cell = re.sub(r"^( *)!(.*)$", lambda line: f"{line[1]}shell(f{line[2]!r})", cell, flags=re.M)
    return re.sub(r"^( *)%(.*)$", lambda line: f"{line[1]}magic({line[2]!r})", cell, flags=re.M)


def shell(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "finetune", line
    assert main(words) in (OK, WARNED), line


@pytest.fixture
def displayed(monkeypatch) -> list[Any]:
    """What a notebook shows; IPython, which it runs in elsewhere, need not be installed."""
    shown: list[Any] = []
    display = ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    display.HTML = str  # type: ignore[attr-defined]
    display.Video = lambda path, embed: Path(path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_notebooks_are_what_the_generator_writes():
    assert {path.name: path.read_text(encoding="utf-8") for path in NOTEBOOKS} == script().generate(), "make docs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, displayed, tmp_path, monkeypatch):
    if "int8" in path.stem:
        pytest.importorskip("torchao", reason="needs the extra `torchao`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_TINY", "1")
    scope: dict[str, Any] = {"shell": shell, "magic": pytest.fail}
    for cell in cells(path):
        exec(compile(program(cell), path.name, "exec"), scope)
    videos = [item for item in displayed if isinstance(item, Path)]
    assert len(videos) == 1 and videos[0].read_bytes()[4:8] == b"ftyp"
    if path.stem.startswith("train"):
        (report,) = (item for item in displayed if isinstance(item, str))
        assert "held-out loss" in report and "<iframe srcdoc=" in report
        assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
        assert (tmp_path / "doctor.html").is_file() and list((tmp_path / "adapter-comfyui").glob("*.safetensors"))


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem.startswith("train")], ids=lambda path: path.stem
)
def test_what_a_notebook_asks_for_at_full_size_fits_its_model(path, demo_clips, tmp_path, monkeypatch, capsys):
    """The same cells without the tiny model: the configuration is written and checked; nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINETUNE_TINY", raising=False)
    (tmp_path / "clips").symlink_to(demo_clips)
    scope: dict[str, Any] = {"magic": pytest.fail}
    _install, settings, configuration, *_rest = cells(path)
    exec(compile(program(settings), path.name, "exec"), scope)
    shell(configuration.splitlines()[0].removeprefix("!").format(**scope))
    assert "predicted to need" not in capsys.readouterr().out
    config = load_config("run.yaml", overrides=shlex.split(scope["OPTIONS"]))
    faults, _advice = check_against(config, read_spec(str(known_model(scope["MODEL"]))))
    assert faults == ()
