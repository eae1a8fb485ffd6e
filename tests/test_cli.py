"""The command line: exit codes, what is printed where, what each verb hands on, and what it imports."""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from waiting import HANG_S
from worlds import run_config

import finetune
from finetune.caching.check import run_advice
from finetune.cli.app import BUG, INTERRUPTED, OK, PREEMPTED, USER_ERROR, WARNED
from finetune.cli.init import EXAMPLES, RECIPES, example, recipe_for
from finetune.cli.main import main
from finetune.cli.streams import own_log
from finetune.cogvideox.model_files import HUB_IDS, known_model
from finetune.cogvideox.spec import read_spec, spec_of
from finetune.config.rules import check_against
from finetune.config.schema import load_config
from finetune.core.errors import (
    CheckpointError,
    DataError,
    FinetuneError,
    is_out_of_memory,
    raise_all,
)
from finetune.core.types import Bucket
from finetune.datasets.schedule import Item, StepPlan
from finetune.planner.cost_model import DEFAULTS
from finetune.planner.step_time import step_cost

ROOT = Path(finetune.__file__).parent.parent

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def run(*words: str, cwd: Path, program: tuple[str, ...] = ("-m", "finetune")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANG_S
    )


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration that loads, of a model that is nowhere."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {pretrained: ./nowhere}\n"
        "data: {sources: [{path: clips}], buckets: [9x64x64]}\n"
        "train: {steps: 1}\n"
        "output_dir: run\n"
    )
    return path


# ------------------------------------------------------------------------------------------- real processes, real codes

HEAVY = ("torch", "transformers", "diffusers", "numpy", "PIL", "datasets", "pyarrow", "av")


def imported(words: list[str], folder: Path, *modules: str) -> tuple[int, list[str]]:
    """The exit code of a command in a process of its own, and which of the modules it imported."""
    probe = (
        "import sys; from finetune.cli.main import main\n"
        "code = main(sys.argv[2:])\n"
        "print(code, *(name for name in sys.argv[1].split() if name in sys.modules))"
    )
    done = run(" ".join(modules), *words, cwd=folder, program=("-c", probe))
    code, *names = done.stdout.splitlines()[-1].split()
    return int(code), names


