"""``finetune plan`` and ``finetune calibrate`` from the command line, and the documents that are made from plans."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from waiting import HANG_S

from finetune.cli.app import OK, USER_ERROR
from finetune.cli.init import RECIPES
from finetune.cli.main import main
from finetune.cogvideox.spec import spec_of
from finetune.config.rules import memory_traits
from finetune.config.schema import load_config
from finetune.core.types import GIB
from finetune.planner import plan as plan_module
from finetune.planner.cost_model import DEFAULTS, save_rates
from finetune.planner.plan import BackgroundPrediction, predict_async
from finetune.planner.step_time import step_cost

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


@pytest.fixture
def plan(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``plan(*words, status=OK)``: what the command prints, on both streams."""

    def run(*words: str, status: int = OK) -> str:
        assert main(["plan", "--config", str(config_file), *words]) == status
        return "".join(capsys.readouterr())

    return run


def test_the_demo_model_is_planned_at_the_sizes_that_init_proposes(config_file, capsys):
    """Its VAE's tiles are so small that the last of a row may be narrower than a convolution: frames stay whole."""
    text = config_file.read_text().replace("./model", str(ROOT / "finetune" / "assets" / "demo"))
    config_file.write_text(text.replace("9x64x64", "9x48x80"))
    assert main(["plan", "--config", str(config_file)]) == OK
    assert "VAE pass" in capsys.readouterr().out


def test_a_table_from_json_files_alone(plan: Callable[..., str], config_file: Path) -> None:
    printed = plan("--card", "24GiB", "--processes", "2")
    assert "predicted, not measured" in printed and "T5 pass" in printed and "training" in printed
    assert re.search(r"a card of 24.0 GiB has \d+\.\d\d GiB to spare \(2\d\.\d\d GiB of it are for tensors\)", printed)
    assert "batch size 1, in each of 2 processes: predicted" in printed and "published or assumed" in printed
    assert f"--config {config_file}\n" in printed


