"""What a signal does in every phase of a training, in this process and in real ones: the table in docs/training.md."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from waiting import HANG_S, until
from worlds import assert_same_run, history, run_values, saved_steps

from finetune.checkpoint import save
from finetune.cli.app import INTERRUPTED, OK, PREEMPTED
from finetune.cli.main import main
from finetune.config.schema import RunConfig
from finetune.datasets.dataloader import BatchMaker
from finetune.trainers import loop, validation
from finetune.trainers.loop import train
from finetune.trainers.run import Run, TrainedModel
from finetune.trainers.stopping import SIGNALS, StopRequest

ROOT = Path(__file__).parents[1]
WATCHED = {
    "data": {"holdout": 1},
    "train": {"steps": 4},
    "validation": {
        "every": 2,
        "at_start": True,
        "timesteps": 4,
        "samples": [{"prompt": "a red circle"}, {"prompt": "a blue square"}],
        "sample_every": None,
        "num_inference_steps": 1,
    },
}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def before(owner: object, name: str, call: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Inside, do something just before a function's ``call``-th call (from 1); yields its calls so far."""
    inner, calls = getattr(owner, name), []

    def watched(*words, **named):
        calls.append(1)
        if len(calls) == call:
            act()
        return inner(*words, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield calls


# ------------------------------------------------------------------------------------------------- phase by phase


@pytest.fixture(autouse=True)
def hang_ups_are_heard():
    """Also where nohup runs the tests, under which SIGHUP is ignored by everything that it starts."""
    own = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, own)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_in_a_step_finishes_it_and_saves(tiny_run, calm_run, number):
    calm = calm_run()
    config = tiny_run("run")
    with before(TrainedModel, "losses", 3, lambda: send(number)):
        stopped = train(config)
    assert stopped.stopped_by == signal.Signals(number).name and stopped.step == 3
    assert saved_steps(config.output_dir) == [3]
    assert_same_run(train(config), calm)


def test_the_command_says_75_then_0_and_0_again(tiny_run, tmp_path, capsys):
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(tiny_run("run").to_yaml())
    with before(TrainedModel, "losses", 2, lambda: send(signal.SIGUSR1)):
        assert main(["train", "--config", str(run_yaml)]) == PREEMPTED
    assert "SIGUSR1: stopped after 2 of 4 steps" in capsys.readouterr().out
    assert [main(["train", "--config", str(run_yaml)]) for _ in range(2)] == [OK, OK]
    assert saved_steps(tmp_path / "run") == [2, 4]


def test_a_second_ctrl_c_stops_unsaved(tiny_run, tmp_path):
    config = tiny_run("run", checkpoint={"every": 1})

    def twice() -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)

    with before(TrainedModel, "losses", 3, twice), pytest.raises(KeyboardInterrupt):
        train(config)
    assert saved_steps(config.output_dir) == [1, 2]
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(config.to_yaml())
    with before(TrainedModel, "losses", 1, twice):
        assert main(["train", "--config", str(run_yaml)]) == INTERRUPTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_repeated_signal_changes_nothing(tiny_run, number, capfd):
    config = tiny_run("run")

    def thrice() -> None:
        send(signal.SIGTERM)
        send(number)

    with (
        before(TrainedModel, "losses", 2, thrice),
        before(Run, "save", 1, lambda: send(number)),  # launchers repeat it while the checkpoint is written
    ):
        stopped = train(config)
    assert (stopped.step, stopped.stopped_by) == (2, "SIGTERM") and saved_steps(config.output_dir) == [2]
    assert capfd.readouterr().err.count(f"{number.name}: already stopping because of SIGTERM") == 2


def test_ctrl_c_while_a_checkpoint_is_written_leaves_the_one_before(tiny_run, calm_run):
    config = tiny_run("run", checkpoint={"every": 1})

    def twice() -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)

    with before(save, "atomic_save_tensors", 3, twice), pytest.raises(KeyboardInterrupt):
        train(config)  # two files a checkpoint: in the middle of the second one's
    assert saved_steps(config.output_dir) == [1]
    assert_same_run(train(config), calm_run())