@pytest.mark.parametrize(
    ("words", "code", "more"),
    [
        (["--help"], OK, ("pydantic", "yaml", "jinja2")),
        (["--version"], OK, ("pydantic", "yaml", "jinja2", "rich")),
        (["init", "--model", "5b", "--card", "12"], OK, ()),
        (["train", "--config", "run.yaml", "--set", "train.stesp=1"], USER_ERROR, ()),
        (["train", "--config", "run.yaml", "--set", "optimizer={kind: adamw, lr: 9999}"], USER_ERROR, ()),
        *((["cache", action, "--dir", "."], OK, ()) for action in ("stats", "verify", "gc")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_answer_that_needs_no_torch_comes_without_it(words, code, more, config_file, tmp_path):
    if words[0] == "init":
        config_file.unlink()
    assert imported(words, tmp_path, *HEAVY, *more) == (code, [])


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_check_comes_without_torch(with_tokenizer, tiny_model, config_file, demo_clips, tmp_path):
    """Also where captions are compared with what the model's own tokenizer reads."""
    model = tiny_model("5b") if with_tokenizer else "5b"
    overrides = [f"model.pretrained={model}", f"data.sources.0.path={demo_clips}", "data.fps=8"]
    modules = ["tokenizers", "torch", "diffusers", "transformers"]
    words = ["check", "--config", "run.yaml", "--set", *overrides]
    assert imported(words, tmp_path, *modules) == (OK, modules[:with_tokenizer])


def test_a_verb_that_needs_torch_is_seen_to_import_it(config_file, tmp_path):
    """The canary of the one above."""
    assert imported(["train", "--config", "run.yaml"], tmp_path, *HEAVY)[1][:1] == ["torch"]


def test_help_lists_the_verbs_and_the_way_to_a_video(tmp_path, capsys):
    assert main(["--help"]) == OK
    printed = capsys.readouterr().out
    words = "quickstart init check doctor plan calibrate precompute train replay export cache"
    assert not [verb for verb in words.split() if f" {verb} " not in printed]
    assert "finetune init --model 5b --method lora --card 24" in printed and "75 training was stopped" in printed
    assert main(["plan", "--help"]) == OK and "--allow-quantized" in capsys.readouterr().out


def test_exit_0_when_a_verb_succeeds(tmp_path):
    done = run("init", "--model", "2b", "--card", "12", "--data", ".", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("note: nothing is proposed for these clips")
    assert "wrote run.yaml" in done.stdout and (tmp_path / "run.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarin"], "No such command 'tarin'. Did you mean 'train'?"),
        (["quickstart", "--ouput", "x"], "No such option: --ouput (Possible options: --output)"),
        (["init", "--model", "5b", "--method", "lore"], "'lore' is not one of 'lora', 'full'"),
        (["train", "--config", "a", "--zzz"], "No such option: --zzz"),
        (["train"], "Missing option '--config'"),
        (["cache", "stats"], "give one of --dir and --config"),
        (["cache", "stats", "--dir", "a", "--config", "b"], "give one of --dir and --config"),
        (["cache", "export", "--dir", "a"], "export and import take a folder or a .tar"),
        (["cache", "stats", "a.tar", "--dir", "a"], "export and import take a folder or a .tar"),
        (["export", "a", "--strength", "much"], "Invalid value for '--strength'"),
    ],
)
def test_exit_2_for_words_that_do_not_parse(words, message, capsys):
    assert main(words) == USER_ERROR
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and len(printed.splitlines()) == 1


def test_exit_2_for_a_fault_of_the_user_from_any_folder(config_file, tmp_path):
    """train.py finds the package wherever it is started, and prints no traceback for what the user can mend."""
    done = run(
        "--config", str(config_file), "--set", "train.stesp=3", cwd=tmp_path.parent, program=(str(ROOT / "train.py"),)
    )
    assert done.returncode == 2
    assert "did you mean 'steps'" in done.stderr and "--set train.stesp=3" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


PROBE = """
import os, sys, types, pathlib, finetune, finetune.cli.main as cli
from finetune.datasets import cache_admin
finetune.load_config = lambda *_: None
def verb(*_, **__):
    WORK
    return types.SimpleNamespace(stopped_by="", export_command="", run_dir=pathlib.Path("run"))
finetune.train = cache_admin.stats = verb
CHANGE
sys.exit(cli.main(sys.argv[1:]))
"""
"""A command whose work is ``WORK``: ``train``, whose output nobody need read, or ``cache stats``, which only prints."""

WORDS = {"train": ["train", "--config", "run.yaml"], "cache": ["cache", "stats", "--dir", "."]}


def probe(work: str, change: str = "") -> str:
    return PROBE.replace("WORK", work).replace("CHANGE", change)


def test_exit_1_for_a_bug(tmp_path):
    """The injected fault stands for any exception that is not ours."""
    done = run(*WORDS["train"], cwd=tmp_path, program=("-c", probe("1 / 0")))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr
    assert "This is a bug in finetune" in done.stderr and finetune.__version__ in done.stderr


def test_accelerate_launch_reports_failure(config_file, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"))
    done = run(str(ROOT / "train.py"), "--config", str(config_file), cwd=tmp_path, program=launch)
    assert done.returncode != 0
    assert "there is no such model folder" in done.stderr


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "cpu"])
def test_accelerate_configurations_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # precision is model.dtype
    assert config.use_cpu == (name == "cpu")
    assert config.num_processes == (2 if name == "ddp" else 1)
    assert set(yaml.safe_load(path.read_text())) <= {*vars(config), "gpu_ids", "use_cpu", "rdzv_backend"}


# --------------------------------------------------------------------------------------------------- codes, in process


@pytest.fixture
def trained(monkeypatch):
    """Put a function in the place of training; what it was given is recorded."""
    from finetune.trainers import loop

    calls: list[object] = []

    def replace(outcome: BaseException | None = None) -> list[object]:
        def train(config, on_step):
            calls.append(config)
            if outcome is not None:
                raise outcome
            return loop.TrainReport(Path("run"), 9, 9, None, None, None, "", None, 0.0)

        monkeypatch.setattr(loop, "train", train)
        return calls

    return replace


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, OK),
        (DataError("no clip", where="a.csv:3", fix="add one"), USER_ERROR),
        (CheckpointError("gone"), USER_ERROR),
        (KeyboardInterrupt(), INTERRUPTED),
        (RuntimeError("oh"), BUG),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), USER_ERROR),
        (MemoryError(), USER_ERROR),
        (AssertionError("oh"), BUG),
    ],
)
def test_every_outcome_has_its_code(trained, config_file, capsys, outcome, code):
    calls = trained(outcome)
    overrides = ["--set", "train.seed=5", "--set", "train.steps=9", "data.fps=8"]
    assert main(["train", "--config", str(config_file), *overrides]) == code
    (config,) = calls
    assert (config.train.seed, config.train.steps, config.data.fps) == (5, 9, 8)
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (code == BUG)
    assert ("This is a bug" in said) == (code == BUG)
    assert ("error: out of memory: " in said) == is_out_of_memory(outcome)
    if isinstance(outcome, DataError):
        assert said == "error: no clip\n  where: a.csv:3\n  fix:   add one\n"


def test_every_kind_of_our_errors_is_the_users(trained, config_file, capsys):
    kinds = FinetuneError.__subclasses__()
    assert len(kinds) >= 7
    for kind in kinds:
        trained(kind("what"))
        assert main(["train", "--config", str(config_file)]) == USER_ERROR, kind


