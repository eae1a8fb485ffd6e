"""What reaches TensorBoard and the console."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import accelerate.tracking
import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from broken_disk import forked, mount_small_disk
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.checkpoint.folders import METRICS
from finetune.cli.streams import own_log
from finetune.config.schema import TrackingConfig
from finetune.core.errors import ConfigError
from finetune.trainers.console import Console, duration, sparkline
from finetune.trainers.tracking import StepRecord, Tracker, hparams, require_tracker

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "optimizer": {"kind": "adamw8bit", "lr": 1e-4},
    "data": {"sources": ["a", "b"], "fps": None},
    "root": Path("x"),
}


def tracker(run_dir: Path, *, resumed_step: int = 0, kind: str = "tensorboard") -> Tracker:
    config = TrackingConfig(kind=kind)
    accelerator = Accelerator(cpu=True, **config.accelerator_options(run_dir))
    return Tracker(config, accelerator, settings=SETTINGS, resumed_step=resumed_step)


def undocumented(page: str) -> set[str]:
    """Names of metrics in the code of training that ``page`` does not have."""
    code = "".join(path.read_text() for path in sorted((ROOT / "finetune/trainers").rglob("*.py")))
    names = set(re.findall(r'"((?:train|perf|heldout|trainsubset)/[a-z_]+)', code))
    assert len(names) >= 13
    return {name for name in names if f"`{name}`" not in page}


def test_every_metric_is_documented():
    page = (ROOT / "docs/curves.md").read_text()
    assert undocumented(page) == set()
    assert undocumented(page.replace("`perf/oom_notches`", "")) == {"perf/oom_notches"}, "canary"


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run_dir).Scalars(tag)]


def test_scalars_come_back_with_their_steps(tmp_path):
    ours = tracker(tmp_path)
    ours.log(1, {"train/loss": 0.5, "train/loss/t000-249": 0.25})
    ours.log(2, {"train/loss": 0.125})
    ours.close()
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 0.125)]
    assert scalars(tmp_path, "train/loss/t000-249") == [(1, 0.25)]


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    interrupted = tracker(tmp_path)
    for step in range(10):
        interrupted.log(step, {"train/loss": 1.0})
    interrupted.close()
    time.sleep(1.1)  # TensorBoard orders event files by name: the second, then a count in which 10 stands before 9
    resumed = tracker(tmp_path, resumed_step=6)
    for step in (7, 8):
        resumed.log(step, {"train/loss": 2.0})
    resumed.close()
    assert scalars(tmp_path, "train/loss") == [*((step, 1.0) for step in range(7)), (7, 2.0), (8, 2.0)]


def test_a_run_that_begins_anew_hides_the_old_one(tmp_path):
    for loss in (1.0, 2.0):
        time.sleep(1.1)  # event files are named, and so read, by the second they were begun in
        ours = tracker(tmp_path)
        for step in range(3):
            ours.log(step, {"train/loss": loss})
        ours.close()
    assert scalars(tmp_path, "train/loss") == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_a_video_is_an_animated_gif_of_all_frames(tmp_path):
    frames = np.zeros((5, 16, 24, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    ours = tracker(tmp_path)
    ours.log_video("samples/00", frames, step=3, fps=8)
    ours.close()
    (event,) = read(tmp_path).Images("samples/00")
    assert (event.step, event.width, event.height) == (3, 24, 16)
    gif = Image.open(io.BytesIO(event.encoded_image_string))
    assert gif.format == "GIF" and gif.n_frames == 5
    gif.seek(4)
    assert abs(int(np.asarray(gif.convert("RGB"))[0, 0, 0]) - 200) <= 4


def test_settings_are_recorded_once_and_survive_paths_lists_and_nulls(tmp_path):
    tracker(tmp_path).close()
    hparams = sorted(tmp_path.rglob("hparams.yml"))
    assert len(hparams) == 1 and "optimizer.lr: 0.0001" in hparams[0].read_text()
    tracker(tmp_path, resumed_step=4).close()
    assert sorted(tmp_path.rglob("hparams.yml")) == hparams


def test_raw_settings_would_crash_tensorboard(tmp_path):
    """The canary of ``hparams``: without it the run dies at its start."""
    accelerator = Accelerator(cpu=True, **TrackingConfig().accelerator_options(tmp_path))
    with pytest.raises(ValueError, match="should be one of int, float, str, bool"):
        accelerator.init_trackers("tensorboard", config={"root": Path("x")})


def test_hparams():
    assert hparams(SETTINGS) == {
        "optimizer.kind": "adamw8bit",
        "optimizer.lr": 1e-4,
        "data.sources": "a, b",
        "data.fps": "null",
        "root": "x",
    }


def test_none_writes_the_file_of_metrics_alone(tmp_path):
    ours = tracker(tmp_path, kind="none")
    ours.log(1, {"train/loss": 1.0})
    ours.log_video("samples/00", np.zeros((2, 8, 8, 3), np.uint8), 1, 8)
    ours.close()
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


class Service(GeneralTracker):
    """A tracker of accelerate's kind, as wandb's is: it may lose its connection."""

    name = "trackio"
    requires_logging_directory = False
    calls: ClassVar[list[tuple[object, ...]]] = []
    lost = False

    def __init__(self, project: str, **options: object) -> None:
        self.calls.append((project, options))

    def start(self) -> None:
        pass

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        self.calls.append((values["optimizer.kind"],))

    def log(self, values: dict, step: int | None, **_: object) -> None:
        if Service.lost:
            raise ConnectionError("the service is gone")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append(("finished",))


def test_trackers_that_accelerate_knows_are_used_by_name(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Service)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType("trackio")])
    monkeypatch.setattr(Service, "calls", [])
    monkeypatch.setattr(Service, "lost", False)
    ours = tracker(tmp_path / "first", kind="trackio")
    ours.log(1, {"train/loss": 0.5})
    ours.log_video("samples/00", np.zeros((2, 8, 8, 3), np.uint8), 1, 8)
    assert Service.calls == [("cogvideox-finetune", {"name": "first"}), ("adamw8bit",), (1, {"train/loss": 0.5})]
    monkeypatch.setattr(Service, "lost", True)
    for step in (2, 3):
        ours.log(step, {"train/loss": 0.5})
    ours.close()
    assert [record.message for record in caplog.records] == [
        "metrics are no longer written to trackio; training goes on: the service is gone"
    ]


def test_a_tracker_that_is_not_installed_is_refused(tiny_run):
    config = tiny_run(tracking={"kind": "clearml"})
    with pytest.raises(ConfigError, match="clearml is not installed") as caught:
        require_tracker(config, Accelerator(cpu=True, **config.tracking.accelerator_options(config.output_dir)))
    assert "pip install clearml" in caught.value.fix


def failing_writer(monkeypatch: pytest.MonkeyPatch, error: Exception, after: int) -> list[str]:
    """The event file fails for good after so many records, in whatever thread writes it; returns those threads."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    real, threads = RecordWriter.write, []

    def write(self: RecordWriter, data: bytes) -> None:
        threads.append(threading.current_thread().name)
        if len(threads) > after:
            raise error
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    return threads


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_disk_that_fails_in_the_writers_thread_does_not_end_or_hang_training(
    tmp_path, monkeypatch, caplog, capfd, after
):
    threads = failing_writer(monkeypatch, OSError(28, "No space left on device"), after)
    ours = tracker(tmp_path)
    for step in range(1, 30):
        ours.log(step, {"train/loss": 1.0, "train/lr": 1e-4})
    ours.log_video("samples/00", np.zeros((2, 8, 8, 3), np.uint8), 30, 8)
    ours.close()
    ours.close()
    assert len(threads) > after and threading.current_thread().name not in threads
    warnings = [record.message for record in caplog.records if "no longer written to tensorboard" in record.message]
    assert len(warnings) == 1 and "No space left" in warnings[0]
    assert "Traceback" not in capfd.readouterr().err