def test_a_measurement_is_cut_short_and_made_up_for(tiny_run, calm_run):
    """The signal comes with the fourth of sixteen forward passes: no fifth is made, and nothing is missing later."""
    calm = calm_run(**WATCHED)
    config = tiny_run("run", **WATCHED)
    # The base model's measurement: one held-out clip and the three training clips, four timesteps, one at a time.
    with before(BatchMaker, "fixed", 16 + 4, lambda: send(signal.SIGTERM)) as calls:
        stopped = train(config)
    assert len(calls) == 16 + 4 and stopped.stopped_by == "SIGTERM"
    assert saved_steps(config.output_dir) == [2] and history(config.output_dir) != history(calm.run_dir)
    again = train(config)
    assert_same_run(again, calm)
    assert history(again.run_dir) == history(calm.run_dir)
    assert (again.run_dir / "checkpoints" / "step-00000004" / "state.json").read_text() == (
        calm.run_dir / "checkpoints" / "step-00000004" / "state.json"
    ).read_text()


def test_a_measurement_of_the_base_model_is_begun_anew(tiny_run, calm_run):
    calm = calm_run(**WATCHED)
    config = tiny_run("run", **WATCHED)
    with before(BatchMaker, "fixed", 2, lambda: send(signal.SIGTERM)):
        stopped = train(config)
    assert stopped.stopped_by == "SIGTERM" and stopped.step == 0 and stopped.checkpoint is None
    assert "nothing to save yet" in str(stopped) and not saved_steps(config.output_dir)
    assert history(train(config).run_dir) == history(calm.run_dir)


def test_the_last_measurement_is_owed_as_well(tiny_run, calm_run):
    """A signal after the last step: 75, because the same command still has something to do."""
    calm = calm_run(**WATCHED)
    config = tiny_run("run", **WATCHED)
    with before(BatchMaker, "fixed", 2 * 16 + 1, lambda: send(signal.SIGTERM)):
        stopped = train(config)
    assert stopped.step == stopped.total_steps == 4 and stopped.stopped_by == "SIGTERM"
    again = train(config)
    assert not again.stopped_by and history(again.run_dir) == history(calm.run_dir)


SAMPLED = {**WATCHED, "validation": {**WATCHED["validation"], "every": None, "sample_every": 2, "at_start": False}}


def videos(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in sorted(run_dir.rglob("*.mp4"))}


@pytest.mark.parametrize("round_", [1, 2], ids=["in the middle", "after the last step"])
def test_a_kill_between_saving_and_sampling_costs_no_video(tiny_run, calm_run, round_):
    """Step 2 is saved, and is the one to continue from; step 4 is the last, whose run has nothing else left to do."""
    calm = calm_run(checkpoint={"every": 2}, **SAMPLED)
    config = tiny_run("run", checkpoint={"every": 2}, **SAMPLED)

    def killed() -> None:
        raise SystemExit

    with before(validation.Sampler, "sample", round_, killed), pytest.raises(SystemExit):
        train(config)
    assert len(videos(config.output_dir)) == 2 * (round_ - 1) < len(videos(calm.run_dir)) == 4
    with before(TrainedModel, "losses", 1, lambda: None) as passes:
        again = train(config)
    assert videos(again.run_dir) == videos(calm.run_dir) and not again.stopped_by
    assert len(passes) == (2 if round_ == 1 else 0) and saved_steps(again.run_dir) == [2, 4]
    with before(validation, "sample_videos", 1, lambda: None) as calls:  # and what is there is not made again
        train(config)
    assert not calls


def test_a_stop_in_the_last_step_owes_the_last_videos(tiny_run):
    config = tiny_run("run", **SAMPLED)
    with before(TrainedModel, "losses", 4, lambda: send(signal.SIGTERM)):
        stopped = train(config)
    assert stopped.step == 4 and stopped.stopped_by == "SIGTERM" and "The same command continues" in str(stopped)
    assert len(videos(config.output_dir)) == 2
    again = train(config)
    assert not again.stopped_by and len(videos(config.output_dir)) == 4