def test_the_rank_is_named_where_there_are_several(trained, config_file, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    trained(DataError("no clip"))
    main(["train", "--config", str(config_file)])
    assert capsys.readouterr().err.startswith("[rank 1] error: no clip")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EMFILE])
def test_what_the_system_refuses_is_no_bug(trained, config_file, capsys, code):
    trained(OSError(code, os.strerror(code), "/run/\x1b[2J"))
    assert main(["train", "--config", str(config_file)]) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"error: {os.strerror(code)}\n  where: /run/\\x1b[2J\n  fix: ") and "Traceback" not in said
    trained(OSError(errno.ENOENT, "a file of ours"))
    assert main(["train", "--config", str(config_file)]) == BUG


def test_output_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["init", "--model", "5b", "--output", str(tmp_path / "file" / "run.yaml")]) == USER_ERROR
    assert "Traceback" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- standard streams

PRINT_MUCH = "[print(n) for n in range(20_000)]; pathlib.Path('done').touch()"

PRINT_ODDLY = (
    "with open('file', 'w'): print('\\u65e5\\u672c \\U0001f600'); sys.stderr.write('\\u65e5'); os.write(1, b'x')"
)
"""What not every encoding has, printed while a file is open."""


def start(verb: str, folder: Path, **streams: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", probe(PRINT_MUCH), *WORDS[verb]]
    return subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, **streams)


def print_oddly(verb: str, folder: Path, *, redirect: str = "", before: str = "", change: str = "", **environment: str):
    command = f'{before} exec "$0" -c "$1" {shlex.join(WORDS[verb])} {redirect}'
    words = ["sh", "-c", command, sys.executable, probe(PRINT_ODDLY, change)]
    return subprocess.run(words, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, timeout=120)


@pytest.mark.parametrize(("verb", "encoding"), [("train", "latin-1"), ("cache", "utf-8")])
def test_no_encoding_ends_a_run(tmp_path, verb, encoding):
    done = print_oddly(verb, tmp_path, PYTHONIOENCODING=encoding)
    expected = "\u65e5\u672c \U0001f600" if encoding == "utf-8" else "\\u65e5\\u672c \\U0001f600"
    assert done.returncode == 0 and expected in done.stdout.decode(encoding), done.stderr