def test_without_the_guard_it_would_end_training(tmp_path, monkeypatch):
    """The canary of the test above."""
    failing_writer(monkeypatch, OSError(28, "No space left on device"), after=4)
    monkeypatch.setattr(Tracker, "_guarded", lambda _, action: action())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(OSError, match="No space left"):
        ours = tracker(tmp_path)
        for step in range(30):
            ours.log(step, {"train/loss": 1.0})


def test_a_disk_that_fails_only_at_the_end_is_told_at_close(tmp_path, monkeypatch, caplog):
    from tensorboard.summary.writer.record_writer import RecordWriter

    ours = tracker(tmp_path)
    ours.log(1, {"train/loss": 1.0})

    def full(self: RecordWriter) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RecordWriter, "flush", full)
    ours.close()
    assert "Input/output error" in caplog.text


def test_a_full_file_system_is_one_warning(tmp_path):
    def fill() -> tuple[int, str] | None:
        if not mount_small_disk(tmp_path, "64k"):
            return None
        said = io.StringIO()
        logging.getLogger("finetune.trainers.tracking").addHandler(logging.StreamHandler(said))
        ours = tracker(tmp_path)
        for step in range(2000):
            ours.log(step, {"train/loss": 1.0})
        ours.close()
        return (tmp_path / "tensorboard").is_dir(), said.getvalue()

    seen = forked(fill)
    if seen is None:
        pytest.skip("no file system can be mounted here; the errors are injected above")
    assert seen[0] and seen[1].count("No space left on device") == 2  # of the tracker, and of the file beside it


