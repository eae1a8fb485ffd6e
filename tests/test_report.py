"""``report.html``: what it says of a run, and the page in a browser."""

from __future__ import annotations

import json
import logging
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Tab
from worlds import run_values

import finetune
from finetune.checkpoint.folders import HISTORY, METRICS
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.inference.videos import write_mp4
from finetune.reports.charts import Line, _ranges, smoothed, thinned, ticks
from finetune.reports.report import REPORT, charts, columns, settings, verdict, write_report
from finetune.reports.run_folder import read_run, read_runs
from finetune.trainers.tracking import MetricsFile

HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)> red"

Rows = list[tuple[int, float, float]]
"""Step, held-out loss, the same on training clips."""


def make_run(folder: Path, rows: Rows, *, steps: tuple[int, ...] = (), prompt: str = HOSTILE, **changes: Any) -> Path:
    """A run's folder as training leaves it, without the training."""
    changes = {"validation": {"samples": [{"prompt": prompt}]}, **changes}
    config = RunConfig.from_dict(run_values(Path("zai-org/CogVideoX-2b"), folder / "clips", folder, **changes))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    history = [{"step": s, "heldout": a, "trainsubset": b, "by_band": {}} for s, a, b in rows]
    (folder / HISTORY).write_text("".join(f"{json.dumps(row)}\n" for row in history))
    metrics = MetricsFile(folder / METRICS)
    for step in range(1, 201):
        loss = 1 / step + 0.1 * math.sin(step)
        metrics.write(step, {"train/loss": loss, "train/loss/t000-249": loss, "perf/peak_gib": 1 + step // 100})
    metrics.write(200, {"perf/predicted_peak_gib": 2.5})
    for step in steps:
        frames = np.full((9, 32, 48, 3), 40, np.uint8)
        frames[:, :, :16, 0] = np.linspace(0, 250, 9, dtype=np.uint8)[:, None, None]
        (folder / "samples" / f"step-{step:08d}").mkdir(parents=True)
        write_mp4(folder / "samples" / f"step-{step:08d}" / "00-seed0.mp4", frames, 8)
    return folder


# --------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        ([], "unmeasured", "Nothing measured"),
        ([(0, 1.0, 0.9), (100, 0.8, 0.7)], "learning", "lowest at the last step measured, 100, with 0.8000"),
        ([(0, 1.0, 0.9), (100, 0.8, 0.7), (200, 0.85, 0.6)], "memorising", "Memorising since step 100"),
        ([(0, 1.0, 0.9), (100, 0.8, 0.7), (200, 0.85, 0.75)], "worse", "on training clips as well"),
        ([(0, 1.0, 0.9), (100, 0.8, 0.7), (200, 0.803, 0.65)], "level", "No longer improving: step 100 has 0.8000"),
        ([(0, 1.0, 0.9), (100, 1.0002, 0.9001), (200, 0.9999, 0.8999)], "still", "Not moving"),
        ([(0, 1.0, 0.9), (100, 1.2, 0.8), (200, 1.3, 0.7)], "memorising", "No step was better than the base model"),
        ([(0, 0.17, 0.15), (4, 1.43, 1.2), (300, 0.75, 0.51)], "diverged", "Diverged: the held-out loss was 0.1700"),
        ([(0, 0.100, 0.090), (4, 0.119, 0.109)], "learning", "No step was better than the base model"),
        ([(0, 0.100, 0.090), (4, 0.121, 0.107)], "learning", "No step was better than the base model"),
        ([(0, 0.100, 0.090), (4, 0.121, 0.109)], "diverged", "0.1210 at best since"),
        ([(0, 0.17, 0.15), (4, 0.16, 0.14), (300, 0.75, 0.51)], "worse", "on training clips as well"),
        ([(0, 1.0, 0.9), (100, 1.0, 0.5)], "learning", "No step was better than the base model"),
    ],
)
def test_the_verdict_follows_from_the_measurements(rows, kind, words, tmp_path):
    judged = verdict(read_run(make_run(tmp_path / "run", rows)))
    assert (judged.kind, words in judged.text) == (kind, True)
    assert judged.advice and judged.command.startswith("finetune export ") is (kind != "diverged")