@pytest.mark.parametrize(("verb", "closed"), [("train", ">&-"), ("cache", ">&-"), ("train", ">&- 2>&- <&-")])
def test_closed_streams_end_no_run_and_write_into_no_file(tmp_path, verb, closed):
    done = print_oddly(verb, tmp_path, redirect=closed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""


def test_without_care_an_encoding_does_end_a_run_and_a_file_is_written_into(tmp_path):
    """The canary of the two above."""
    careless = "cli.open_streams = int"
    assert print_oddly("train", tmp_path, change=careless, PYTHONIOENCODING="latin-1").returncode == BUG
    assert print_oddly("cache", tmp_path, change=careless, redirect=">&-").returncode == BUG
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_deleted_folder_is_said(tmp_path):
    (tmp_path / "gone").mkdir()
    done = print_oddly("cache", tmp_path, before="cd gone; rmdir ../gone;")
    assert done.returncode == USER_ERROR and b"the current folder is gone" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("stderr_too", [False, True])
def test_a_log_on_a_full_disk_does_not_end_training(tmp_path, stderr_too):
    with Path("/dev/full").open("w") as full, (tmp_path / "err").open("w") as err:
        assert start("train", tmp_path, stdout=full, stderr=full if stderr_too else err).wait(60) == 0
    assert (tmp_path / "done").exists()
    warning = "<stdout> cannot be written to any more (No space left on device); the work goes on\n"
    assert (tmp_path / "err").read_text() == ("" if stderr_too else warning)


@pytest.mark.parametrize(("verb", "finished"), [("train", True), ("cache", False)])
def test_work_goes_on_when_its_reader_is_gone(tmp_path, verb, finished):
    """``finetune train | tee log``, and tee is killed; ``finetune cache stats | head`` ends with its reader."""
    writer = start(verb, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    message = writer.stderr.read().decode()
    writer.stderr.close()
    assert writer.wait(60) == 0 and "Traceback" not in message
    assert (tmp_path / "done").exists() == finished and (finished or not message)


def test_a_pipe_of_the_work_itself_that_breaks_is_no_success(trained, config_file, capsys):
    trained(BrokenPipeError("a decode worker's"))
    assert main(["train", "--config", str(config_file)]) == 1
    assert "This is a bug" in capsys.readouterr().err


def test_the_log_reads_as_all_other_lines(capsys):
    log = logging.getLogger("finetune.inference.generate")
    with own_log():
        log.warning("the prompt lacks the word")
        log.info("rehearsing")
    assert capsys.readouterr().err == "warning: the prompt lacks the word\nrehearsing\n"


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]


def test_a_bar_is_one_on_a_terminal_only(monkeypatch):
    from tqdm import tqdm

    from finetune.core import terminal

    package = Path(finetune.__file__).parent
    users = {path.name for path in package.rglob("*.py") if "import tqdm" in path.read_text(encoding="utf-8")}
    assert users == {"terminal.py"}, "every bar is of one style"
    monkeypatch.setattr(terminal, "LINE_INTERVAL_S", 0.01)
    for kind, interactive, drawn in ((terminal.Bar, True, True), (terminal.Bar, False, False), (tqdm, False, True)):
        stream = Stream(interactive)
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in kind(range(3), desc="clips"):
            time.sleep(0.02)
        assert ("\r" in stream.getvalue()) is drawn, "the last is the canary"
        if kind is terminal.Bar and not interactive:
            assert stream.getvalue().splitlines()[0].startswith("clips: 1 of 3, ")


def test_a_bar_is_drawn_on_a_terminal_of_unknown_size():
    """As a container's is: it has 0 columns and 0 rows."""
    terminal, end = pty.openpty()
    os.set_blocking(terminal, False)
    code = "from finetune.core.terminal import Bar\nfor _ in Bar(range(3), desc='clips'): pass"
    subprocess.run([sys.executable, "-c", code], stderr=end, check=True, env={**os.environ, "COLUMNS": ""})
    assert os.read(terminal, 10_000).startswith(b"\rclips: ")
    os.close(terminal)
    os.close(end)


def test_one_fault_of_thirty_clips_is_said_once():
    short = [DataError("the clip is too short", where=f"clip-{n}", fix="add a bucket") for n in range(30)]
    with pytest.raises(DataError) as raised:
        raise_all(DataError, [*short, DataError("no caption", where="clip-40")], what="{n} clips cannot be used")
    assert str(raised.value).splitlines() == [
        "31 clips cannot be used",
        "- the clip is too short",
        "    where: clip-0, clip-1, clip-2, clip-3, clip-4 and 25 more",
        "    fix:   add a bucket",
        "- no caption",
        "    where: clip-40",
    ]


def test_every_module_is_imported_without_what_only_unix_has(tmp_path):
    probe = (
        "import importlib, os, peft, pkgutil, psutil, signal, sys\n"  # which have other files for each system
        "for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "for name in ('SIGUSR1', 'SIGHUP'): delattr(signal, name)\n"
        "for name in ('sched_getaffinity', 'getuid'): delattr(os, name)\n"
        "import finetune\n"
        "found = [each.name for each in pkgutil.walk_packages(finetune.__path__, 'finetune.')]\n"
        "for name in found:\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)\n"
        "print(len(found))"
    )
    done = run(probe, cwd=tmp_path, program=("-c",))
    assert done.returncode == 0 and int(done.stdout) > 80, done.stderr


# ----------------------------------------------------------------------------------------- what the verbs hand on


def test_check_prints_what_would_be_trained_on(tiny_model, demo_clips, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert main(["init", "--model", str(tiny_model()), "--data", str(demo_clips), "--output", str(path)]) == OK
    overrides = ["data.buckets=[9x64x64]", "cache.decode_workers=0", "data.fps=8", "train.steps=1500"]
    assert main(["check", "--config", str(path), "--set", *overrides]) == OK
    printed = capsys.readouterr()
    assert "4 clips from 4 videos" in printed.out
    assert "3 to train on, 1 held out" in printed.out and "1500, 500.00 epochs on one process" in printed.out
    assert "warning: 3 clips for 1500 steps are 500 epochs" in printed.err
    # 9 frames are 3 latent ones of 8x8 cells in patches of 2x2, beside 16 tokens of text.
    assert "9x64x64: latents of 4 channels x 3 frames x 8 x 8, 64 tokens with text" in printed.out
    assert main(["check", "--config", str(path), "--set", "data.buckets=[10x63x64]"]) == USER_ERROR
    assert "10 frames are not possible" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["THUDM/CogVideoX-5b", "cogvideox-5B"])
def test_a_published_model_needs_no_network(name, config_file, demo_clips, tmp_path, capsys, monkeypatch):
    """Under any of its names, to write a configuration and to check it; training wants the weights."""

    def nothing_here(*_: object, local_files_only: bool = False, **__: object) -> None:
        assert local_files_only, "the hub was asked"
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing_here)
    assert main(["init", "--model", name, "--data", str(demo_clips), "--output", str(tmp_path / "init.yaml")]) == OK
    assert load_config(tmp_path / "init.yaml").model.pretrained == "zai-org/CogVideoX-5b"
    overrides = [
        f"model.pretrained={name}",
        f"data.sources.0.path={demo_clips}",
        "data.fps=8",
        "cache.decode_workers=0",
    ]
    assert main(["check", "--config", str(config_file), "--set", *overrides]) == OK
    printed = capsys.readouterr().out
    assert "zai-org/CogVideoX-5b, text-to-video, 42 blocks" in printed and "captions were not compared" in printed
    (tmp_path / name).mkdir(parents=True)  # a folder of that name is meant where there is one
    assert load_config(config_file, overrides).model.pretrained == str(tmp_path / name)