def test_another_threads_failure_is_still_shown(tmp_path, monkeypatch):
    """The canary of the silence above."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: shown.append(failure.exc_type))
    hook = threading.excepthook
    ours = tracker(tmp_path)
    assert threading.excepthook is not hook

    def fail() -> None:
        raise OSError("somebody else's")

    for work in (fail, lambda: 1 / 0):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    ours.close()
    assert shown == [OSError, ZeroDivisionError] and threading.excepthook is hook


# ------------------------------------------------------------------------------------------------------------ console


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, step_s: float = 1.0) -> StepRecord:
    return StepRecord(step, (0.5 / step, 1.5 / step), (1, 2), 1.0, 1e-4, 2 * step, step_s, 0.0, 1.5)


def run_console(stream: io.StringIO, steps: int, *, step_s: float = 1.0, **options: object) -> list[str]:
    clock = Clock()
    console = Console(steps, stream=stream, clock=clock, **options)
    for step in range(1, steps + 1):
        clock.now += step_s
        console.step(record(step, step_s))
    console.close()
    return stream.getvalue().splitlines()


def test_console_prints_plain_lines_at_intervals():
    lines = run_console(io.StringIO(), 25, interval_s=10)
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == "step 11/25  loss 0.0909  lr 1.00e-04  1.00 s/step  peak 1.50 GiB  ETA 14s"
    assert "ETA" not in lines[0] and "ETA" not in lines[-1]


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_console_redraws_a_panel_on_a_terminal(terminal):
    lines = run_console(terminal, 30, memory_gib=24.0)
    panel = "\n".join(lines[-6:])
    assert (
        "step 30/30" in panel and "100%" in panel and "1.50 of 24.0 GiB" in panel and "\x1b[1A" in terminal.getvalue()
    )
    assert any(bar in panel for bar in "▁▂▃▄▅▆▇█")
    for line in lines:
        assert len(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line)) <= 60


@pytest.mark.parametrize(("name", "value", "has"), [("NO_COLOR", "1", "panel"), ("TERM", "dumb", "lines")])
def test_a_terminal_that_wants_less_gets_less(terminal, monkeypatch, name, value, has):
    monkeypatch.setenv(name, value)
    run_console(terminal, 3)
    written = terminal.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", written)
    assert ("\x1b[" in written) == (has == "panel")


def test_notes_and_warnings_stand_above_the_panel(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal)
    console = Console(5, stream=terminal, clock=Clock())
    console.step(record(1))
    with own_log():
        console.note("saved [bold]here[/bold]")
        logging.getLogger("finetune").warning("the disk is slow")
    console.fact("held out", "0.1 at step 1")  # after the last step, it stands in what is left
    console.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    for text in ("saved [bold]here[/bold]", "warning: the disk is slow"):
        assert text in [line.strip() for line in plain]
    assert any("held out" in line and "0.1 at step 1" in line for line in plain)
    assert sys.stderr is terminal


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▁"), ([0.0, 1.0], "▁█"), ([1.0, 1.0, 1.0], "▁▁▁"), ([0.0, math.nan, 1.0], "▁██")],
)
def test_sparkline(values, bars):
    assert sparkline(values, 40) == bars


def test_console_is_silent_on_other_processes():
    stream = io.StringIO()
    console = Console(5, stream=stream, enabled=False)
    console.step(record(1))
    console.note("saved")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0s"), (59.6, "1m 00s"), (458, "7m 38s"), (10920, "3h 02m")])
def test_duration(seconds, words):
    assert duration(seconds) == words