def test_the_best_checkpoint_is_exported_where_it_stands(tmp_path):
    folder = make_run(tmp_path / "run", [(0, 1.0, 0.9), (100, 0.8, 0.7), (200, 0.85, 0.6)])
    assert verdict(read_run(folder)).command.endswith("/run")
    (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
    assert verdict(read_run(folder)).command.endswith("/run/checkpoints/step-00000100")


def test_samples_are_the_base_the_best_the_last_and_some_between(tmp_path):
    rows = [(0, 1.0, 0.9), (30, 0.5, 0.5), (90, 0.9, 0.4)]
    run = read_run(make_run(tmp_path / "run", rows, steps=tuple(range(0, 100, 10))))
    shown = columns(run)
    assert len(shown) == 6 and dict(shown) | {0: "base", 30: "best", 90: "now"} == dict(shown)
    assert dict(columns(run, 3)) == {0: "base", 30: "best", 90: "now"}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("a/run",), ["run"]),
        (("a/run", "a/more"), ["run", "more"]),
        (("a/run", "b/run", "a/../b/more"), ["a/run", "b/run", "b/more"]),
        (("a/run", "./a/run"), ["run", "run"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(folders, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("a/run", "a/more", "b/run", "b/more"):
        make_run(Path(place), [])
    runs = read_runs(list(map(Path, folders)))
    assert [run.name for run in runs] == names
    assert {line.label for line in charts(runs)[0].lines} == set(names)
    monkeypatch.chdir("a/run")
    assert read_runs([Path()])[0].name == "run"


def test_settings_are_those_that_are_not_defaults_or_not_in_common(tmp_path):
    first = read_run(make_run(tmp_path / "a", []))
    second = read_run(make_run(tmp_path / "b", [], optimizer={"lr": 5e-4}))
    own = dict(settings([first]))
    assert own["optimizer.lr"] == ["0.001"] and own["optimizer.kind"] == ["adamw"] and "train.batch_size" not in own
    differing = dict(settings([first, second]))
    assert differing["optimizer.lr"] == ["0.001", "0.0005"] and "optimizer.kind" not in differing


@pytest.mark.parametrize("damage", ["missing", "cut", "rubbish"])
def test_what_is_damaged_is_left_out(damage, tmp_path, caplog):
    folder = make_run(tmp_path / "run", [(0, 1.0, 0.9)], steps=(0, 10))
    video = folder / "samples" / "step-00000010" / "00-seed0.mp4"
    if damage == "missing":
        for name in (METRICS, HISTORY):
            (folder / name).unlink()
    elif damage == "cut":
        (folder / METRICS).write_bytes((folder / METRICS).read_bytes()[:-20])
        video.write_bytes(video.read_bytes()[:100])
    else:
        (folder / METRICS).write_bytes(
            b'[]\n{"step": "x"}\n\xff\xfe\n{"step": 5, "train/loss": 0.5}\n' + b"[" * 100_000
        )
        video.write_bytes(b"rubbish")
    with caplog.at_level(logging.WARNING):
        text = write_report([folder], folder / REPORT, read_clips=False).read_text()
    assert text.count('class="moving"') == (2 if damage == "missing" else 1)
    assert damage == "missing" or "damaged lines are passed over" in caplog.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no run"):
        finetune.report(tmp_path)
    with pytest.raises(ConfigError, match="no run is named"):
        finetune.report([])


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_a_run_that_goes_on_keeps_its_metrics_up_to_there(tmp_path):
    path = tmp_path / METRICS
    first = MetricsFile(path)
    for step in range(1, 6):
        first.write(step, {"train/loss": float(step), "bad": math.nan})
    path.write_bytes(path.read_bytes() + b'{"step": 6, "tra')  # killed while it wrote
    second = MetricsFile(path, resumed_step=3)
    second.write(4, {"train/loss": 40.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": step, "train/loss": float(step)} for step in (1, 2, 3)),
        {"step": 4, "train/loss": 40.0},
    ]
    MetricsFile(path)  # a run that begins anew
    assert path.read_text() == ""


def test_metrics_that_cannot_be_written_are_one_warning(tmp_path, caplog):
    metrics = MetricsFile(tmp_path / METRICS)
    (tmp_path / METRICS).unlink()
    (tmp_path / METRICS).mkdir()
    for step in (1, 2):
        metrics.write(step, {"train/loss": 1.0})
    assert caplog.text.count("no longer written") == 1


def test_thinning_keeps_both_ends_of_every_stretch():
    points = [(step, float(step % 7)) for step in range(10_000)] + [(10_000, 99.0)]
    kept = thinned(points)
    assert len(kept) <= 402 and max(value for _, value in kept) == 99.0 and kept == sorted(kept)


def test_smoothing_starts_at_the_first_value_and_follows_a_constant():
    assert smoothed([(0, 4.0), (1, 4.0), (2, 4.0)]) == [(0, 4.0), (1, 4.0), (2, 4.0)]
    assert smoothed([]) == []


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 12), (1e-5, 2e-5), (0.1015, 0.1549), (5, 5)])
def test_ticks_are_few_and_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 7 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_a_single_spike_does_not_flatten_the_curve():
    raw = [(step, 1.0) for step in range(100)] + [(100, 1e6)]
    assert _ranges([Line("raw", raw, faint=True), Line("smooth", [(0, 0.5), (100, 1.5)])])[1][1] < 10


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def tab(browser, tmp_path):
    folder = make_run(tmp_path / "run", [(0, 1.0, 0.9), (100, 0.8, 0.7), (200, 0.85, 0.6)], steps=(0, 200))
    kept = folder / "report"
    kept.mkdir()
    strip = {"name": HOSTILE, "caption": HOSTILE, "bucket": "9x32x48", "pictures": []}
    (kept / "clips.json").write_text(json.dumps([strip]))
    tab = Tab(browser, write_report([folder], folder / REPORT))
    yield tab
    tab.page.close()


def test_the_page_acts_as_nobody_but_itself_and_plays_samples(tab):
    assert "Memorising since step 100" in tab.page.inner_text("header")
    button = tab.page.locator(".moving").first
    poster = button.locator("img").get_attribute("src")
    button.hover()
    assert button.locator("img").get_attribute("src") == button.get_attribute("data-clip") != poster
    tab.page.locator("h1").hover()
    assert button.locator("img").get_attribute("src") == poster
    assert tab.page.locator(".prompt bdi").first.inner_text().startswith("</script>")
    assert tab.noise == []


def test_values_are_read_off_a_curve(tab):
    figure = tab.page.locator("figure", has_text="held-out loss").first
    figure.locator("svg.chart").hover(position={"x": 5, "y": 60})
    assert figure.locator("output").first.inner_text() == "0: 1"
    box = figure.locator("svg.chart").bounding_box()
    figure.locator("svg.chart").hover(position={"x": box["width"] - 6, "y": 60})
    assert figure.locator("output").first.inner_text() == "200: 0.85"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_never_wider_than_its_window(tab, width):
    tab.page.set_viewport_size({"width": width, "height": 800})
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_several_runs_are_laid_over_each_other(browser, tmp_path):
    runs = [make_run(tmp_path / name, [(0, 1.0, 0.9), (100, 0.8, 0.7)], steps=(0, 100)) for name in ("one", "two")]
    page = finetune.report(runs, tmp_path / "compared.html")
    tab = Tab(browser, page)
    legend = tab.page.locator("figure", has_text="held-out loss").first.locator(".legend").inner_text()
    assert "one: held out" in legend and "two: training clips" in legend
    assert tab.page.locator(".verdict").count() == 2 and "output_dir" in tab.page.inner_text("table >> nth=-1")
    assert tab.noise == []
    tab.page.close()
    assert escape(HOSTILE)[:20] in page.read_text()