def test_the_overview_counts_what_training_will_see(tmp_path):
    from finetune.caching.check import overview
    from finetune.caching.planned_clips import PlannedClip
    from finetune.config.schema import RunConfig
    from finetune.core.types import Bucket, ClipPlan, Sample, VideoProbe

    bucket = Bucket(81, 768, 1360)
    plan = ClipPlan(tuple(range(81)), (768, 1365), (0, 2), bucket)
    probe = VideoProbe(81, 16.0, 768, 1365, tuple(n / 16 for n in range(81)), 1)
    clips = [
        PlannedClip(f"{n}.mp4", Sample(Path(f"{n}.mp4"), "a", None, "a:1", repeats=2), probe, plan, holdout=n == 10)
        for n in range(11)
    ]
    config = RunConfig.from_dict(
        {
            "model": {"pretrained": "x"},
            "data": {"sources": [{"path": "a"}], "buckets": [str(bucket)], "holdout": 2},
            "train": {"epochs": 3, "accumulation": 4},
            "output_dir": str(tmp_path),
        }
    )
    listed, advice = overview(
        config, read_spec(str(known_model("1.5-5b-i2v"))), clips, {c.sample.video: c.name for c in clips}
    )
    numbers = dict(listed)
    assert not advice
    assert "16 channels x 21 + 1 in front frames x 96 x 170, 45,104 tokens" in numbers["bucket"]  # 44,880 and 224
    assert numbers["clips"] == "8 to train on, 3 held out"
    assert numbers["epoch"] == "16 clips with repeats, 4.00 steps on one process"
    assert numbers["steps"].startswith("12, 3.00 epochs") and "image-to-video" in numbers["model"]


@pytest.mark.parametrize(
    ("clips", "repeats", "steps", "told"),
    [
        (8, 1, 1500, "8 clips for 1500 steps are 187.5 epochs: what is seen 187.5 times"),
        (8, 3, 1500, "8 clips for 1500 steps are 62.5 epochs: what is seen 187.5 times"),
        (8, 1, 1500, "Lower train.steps to 800 or less"),
        (10, 1, 1000, ""),
        (100, 1, 4000, ""),
    ],
)
def test_a_run_that_is_long_for_its_clips_is_told_of(tmp_path, clips, repeats, steps, told):
    plan = StepPlan((Item(Bucket(9, 64, 64), repeats),) * clips, seed=0, batch_size=1, micro_batches=1)
    config = run_config(tmp_path, tmp_path, tmp_path / "run")
    advice = run_advice(config, plan, steps, val_videos=0)
    assert told in advice[0] if told else not advice


@pytest.mark.parametrize(
    ("data", "held", "told"),
    [
        ({"holdout": 0.1}, 0, "no clip is held out, so no held-out loss is measured"),
        ({"sources": [{"path": "a"}, {"path": "b", "split": "holdout"}]}, 0, "none of the held-out sources is left"),
        ({"holdout": 5}, 2, "data.holdout asks for 5 videos, and 2 can be kept out"),
        ({"holdout": 5}, 5, ""),
        ({"holdout": 0.1}, 1, ""),
        ({}, 0, ""),
    ],
)
def test_a_holdout_that_comes_to_nothing_is_told_of(tmp_path, data, held, told):
    plan = StepPlan((Item(Bucket(9, 64, 64), 1),), seed=0, batch_size=1, micro_batches=1)
    advice = run_advice(run_config(tmp_path, tmp_path, tmp_path / "run", data=data), plan, 1, val_videos=held)
    assert told in advice[0] if told else not advice