def test_a_video_that_cannot_be_made_is_no_stop(tiny_run, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(validation, "sample_videos", fails)
    assert not train(tiny_run("run", **SAMPLED)).stopped_by


def test_under_nohup_a_hang_up_is_none(tiny_run):
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with before(TrainedModel, "losses", 2, lambda: send(signal.SIGHUP)):
            assert not train(tiny_run("run")).stopped_by
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, own)


def test_sampling_stops_between_two_videos(tiny_run, calm_run):
    calm = calm_run(data=WATCHED["data"])
    config = tiny_run("run", **SAMPLED)
    with before(validation, "sample_videos", 1, lambda: send(signal.SIGTERM)) as calls:
        stopped = train(config)
    assert len(calls) == 1 and len(list(config.output_dir.rglob("*.mp4"))) == 1
    assert saved_steps(config.output_dir) == [3] and stopped.step == 3  # the next step is where all can agree
    assert_same_run(train(config), calm)


def test_a_signal_in_the_last_save_comes_too_late_to_matter(tiny_run, tmp_path):
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(tiny_run("run").to_yaml())
    with before(Run, "save", 1, lambda: send(signal.SIGTERM)):
        assert main(["train", "--config", str(run_yaml)]) == OK
    assert saved_steps(tmp_path / "run") == [4]


def test_handlers_are_set_for_the_steps_alone(tiny_run):
    own = {number: signal.getsignal(number) for number in SIGNALS}
    seen = []

    def note() -> None:
        seen.append({number: signal.getsignal(number) for number in SIGNALS})

    with before(loop, "setup_run", 1, note), before(TrainedModel, "losses", 1, note):
        train(tiny_run("run"))
    assert seen[0] == own == {number: signal.getsignal(number) for number in SIGNALS}
    assert all(seen[1][number] != own[number] for number in SIGNALS)


@contextmanager
def _put_back(handler: object) -> Iterator[None]:
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def test_without_the_handlers_a_signal_would_be_the_end(tiny_run):
    """Canary of all of the above: what it looks like when nobody catches the first one."""
    # A process that was started in the background ignores Ctrl-C, and Python then leaves it at that.
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        _put_back(own),
        pytest.MonkeyPatch.context() as patch,
        before(TrainedModel, "losses", 2, lambda: send(signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(StopRequest, "begin", lambda self: None)
        train(tiny_run("run"))


# ------------------------------------------------------------------------------------------------- real processes


class Process:
    """A training as a cluster starts it."""

    def __init__(self, run_yaml: Path, *, processes: int = 1) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        self.log = run_yaml.with_suffix(".log")
        self._sink = self.log.open("w")
        self.popen = subprocess.Popen(
            [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "train.py"), "--config", str(run_yaml)],
            env=os.environ
            | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=self._sink,
            stderr=subprocess.STDOUT,
        )

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout_s: float = HANG_S) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.printed:
            assert self.popen.poll() is None, f"ended before it said {text!r}: {self.printed[-3000:]}"
            assert time.monotonic() < end, f"never said {text!r}: {self.printed[-3000:]}"
            time.sleep(0.02)

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()]

    def end(self, timeout_s: float = HANG_S) -> int:
        try:
            return self.popen.wait(timeout_s)
        finally:
            self._sink.close()
            if self.popen.poll() is None:
                self.popen.kill()


def written(config_values: dict[str, object], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config_values))
    return path


def many(model: Path, clips: Path, run: Path, steps: int) -> dict[str, object]:
    """Enough steps for a signal to fall between the first and the last, with a line for each."""
    return run_values(model, clips, run, train={"steps": steps}, tracking={"console_interval_s": 1e-3})


@pytest.mark.slow
def test_a_preempted_job_requeued_with_the_same_command_continues(tiny_model, demo_clips, calm_run, tmp_path, capsys):
    steps = 60
    calm = calm_run(train={"steps": steps})
    run_yaml = written(many(tiny_model(), demo_clips, tmp_path / "run", steps), tmp_path / "run.yaml")
    first = Process(run_yaml)
    first.wait_for("step  1/60")
    first.popen.send_signal(signal.SIGUSR1)
    assert first.end() == PREEMPTED, first.printed[-3000:]
    (stopped_at,) = saved_steps(tmp_path / "run")
    assert 1 <= stopped_at < steps and "Traceback" not in first.printed
    assert f"SIGUSR1: stopped after {stopped_at} of {steps} steps" in first.printed
    assert main(["train", "--config", str(run_yaml)]) == OK
    assert f"continuing after {stopped_at}" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", calm)


