"""``finetune plan`` and ``finetune calibrate`` from the command line, and the documents that are made from plans."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from waiting import HANG_S

from finetune.cli.init import RECIPES
from finetune.cli.main import OK, USER_ERROR, main
from finetune.config.loading import load_config
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.core.types import GIB
from finetune.planner import plan as plan_module
from finetune.planner.cost_model import DEFAULTS, save_rates, step_cost
from finetune.planner.estimate import spec_of
from finetune.planner.plan import predict_async

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("estimates_kept")


@pytest.fixture
def config_file(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A run on the tiny model, of which only the JSON files are left."""
    for source in tiny_model("5b").rglob("*.json"):
        target = tmp_path / "model" / source.relative_to(tiny_model("5b"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {pretrained: ./model}\n"
        "data: {sources: [{path: clips}], buckets: [9x64x64]}\n"
        "method: {rank: 4}\noptimizer: {kind: adamw}\ntrain: {steps: 3}\noutput_dir: run\n"
    )
    return path


def test_a_table_from_json_files_alone(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(config_file), "--card", "24GiB"]) == OK
    said = capsys.readouterr().out
    assert "predicted, not measured" in said and "T5 pass" in said and "training" in said
    assert re.search(r"a card of 24.0 GiB has \d+\.\d\d GiB to spare \(2\d\.\d\d GiB of it are for tensors\)", said)
    assert said.endswith(f"--config {config_file}\n")
    assert "published or assumed" in said