def test_generate_hands_on_every_option(monkeypatch, tmp_path, capsys):
    from finetune.inference import generate as generation

    asked = []
    monkeypatch.setattr(generation, "generate", lambda request: asked.append(request) or "done")
    (tmp_path / "prompts.txt").write_text("first\nsecond\n")
    words = (
        f"generate --model base --revision r --transformer full --adapter a:0.5 --adapter b "
        f"--prompts {tmp_path}/prompts.txt --prompt third --image i.png --seed 7 "
        "--bucket 9x64x32 --fps 4 --negative-prompt ugly --steps 3 --guidance 2 "
        "--dynamic-cfg --dtype fp32 --budget 8GiB --offload group --quantize int8 --quantize-text nf4 --compile "
        "--parallel cfg --device cpu --output out --last-image l.png --video v.mp4 "
        "--strength 0.5 --extend 2 --videos 3 --scheduler ddim --gif"
    )
    assert main(words.split()) == OK
    (request,) = asked
    assert [(prompt.prompt, prompt.seed) for prompt in request.prompts] == [("first", 7), ("second", 10), ("third", 13)]
    third = {"image": Path("i.png"), "last_image": Path("l.png"), "video": Path("v.mp4")}
    assert {name: getattr(request.prompts[2], name) for name in third} == third and request.prompts[0].image is None
    assert (request.strength, request.extend, request.videos) == (0.5, 2, 3)
    assert (request.scheduler, request.gif) == ("ddim", True)
    assert [(str(adapter.path), adapter.strength) for adapter in request.adapters] == [("a", 0.5), ("b", 1.0)]
    assert request.bucket == Bucket(9, 64, 32) and request.fps == 4 and request.out == Path("out")
    assert (request.base, request.revision, request.transformer) == ("base", "r", Path("full"))
    assert (request.negative_prompt, request.num_inference_steps, request.guidance_scale) == ("ugly", 3, 2)
    assert (request.dynamic_cfg, request.dtype, request.device) == (True, "fp32", "cpu")
    assert (request.budget, request.offload, request.quantize, request.quantize_text) == (2**33, "group", "int8", "nf4")
    assert (request.compile, request.parallel) == (True, "cfg")
    assert capsys.readouterr().out == "done\n"
    assert main(["generate", "--model", "base", "--prompt", "a", "--bucket", "9x64"]) == USER_ERROR
    assert "--bucket 9x64" in capsys.readouterr().err


def test_replay_hands_on_every_option(monkeypatch, capsys):
    from finetune.trainers import replay as replaying

    asked = []
    monkeypatch.setattr(replaying, "replay", lambda *words, **options: asked.append((words, options)) or "table")
    words = "replay runs/a/reports/b --dtype fp32 --device cuda:1 --model base --cache elsewhere"
    assert main(words.split()) == OK
    options = {"dtype": "fp32", "device": "cuda:1", "pretrained": "base", "cache": Path("elsewhere")}
    assert asked == [((Path("runs/a/reports/b"),), options)]
    assert capsys.readouterr().out == "table\n"


def test_export_hands_on_every_option(monkeypatch, capsys):
    from finetune.conversion import export as exporting

    asked = []
    monkeypatch.setattr(exporting, "export", lambda *words: asked.append(words) or "done")
    words = "export runs/a --to merged --output out --checkpoint best --full-pipeline --weights ema --model base"
    assert main([*words.split(), "--strength", "0.5", "--dtype", "fp16", "--max-shard-size", "2GB"]) == OK
    options = exporting.ExportOptions("best", True, "ema", "base", "merged", 0.5, "fp16", 2 << 30)
    assert asked == [(Path("runs/a"), Path("out"), options)]


def test_cache_verbs(config_file, tmp_path, capsys):
    import torch

    from finetune.datasets.cache import Cache, Encoding

    cache = Cache(tmp_path / "cache")
    address = Encoding("v", "e", "fp32", 4, "fp16", None, "rule").prompt_address("a")
    cache.write_prompt(address, torch.zeros(4, 8), tokens=1)
    assert main(["cache", "stats", "--config", str(config_file)]) == OK
    assert main(["cache", "verify", "--config", str(config_file), "--set", "cache.dir=cache"]) == OK
    printed = capsys.readouterr().out
    assert "prompts          1 entries" in printed and "1 entries read" in printed
    assert main(["cache", "export", str(tmp_path / "a.tar"), "--dir", str(cache.root)]) == OK
    assert main(["cache", "import", str(tmp_path / "a.tar"), "--dir", str(tmp_path / "there")]) == OK
    assert capsys.readouterr().out.count("1 entries copied") == 2
    (entry,) = cache.files("prompts")
    entry.write_bytes(entry.read_bytes()[:-1] + b"\x01")
    assert main(["cache", "verify", "--dir", str(cache.root)]) == USER_ERROR
    assert main(["cache", "gc", "--dir", str(cache.root)]) == OK
    assert entry.exists()  # without --delete it only says
    assert main(["cache", "verify", "--dir", str(cache.root), "--delete"]) == USER_ERROR
    assert not entry.exists()
    assert "1 damaged" in capsys.readouterr().out


def test_a_cache_that_is_not_there_is_said(tmp_path, capsys):
    for action in ("stats", "verify", "gc"):
        assert main(["cache", action, "--dir", str(tmp_path / "none")]) == USER_ERROR
        assert "there is no cache" in capsys.readouterr().err
    assert main(["cache", "stats", "--dir", str(tmp_path)]) == OK


def test_a_stopped_training_ends_the_quickstart(tmp_path, monkeypatch, capsys):
    from finetune.testing import quickstart
    from finetune.trainers.loop import TrainReport

    stopped = TrainReport(tmp_path, 3, 9, tmp_path / "step-3", None, None, "SIGINT", None, 0.0)
    monkeypatch.setattr(quickstart, "install_demo_model", lambda folder: None)
    monkeypatch.setattr(quickstart, "write_clips", lambda folder, scenes: None)
    monkeypatch.setattr(quickstart, "precompute", lambda config: types.SimpleNamespace(encoded={"latents": 1}))
    monkeypatch.setattr(quickstart, "train", lambda config: stopped)
    monkeypatch.setattr(quickstart, "export", lambda run: pytest.fail("it went on"))
    assert main(["quickstart", "--output", str(tmp_path / "quick")]) == PREEMPTED and (tmp_path / "quick").is_dir()
    assert "The same command continues." in capsys.readouterr().out