def test_a_terminal_that_is_closed_costs_no_step(tiny_run, tmp_path, launcher):
    """Its processes get SIGHUP, and cannot print any more."""
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(tiny_run("run", train={"steps": 4000}, tracking={"console_interval_s": 1e-3}).to_yaml())
    terminal, end = pty.openpty()
    with ThreadPoolExecutor(1) as beside:
        words = (os.ttyname(end), "train", "--config", str(run_yaml))
        ends = beside.submit(launcher.run, "launcher_cases:on_terminal", *words, ranks=1)
        printed = os.read(terminal, 10_000)
        os.close(end)  # of two who have it open, so that reading fails where the other ends
        while b"/4000" not in printed:  # the panel's progress
            printed += os.read(terminal, 10_000)
        os.close(terminal)
        (ended,) = ends.result()
    assert ended.code == PREEMPTED, ended.log
    (stopped_at,) = saved_steps(tmp_path / "run")
    assert 1 <= stopped_at < 4000


def test_a_signal_while_encoding_ends_at_once_and_loses_nothing(tiny_model, demo_clips, tmp_path, launcher):
    values = many(tiny_model(), demo_clips, tmp_path / "run", 2)
    values["cache"] |= {"decode_workers": 2}
    run_yaml, note = written(values, tmp_path / "run.yaml"), tmp_path / "pid"
    with ThreadPoolExecutor(1) as beside:
        words = (str(note), "finetune.caching.encode.encode_video", "train", "--config", str(run_yaml))
        ends = beside.submit(launcher.run, "launcher_cases:paused", *words, ranks=1)
        until(lambda: note.exists() or ends.done(), "it comes to encoding")
        pid = int(note.read_text())
        workers = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        os.kill(pid, signal.SIGTERM)
        (ended,) = ends.result()
    assert ended.code == -signal.SIGTERM and "Traceback" not in ended.log
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "decode workers end with their parent")
    assert train(RunConfig.from_dict(values)).step == 2


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_makes_both_save_the_same_step(tiny_model, demo_clips, tmp_path):
    job = Process(written(many(tiny_model(), demo_clips, tmp_path / "run", 400), tmp_path / "run.yaml"), processes=2)
    job.wait_for("step   1/400")
    workers = job.children()
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGUSR1)
    assert job.end() != OK  # torchrun's own code
    (stopped_at,) = saved_steps(tmp_path / "run")
    assert f"stopped after {stopped_at} of 400 steps" in job.printed
    assert "exitcode  : 75" in job.printed and "error: " not in job.printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_preempted_again_and_again(tiny_model, demo_clips, tmp_path, processes):
    """SIGTERM, SIGINT and SIGUSR1 in turn to the launcher or the process, until the run is done: bit for bit."""
    steps = 300
    calm_yaml = written(many(tiny_model(), demo_clips, tmp_path / "calm", steps), tmp_path / "calm.yaml")
    assert Process(calm_yaml, processes=processes).end() == OK
    run_yaml = written(many(tiny_model(), demo_clips, tmp_path / "run", steps), tmp_path / "run.yaml")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        job = Process(run_yaml, processes=processes)
        job.wait_for("/300  loss")
        if processes > 1 and number == signal.SIGUSR1:
            for pid in job.children():  # torchrun itself would die of it
                os.kill(pid, number)
        else:
            job.popen.send_signal(number)
        code = job.end()
        assert code != OK and (processes > 1 or code == PREEMPTED), job.printed[-3000:]
    last = Process(run_yaml, processes=processes)
    assert last.end() == OK, last.printed[-3000:]
    assert_same_run(tmp_path / "run", tmp_path / "calm")