def test_it_says_what_it_is_at(config_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """On standard error, from before torch is loaded on; the document for programs stays one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "--config", str(config_file), "--json"]) == OK
    printed = capsys.readouterr()
    first, *lines = printed.err.splitlines()
    assert first.startswith(f"planning {config_file}") and "estimating: training" in lines
    assert json.loads(printed.out)["s_per_step"] > 0
    assert not logging.getLogger("finetune.planner").handlers, "what was heard is heard no longer"


def test_seconds_are_those_of_the_device_that_was_named(config_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for unknown in ("3060", "NVIDIA RTX A1000", "A100X"):
        assert main(["plan", "--config", str(config_file), "--device", unknown]) == OK
        said = capsys.readouterr().out
        assert f"time: nothing is known of {unknown}, only of H100, H200, A100, 4090" in said and "s/step" not in said
    monkeypatch.setattr("finetune.planner.plan.device_here", lambda: "NVIDIA GeForce RTX 3060")
    assert main(["plan", "--config", str(config_file)]) == OK
    assert "time: nothing is known of NVIDIA GeForce RTX 3060" in capsys.readouterr().out
    save_rates(DEFAULTS["4090"].model_copy(update={"device": "NVIDIA GeForce RTX 3060", "source": "measured"}))
    assert main(["plan", "--config", str(config_file), "--device", "NVIDIA GeForce RTX 3060"]) == OK
    assert "s/step on NVIDIA GeForce RTX 3060, from rates measured" in capsys.readouterr().out


def test_a_card_that_is_too_small_is_2(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(config_file), "--card", "1200MiB"]) == USER_ERROR
    assert "too small" in capsys.readouterr().out
    assert main(["plan", "--config", str(config_file), "--card", "plenty"]) == USER_ERROR
    assert "no amount of memory" in capsys.readouterr().err


def test_json_for_programs_and_a_picture(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curve.png"
    assert main(["plan", "--config", str(config_file), "--json", "--plot", str(picture)]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["measured"] is False and found["fits"] is None
    assert found["peak_bytes"] == max(phase["peak_bytes"] for phase in found["phases"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_budget_gives_a_section_to_write(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(config_file), "--budget", "24GiB", "--device", "4090"]) == OK
    said = capsys.readouterr().out
    assert "memory:\n  checkpointing: none\n" in said and "<- chosen" in said and "4090" in said


def test_a_calibration_that_cannot_be_kept_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(plan_module, "device_here", lambda: "card")
    monkeypatch.setattr(plan_module, "calibrate", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match="what is measured cannot be written"):
        plan_module.run_calibration(1.0)


def test_calibrating_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["calibrate"]) == USER_ERROR
    assert "no CUDA device" in capsys.readouterr().err


def test_a_training_predicts_in_a_process_beside_it(config_file: Path) -> None:
    config = load_config(config_file)
    broken = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": "/nowhere"})})
    runs = [
        predict_async(config, 24 * GIB),
        predict_async(config, 24 * GIB, processes=2),
        predict_async(config, GIB),
        predict_async(broken, None),
    ]
    assert runs[0].result() is None and runs[0].news() == "", "it waits for nothing"
    alone, each, small, none = (run.result(HANG_S) for run in runs)
    assert alone and alone.nbytes and "predicted, in training" in alone.message
    assert runs[0].news() == alone.message and runs[0].news() == "", "said once"
    assert each and each.nbytes and each.nbytes >= alone.nbytes and "in each process" in each.message
    assert small and "more than this GPU has" in small.message
    assert none and none.nbytes is None and "could not be made" in none.message
    cut_short = predict_async(config, None)
    for run in (*runs, cut_short):
        run.close()
    gone = cut_short.result()
    assert gone is not None and gone.nbytes is None


def test_processes_and_places_are_looked_at_first(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["plan", "--config", str(config_file)]
    assert main([*asked, "--processes", "2"]) == OK
    assert "batch size 1, in each of 2 processes: predicted" in capsys.readouterr().out
    assert main([*asked, "--processes", "0"]) == USER_ERROR
    assert "at least one process" in capsys.readouterr().err
    assert main([*asked, "--processes", "2", "--set", "memory.streamed_blocks=1"]) == USER_ERROR
    assert "works in a single process" in capsys.readouterr().err
    assert main([*asked, "--plot", str(tmp_path / "nowhere" / "x.png")]) == USER_ERROR
    assert "no such folder to draw into" in capsys.readouterr().err
    assert main([*asked, "--plot", str(tmp_path)]) == USER_ERROR
    assert "this is a folder" in capsys.readouterr().err
    monkeypatch.setattr("finetune.planner.plan.find_spec", lambda _: None)
    monkeypatch.setattr("finetune.planner.plan.predict", lambda *_, **__: pytest.fail("it was planned first"))
    assert main([*asked, "--plot", str(tmp_path / "x.png")]) == USER_ERROR
    assert "pip install 'cogvideox-finetune[plot]'" in capsys.readouterr().err


def test_a_search_says_which_plans_fit(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--config", str(config_file), "--budget", "24GiB", "--device", "3090"]
    assert main(asked) == OK
    said = capsys.readouterr().out
    assert "times compared on an A100, because nothing is known of 3090" in said
    assert "s/step" not in said and "1.00" in said, "how plans compare is known, and no seconds"
    rows = [line for line in said.splitlines() if "fits, too" in line]
    assert said.count("<- chosen") == 1 and 1 <= len(rows) <= 3
    assert main([*asked, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)["search"]
    assert all(plan["s_per_step"] is None for plan in found["others"])
    assert found["quantised_unasked"] is False and len(found["others"]) >= len(rows)
    assert main(["plan", "--config", str(config_file), "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["search"] is None


# ------------------------------------------------------------------------------------------------ documents in step


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_have_the_figures_of_the_file() -> None:
    make = script("scripts/make_memory.py")
    found = json.loads(make.PLANS.read_text())
    pages = {path: path.read_text() for path in make.PAGES}
    for path, content in make.PAGES.items():
        assert make.renewed(pages[path], content(found)) == pages[path], "run scripts/make_memory.py"
    # The README's table of stock configurations, which is written by hand.
    (readme,) = (page for path, page in pages.items() if path.name == "README.md")
    stock = re.findall(r"\[config\]\(configs/([\w.-]+)\) \| ([\d.]+) \|", readme)
    assert len(stock) == 10
    assert stock == [(name, f"{found['examples'][name]:.1f}") for name, _ in stock]
    # The canary: another figure, other pages.
    name = next(iter(found["plans"]))
    found["plans"][name]["training_gib"] += 0.1
    assert all(make.renewed(pages[path], content(found)) != pages[path] for path, content in make.PAGES.items())
    with pytest.raises(ValueError, match="no markers"):
        make.renewed("# Memory", "")


def test_everything_that_is_measured_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/gpu.py")
    predicted = benchmark.predictions()
    runs = dict(benchmark.runs())
    assert len(runs) >= 20 and [name for name in runs if not predicted.get(name)] == []
    for config in runs.values():
        assert config.memory.faults(memory_traits(config, spec_of(config))) == []
    # No two of them are the same run.
    states = [config.to_dict() for config in runs.values()]
    assert all(states.count(state) == 1 for state in states)


def test_every_piece_of_the_benchmark_fits_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/gpu.py")
    seconds = dict.fromkeys(benchmark.PIECES, 0.0)
    for name, config in benchmark.runs():
        (piece,) = [piece for piece, pattern in benchmark.PIECES.items() if re.search(pattern, name)]
        step_s = step_cost(config, spec_of(config), config.memory, DEFAULTS["H100"]).step_s
        seconds[piece] += 30 + 3 * step_s  # to make the model; one step that is not timed and two that are
    assert all(0 < total < 540 for total in seconds.values()), seconds
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert [piece for piece in seconds if f"| `{piece}` |" not in readme] == []


def test_the_benchmark_runs_without_decoders_and_keeps_what_it_measured(tmp_path: Path) -> None:
    """Where it is broken off at the second row, the first is in the file, with versions of what has none too."""
    code = f"""
import sys
for name in ("decord", "datasets", "av", "imageio", "imageio_ffmpeg"):
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
sys.argv = ["gpu.py", "--tiny", "--steps", "1", "--only", "2b", "--output", {str(tmp_path / "rows.json")!r}]
import record
record.versions.__defaults__ = (("torch", "no-such-package"),)
import gpu
line = gpu.line
gpu.line = lambda row: 1 / 0 if "8gb" in row["config"] else line(row)
gpu.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr, done.stderr[-2000:]
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["versions"] | {"no-such-package": None} == kept["versions"]
    assert [row["config"] for row in kept["rows"]] == ["cogvideox-2b-lora.yaml", "cogvideox-2b-lora-8gb.yaml"]
    assert all(math.isfinite(row["grad_norm"]) for row in kept["rows"])


def test_every_goal_is_met_and_a_missed_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/memory.py")
    plans: dict[str, Any] = json.loads(benchmark.RESULTS.read_text())["plans"]
    assert list(plans) == [recipe.name for recipe in RECIPES] and len(plans) >= 11
    assert benchmark.missed(plans) == []
    for recipe in RECIPES:
        assert plans[recipe.name]["goal_gib"] == recipe.goal_gib
        written = RunConfig.model_validate({**_values(recipe.name)}).memory
        assert plans[recipe.name]["memory"] == written.model_dump(mode="json")
    worse = plans | {RECIPES[0].name: plans[RECIPES[0].name] | {"training_gib": 99.0}}
    (said,) = benchmark.missed(worse)
    assert RECIPES[0].name in said and "99.0" in said


def _values(name: str) -> dict[str, Any]:
    from finetune.config.loading import load_config

    return load_config(ROOT / "configs" / name).to_dict()