def test_every_command_that_is_printed_works_where_it_is_printed(
    tiny_model, demo_clips, tmp_path, monkeypatch, capfd, launcher
):
    """From ``init`` on, each ends with the one that follows; a file's header has them all."""
    monkeypatch.chdir(tmp_path)
    printed = []

    def typed(line: str) -> str:
        program, *words = shlex.split(line)
        allowed = (OK, WARNED) if words[0] == "doctor" else (OK,)
        assert program == "finetune" and main(words) in allowed, line
        done = capfd.readouterr()
        printed.append(done.out + done.err)
        *_, last = [line for line in done.out.splitlines() if line.startswith("next: ")] or [""]
        return last.removeprefix("next: ")

    file = Path("my conf/r.yaml")
    following = typed(
        shlex.join(["finetune", "init", "--model", f"{tiny_model()}", "--data", f"{demo_clips}", "--output", f"{file}"])
    )
    text = file.read_text()
    small = {
        r"\bsteps: \d+": "steps: 1",
        r"holdout: [\d.]+": "holdout: 0",
        "mode: auto": "mode: auto\n  decode_workers: 0",
    }
    for before, after in (small | {r"sample_every: \d+": "sample_every: null"}).items():
        text, changes = re.subn(before, after, text)
        assert changes, before
    file.write_text(text)
    commands = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   finetune")]
    assert following == commands[0] and len(commands) == 4
    for line, after in itertools.pairwise([*commands, ""]):
        following = typed(line)
        assert following == after or not after or after.startswith("finetune export")
    assert "tensorboard --logdir" in printed[-2] and "measuring the base model" not in printed[-2]
    assert "sampling" not in printed[-2]
    assert following.startswith("finetune generate") and "my conf/runs/r/export" in following
    words = (str(tmp_path), *shlex.split(following)[1:], "--steps", "1")
    (end,) = launcher.run("launcher_cases:command_in", *words, ranks=1)
    assert end.code == 0 and "\r" not in end.log and "arning" not in end.log, "a library's bar or word is in the pipe"
    assert "wrote videos/sheet.png" in end.log and Path("videos/sheet.png").is_file()


# ---------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", [*HUB_IDS, "zai-org/CogVideoX-5b"])
def test_init_writes_what_loads_and_fits(tmp_path, model, method, capsys):
    output = tmp_path / "configs" / "mine.yaml"
    assert main(["init", "--model", model, "--method", method, "--card", "80", "--output", str(output)]) == OK
    config = load_config(output)
    variant = model if model in HUB_IDS else "5b"
    assert config.model.pretrained == HUB_IDS[variant] and config.method.kind == method
    assert check_against(config, read_spec(str(known_model(variant)))) == ((), ())
    assert config.output_dir == tmp_path / "configs" / "runs" / "mine"
    header = " ".join(output.read_text().replace("#", "").split())
    assert "GiB, predicted, not measured" in header
    assert "put the path of your clips" in capsys.readouterr().err


def test_init_of_a_model_folder(tiny_model, tmp_path):
    output = tmp_path / "run.yaml"
    for variant in HUB_IDS:
        folder = tiny_model(variant)
        assert main(["init", "--model", str(folder), "--output", str(output), "--force", "--card", "24"]) == OK
        config = load_config(output)
        assert config.model.pretrained == str(folder)
        assert check_against(config, read_spec(str(folder))).errors == ()
        assert "there is no figure for this model" in output.read_text()