def test_json_for_programs_a_picture_and_what_it_is_at(config_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Steps are told on standard error, from before torch is loaded on; the document stays one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "--config", str(config_file), "--json", "--plot", str(tmp_path / "curve.png")]) == OK
    printed = capsys.readouterr()
    first, *lines = printed.err.splitlines()
    assert first.startswith(f"planning {config_file}") and "estimating: training" in lines
    assert not logging.getLogger("finetune.planner").handlers, "what was heard is heard no longer"
    document = json.loads(printed.out)
    assert document["measured"] is False and document["fits"] is None and document["search"] is None
    assert document["peak_bytes"] == max(phase["peak_bytes"] for phase in document["phases"])
    assert document["s_per_step"] > 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_are_those_of_the_device_that_was_named(plan: Callable[..., str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for unknown in ("3060", "NVIDIA RTX A1000", "A100X"):
        printed = plan("--device", unknown)
        assert f"time: nothing is known of {unknown}, only of H100, H200, B200, A100" in printed
        assert "s/step" not in printed
    monkeypatch.setattr("finetune.planner.plan.device_here", lambda: "NVIDIA GeForce RTX 3060")
    assert "time: nothing is known of NVIDIA GeForce RTX 3060" in plan()
    save_rates(DEFAULTS["4090"].model_copy(update={"device": "NVIDIA GeForce RTX 3060", "source": "measured"}))
    assert "s/step on NVIDIA GeForce RTX 3060, from rates measured" in plan("--device", "NVIDIA GeForce RTX 3060")


REFUSED = {
    "--card 1200MiB": "too small",
    "--card plenty": "no amount of memory",
    "--processes 0": "at least one process",
    "--processes 2 --set memory.streamed_blocks=1": "works in a single process",
    "--plot FOLDER/nowhere/x.png": "no such folder to draw into",
    "--plot FOLDER": "this is a folder",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_planned_is_refused_with_2(plan: Callable[..., str], tmp_path: Path, words: str) -> None:
    assert REFUSED[words] in plan(*words.replace("FOLDER", str(tmp_path)).split(), status=USER_ERROR)


def test_a_picture_without_matplotlib_is_refused_before_the_work(plan: Callable[..., str], monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "find_spec", lambda _: None)
    monkeypatch.setattr(plan_module, "predict", lambda *_, **__: pytest.fail("it was planned first"))
    assert "pip install 'cogvideox-finetune[plot]'" in plan("--plot", "x.png", status=USER_ERROR)


def test_a_search_gives_a_section_to_write_and_says_which_plans_fit(plan: Callable[..., str], capsys) -> None:
    printed = plan("--budget", "24GiB", "--device", "4090")
    assert "memory:\n  checkpointing: none\n" in printed and "<- chosen" in printed and "4090" in printed
    words = ("--budget", "24GiB", "--device", "3060")
    printed = plan(*words)
    assert "times compared on an A100, because nothing is known of 3060" in printed
    assert "s/step" not in printed and "1.00" in printed, "how plans compare is known, and no seconds"
    rows = [line for line in printed.splitlines() if "fits, too" in line]
    assert printed.count("<- chosen") == 1 and 1 <= len(rows) <= 3
    document = plan(*words, "--json")
    search = json.loads(document[: document.rindex("}") + 1])["search"]
    assert all(each["s_per_step"] is None for each in search["others"])
    assert search["quantised_unasked"] is False and len(search["others"]) >= len(rows)


def test_calibrating_needs_a_gpu_and_a_place_to_keep_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["calibrate"]) == USER_ERROR
    assert "no CUDA device" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(plan_module, "device_here", lambda: "card")
    monkeypatch.setattr(plan_module, "calibrate", lambda *_, **__: pytest.fail("it was measured"))
    assert main(["calibrate"]) == USER_ERROR
    assert "what is measured cannot be written" in capsys.readouterr().err


def test_a_training_predicts_in_a_process_beside_it(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = load_config(config_file)
    runs = [predict_async(config, GIB, processes=2), predict_async(config, None)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        runs.append(predict_async(config, None))
    assert runs[0].result() is None and runs[0].news() == "", "it waits for nothing"
    runs[1].close()  # cut short
    made, gone, failed = (run.result(HANG_S) for run in runs)
    assert made and made.nbytes and "predicted in each process, in training" in made.message
    assert "more than this GPU has" in made.message
    assert runs[0].news() == made.message and runs[0].news() == "", "said once"
    assert failed and failed.nbytes is None and "could not be made" in failed.message
    assert gone and gone.nbytes is None
    for run in runs:
        run.close()
    assert not list(tmp_path.glob("finetune-plan-*"))


def test_without_room_for_its_files_there_is_no_prediction(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    run = predict_async(load_config(config_file), None)
    assert "no room for its files" in run.news()
    run.close()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"phases": []}', '{"phases": [{"name": 1}]}'])
def test_a_prediction_that_cannot_be_read_ends_no_training(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    prediction = BackgroundPrediction(None, tmp_path, None).result()
    assert prediction is not None and prediction.nbytes is None and "could not be made" in prediction.message


# ------------------------------------------------------------------------------------------------ documents in step


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_hours_and_gigabytes_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    make = script("scripts/make_cards.py")
    page = make.README.read_text()
    assert make.renewed(page) == page and page.count("`finetune init --model") == len(make.CARDS), "run `make docs`"
    monkeypatch.setattr(make, "STEPS", 3000)  # the canary
    assert make.renewed(page) != page


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
        assert config.memory.faults(memory_traits(config, spec_of(config.model, shipped=True))) == []
    # No two of them are the same run.
    states = [config.to_dict() for config in runs.values()]
    assert all(states.count(state) == 1 for state in states)


def test_every_piece_of_the_benchmark_fits_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/gpu.py")
    seconds = dict.fromkeys(benchmark.PIECES, 0.0)
    for name, config in benchmark.runs():
        (piece,) = [piece for piece, pattern in benchmark.PIECES.items() if re.search(pattern, name)]
        step_s = step_cost(config, spec_of(config.model, shipped=True), config.memory, DEFAULTS["H100"]).step_s
        seconds[piece] += 30 + 3 * step_s  # to make the model; one step that is not timed and two that are
        if name in benchmark.TAKEN_APART:
            seconds["breakdown"] += 60 + 2 * step_s
    for batch, heads, length, width in benchmark.ATTENTION:  # eight rounds each way, at 100 TFLOP/s
        seconds["attention"] += 5 * 8 * 7 * 2.0 * batch * heads * length**2 * width / 100e12
    for tokens, fan_in, fan_out in benchmark.PRODUCTS:
        seconds["products"] += 4 * 8 * 2.0 * tokens * fan_in * fan_out / 30e12
    assert all(0 < total < 540 for total in seconds.values()), seconds
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert [piece for piece in seconds if f"| `{piece}` |" not in readme] == []


def test_a_benchmark_that_is_broken_off_keeps_what_it_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    """With versions, also of what has none."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/gpu.py")
    rows = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--steps", "1", "--only", "2b", "--output", str(rows)])
    monkeypatch.setattr("record.versions.__defaults__", (("torch", "no-such-package"),))
    line = benchmark.line
    monkeypatch.setattr(benchmark, "line", lambda row: 1 / 0 if "12gb" in row["config"] else line(row))
    with pytest.raises(ZeroDivisionError):
        benchmark.main()
    kept = json.loads(rows.read_text())
    assert kept["versions"] | {"no-such-package": None} == kept["versions"]
    assert [row["config"] for row in kept["rows"]] == ["cogvideox-2b-lora.yaml", "cogvideox-2b-lora-12gb.yaml"]
    assert all(math.isfinite(row.get("grad_norm", math.nan)) for row in kept["rows"]), kept["rows"]


@pytest.mark.parametrize(
    ("piece", "keys"), [("attention", "backward_tflops"), ("products", "tflops"), ("breakdown", "by_kind_s")]
)
def test_every_other_piece_of_the_benchmark_runs_on_toys(piece, keys, tmp_path, monkeypatch) -> None:
    """So that a GPU's time is not spent on its mistakes; here what a CPU lacks is said row by row."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/gpu.py")
    monkeypatch.setattr(benchmark, "TAKEN_APART", benchmark.TAKEN_APART[1:2])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--only", piece, "--output", str(tmp_path / "rows.json")])
    assert benchmark.main() == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    measured = [row for row in rows if keys in row]
    assert len(measured) >= len(rows) / 4 and all(keys in row or "absent" in row for row in rows)


def test_every_goal_is_met_and_a_missed_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = script("benchmarks/memory.py")
    plans: dict[str, Any] = json.loads(benchmark.RESULTS.read_text())["plans"]
    assert list(plans) == [recipe.name for recipe in RECIPES] and len(plans) >= 14
    assert benchmark.missed(plans) == []
    for recipe in RECIPES:
        memory = load_config(ROOT / "configs" / recipe.name).memory.model_dump(mode="json")
        assert (plans[recipe.name]["goal_gib"], plans[recipe.name]["memory"]) == (recipe.goal_gib, memory)
    worse = plans | {RECIPES[0].name: plans[RECIPES[0].name] | {"training_gib": 99.0}}
    (message,) = benchmark.missed(worse)
    assert RECIPES[0].name in message and "99.0" in message