@pytest.mark.parametrize("name", ["clips", "my clips: raw #1", "it's", "- dash", "1e5", "true", "@x", "日本", "a # b"])
def test_init_keeps_any_path(tmp_path, name, monkeypatch):
    (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--model", "5b", "--data", f"data/{name}", "--output", "deep/er/run.yaml"]) == OK
    (source,) = load_config("deep/er/run.yaml").data.sources
    assert source.path == tmp_path / "data" / name
    assert main(["init", "--model", "5b", "--data", str(tmp_path / "data" / name), "--output", "abs.yaml"]) == OK
    assert load_config("abs.yaml").data.sources[0].path == tmp_path / "data" / name


@pytest.mark.parametrize("card", ["24", "24GB", "24GiB", "24 gb", "24576MB"])
def test_a_card_is_named_as_one_likes(tmp_path, card, capsys):
    output = tmp_path / "run.yaml"
    assert main(["init", "--model", "5b", "--card", card, "--output", str(output)]) == OK
    header = " ".join(output.read_text().replace("#", "").split())
    assert "for a card of 24 GB" in header and "A card of 24 GB has 22.8." in header
    assert main(["init", "--model", "5b", "--card", "big", "--output", str(output), "--force"]) == USER_ERROR
    assert "--card big" in capsys.readouterr().err


def test_init_replaces_nothing_unasked(tmp_path, capsys):
    output = tmp_path / "run.yaml"
    output.write_text("mine")
    assert main(["init", "--model", "5b", "--output", str(output)]) == USER_ERROR
    assert output.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert main(["init", "--model", "5b", "--output", str(output), "--force"]) == OK
    assert main(["init", "--model", "6b", "--output", str(output), "--force"]) == USER_ERROR


@pytest.mark.parametrize(("model", "method", "card"), [("5b", "lora", 6), ("1.5-5b", "full", 24)])
def test_init_says_what_will_not_fit(tmp_path, capsys, model, method, card):
    output = tmp_path / "run.yaml"
    assert main(["init", "--model", model, "--method", method, "--card", str(card), "--output", str(output)]) == OK
    message = capsys.readouterr().err
    assert f"and the card has {card}" in message and "finetune plan" in message
    assert "NOTE: this is predicted to need" in output.read_text()


@pytest.mark.parametrize(
    ("model", "method", "card", "streams"),
    [("5b", "lora", 24, False), ("5b", "lora", 12, False), ("5b-i2v", "lora", 8, True), ("5b", "full", 16, True)],
)
def test_init_writes_the_techniques_that_a_card_needs(tmp_path, model, method, card, streams, capsys):
    output = tmp_path / "run.yaml"
    assert main(["init", "--model", model, "--method", method, "--card", str(card), "--output", str(output)]) == OK
    config = load_config(output)
    assert check_against(config, read_spec(str(known_model(model)))) == ((), ())
    assert config.memory.streams is streams
    assert config.memory.block == "lean"
    assert "predicted to need" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "method", "card", "name"),
    [
        ("5b", "lora", 24, "5b-lora-24gb"),
        ("5b", "lora", 80, "5b-lora-24gb"),
        ("5b-i2v", "lora", 23, "5b-lora-16gb"),
        ("1.5-5b", "lora", 32, "1.5-5b-lora-32gb"),
        ("1.5-5b-i2v", "lora", 48, "1.5-5b-lora-40gb"),
        ("2b", "lora", 16, "2b-lora-12gb"),
        ("5b", "full", 48, "5b-full-32gb"),
        ("5b", "full", 80, "5b-full-80gb"),
        ("5b", "lora", 4, "5b-lora"),
        ("5b", "lora", None, "5b-lora"),
    ],
)
def test_init_takes_the_last_recipe_that_fits(model, method, card, name):
    assert recipe_for(model, method, card).name == f"cogvideox-{name}.yaml"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("init --from train.sh --data clips --method full", "--method, --data: --from takes all of it"),
        ("init --model 5b --card 4090", "no card has 4090 GiB"),
        ("generate --model 5b --prompt x --strength 0.3", "no prompt has a video"),
        ("caption nowhere", "there is no such folder"),
        ("cache import empty --dir cache", "the folder holds no cache"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(shlex.split(line)) == USER_ERROR
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize("device", ["H100", "A100", "4090"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["2b", "5b", "1.5-5b"])
def test_a_larger_card_is_given_a_faster_recipe(model, method, device):
    rows = [recipe for recipe in (*EXAMPLES, *RECIPES) if (recipe.model, recipe.method) == (model, method)]
    seconds = []
    for card_gib in sorted({recipe.card_gib for recipe in rows}):
        config = load_config(ROOT / "configs" / recipe_for(model, method, card_gib).name)
        seconds.append(step_cost(config, spec_of(config.model, shipped=True), config.memory, DEFAULTS[device]).step_s)
    assert all(larger <= 1.01 * smaller for smaller, larger in itertools.pairwise(seconds)), seconds


def test_the_examples_are_for_cards_that_they_fit():
    assert [example(recipe).notes() for recipe in (*EXAMPLES, *RECIPES)] == [[]] * 27
    assert {(recipe.model, recipe.method) for recipe in EXAMPLES} == {
        (m, kind) for m in HUB_IDS for kind in ("lora", "full")
    }


def test_figures_in_headers_are_the_planner_s():
    results = json.loads((ROOT / "benchmarks" / "results" / "memory_plans.json").read_text())
    predicted = results["examples"] | {name: plan["training_gib"] for name, plan in results["plans"].items()}
    assert list(results["plans"]) == [recipe.name for recipe in RECIPES]
    for recipe in (*EXAMPLES, *RECIPES):
        assert abs(predicted[recipe.name] - recipe.peak_gib) <= 0.06, recipe.name


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"], ["check", "--config", "run.yaml", "--set", "a=1", "-h"]])
def test_a_short_word_for_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "Usage:" in capsys.readouterr().out
