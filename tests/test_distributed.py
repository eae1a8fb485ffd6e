"""Several processes train like one: DDP and FSDP2, LoRA and full, with real gloo processes and no mocks.

And they end like one: whatever happens to one of them, none is left waiting.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import FSDP, OFFLOAD, assert_close, changed, checkpoint, state, written
from safetensors.torch import load_file
from waiting import HANG_S
from worlds import SMOOTH_ADAM, differing, run_values

from finetune import export
from finetune.checkpoint.load import load_checkpoint
from finetune.checkpoint.shares import Shares
from finetune.config.schema import RunConfig
from finetune.core.checksums import ChecksummedFolder
from finetune.trainers.loop import train

ROOT = Path(__file__).parents[1]
LORA = {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}
METHODS = {"lora": LORA, "full": {"kind": "full"}}
OTHERS = {"dora": {**LORA, "use_dora": True, "use_rslora": True}}
STRATEGIES: dict[str, dict[str, str]] = {"ddp": {}, "fsdp2": FSDP, "fsdp2_offload": OFFLOAD}


def fast(cases: Iterable[str], *chosen: str) -> list[Any]:
    """Parameters of which all but the chosen ones are left to ``make soak``."""
    assert set(chosen) < set(cases)
    return [pytest.param(case, marks=[] if case in chosen else pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def world(tiny_model, demo_clips, wide_clips, tmp_path_factory):
    """Makes run configurations over one cache: two buckets, repeats, batches that do not come out even."""
    root = tmp_path_factory.mktemp("world")

    def values(name: str, variant: str = "5b", **changes: Any) -> dict[str, Any]:
        # For a LoRA the one bucket is for prior preservation: the base's passes are exchanged as well.
        wide = {"path": str(wide_clips), "prior_preservation": changes.get("method", {}).get("kind") == "lora"}
        sources = [{"path": str(demo_clips), "repeats": 2}, wide]
        base = {
            "data": {"sources": sources, "buckets": ["9x64x64", "9x32x64"], "caption_dropout": 0.3, "holdout": 1},
            "train": {"steps": 4, "batch_size": 3},
            "tracking": {"kind": "tensorboard"},
            "optimizer": SMOOTH_ADAM,
        }
        return run_values(tiny_model(variant), demo_clips, root / variant / name, **{**base, **changes})

    return values


def metrics(values: Mapping[str, Any]) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(values["output_dir"]) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "perf" not in tag
    }


# ------------------------------------------------------------------------------------------------------ the same steps


@pytest.fixture(scope="module")
def alone(world):
    """One process that accumulates twice: what two processes are compared with."""
    made: dict[str, dict[str, Any]] = {}

    def run(method: str, variant: str) -> dict[str, Any]:
        if method not in made:
            values = world(f"alone-{method}", variant, method=(METHODS | OTHERS)[method], validation=VALIDATION)
            made[method] = changed(values, accumulation=2, ema_decay=0.5)
            train(RunConfig.from_dict(made[method]))
        return made[method]

    return run


SAMPLES = {"samples": [{"prompt": "a ring", "seed": 3}], "sample_every": 4, "num_inference_steps": 1}
VALIDATION = {"every": 2, "at_start": True, "timesteps": 3, **SAMPLES}


@pytest.mark.arithmetic
@pytest.mark.parametrize("strategy", fast(STRATEGIES, "ddp", "fsdp2"))
@pytest.mark.parametrize(
    ("method", "variant"),
    [("lora", "2b"), ("full", "5b"), pytest.param("dora", "1.5-5b", marks=pytest.mark.slow)],
)
def test_two_processes_train_like_one(world, alone, launcher, method, variant, strategy):
    # 2B has a buffer, which DDP would broadcast; one held-out clip at three timesteps is one forward pass: one process
    # has none, and under FSDP2 keeps the other company.
    one = alone(method, variant)
    two = world(f"{strategy}-{method}", variant, method=(METHODS | OTHERS)[method], validation=VALIDATION)
    two = changed(two, check_ranks=True, ema_decay=0.5)
    launcher.train(written(two), env=STRATEGIES[strategy])
    assert_close(state(two), state(one))
    ours, theirs = (load_checkpoint(checkpoint(run)) for run in (two, one))
    assert ours.ema is not None and ours.optimizer[1] == theirs.optimizer[1]
    assert (checkpoint(two) / "trainable").is_dir() == (strategy != "ddp")
    mine, reference = metrics(two), metrics(one)
    assert mine.keys() == reference.keys()
    tags = ("train/loss", "train/grad_norm", "heldout/loss", "trainsubset/loss", "train/samples_seen")
    for tag in (*tags, *(["train/prior_loss"] if method != "full" else [])):
        assert mine[tag] == pytest.approx(reference[tag], rel=1e-5), tag
    # One prompt: the other process samples it too, in step, and throws it away.
    videos = [Path(run["output_dir"]) / "samples" / "step-00000000" / "00-seed3.mp4" for run in (two, one)]
    assert videos[0].read_bytes() == videos[1].read_bytes()
    assert len(list((Path(two["output_dir"]) / "samples").rglob("*.mp4"))) == 2


def test_the_comparison_can_fail(world, alone, launcher):
    """Canary of the test above: without accumulation the other process's samples are missing."""
    one = alone("lora", "2b")
    half = changed(world("half", "2b", method=LORA), accumulation=1)
    train(RunConfig.from_dict(half))
    with pytest.raises(AssertionError):
        assert_close(state(half), state(one))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_a_bf16_model_like_one(world, launcher, method):
    """LoRA: float32 adapters in one group with a bf16 base. Full: float32 masters of the shares.

    A gradient in bf16 has three digits, and one process adds up two of them before they are averaged: Adam's first
    steps are as long whatever the gradient's length, so the weights move by the learning rate or, where the sign is
    lost in rounding, not at all.
    """
    runs = {}
    for name, accumulation in (("alone", 2), ("fsdp2", 1)):
        values = changed(world(f"bf16-{name}-{method}", method=METHODS[method]), accumulation=accumulation, steps=2)
        runs[name] = {**values, "model": {**values["model"], "dtype": "bf16"}}
    train(RunConfig.from_dict(runs["alone"]))
    launcher.train(written(runs["fsdp2"]), env=FSDP)
    ours, theirs = (load_checkpoint(checkpoint(runs[name], 2)) for name in ("fsdp2", "alone"))
    masters = {key: tensor for key, tensor in ours.optimizer[0].items() if key.startswith("master.")}
    assert bool(masters) == (method == "full")
    for mine, reference in ((ours.trainable, theirs.trainable), (masters, theirs.optimizer[0])):
        for name, tensor in mine.items():
            off = (tensor.float() - reference[name].float()).abs()
            assert off.mean() < 2e-4 and tensor.dtype == reference[name].dtype, name
    mine, reference = metrics(runs["fsdp2"]), metrics(runs["alone"])
    for tag in ("train/loss", "train/grad_norm"):
        assert mine[tag] == pytest.approx(reference[tag], rel=1e-2), tag


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def run_of_two(world, launcher):
    """Runs of two processes, by strategy, method and number of steps, each made once."""
    made: dict[tuple[str, str, int], dict[str, Any]] = {}

    def run(strategy: str, method: str, steps: int) -> dict[str, Any]:
        key = strategy, method, steps
        if key not in made:
            values = world(f"two-{strategy}-{method}-{steps}", method=METHODS[method])
            made[key] = changed(values, steps=steps, ema_decay=0.5)
            launcher.train(written(made[key]), env=STRATEGIES[strategy])
        return made[key]

    return run


def copied(values: Mapping[str, Any], name: str, **train: Any) -> dict[str, Any]:
    target = Path(values["output_dir"]).with_name(name)
    shutil.copytree(values["output_dir"], target)
    return changed({**values, "output_dir": str(target)}, steps=4, **train)


@pytest.mark.parametrize("method", fast(METHODS, "full"))
def test_a_sharded_run_resumes_bit_for_bit(run_of_two, launcher, method):
    again = copied(run_of_two("fsdp2", method, 2), f"resumed-{method}")
    launcher.train(written(again), env=FSDP)
    assert not differing(state(again), state(run_of_two("fsdp2", method, 4)))


# From a strategy to another, or to another number of processes: environment, processes, accumulation.
MOVES = {
    "fsdp2 x2 to fsdp2 x1": ("fsdp2", FSDP, 1, 2),
    "fsdp2 x2 to one process": ("fsdp2", {}, 1, 2),
    "fsdp2 x2 to ddp x2": ("fsdp2", {}, 2, 1),
    "fsdp2 x2 to offload x2": ("fsdp2", OFFLOAD, 2, 1),
    "ddp x2 to fsdp2 x2": ("ddp", FSDP, 2, 1),
    "ddp x2 to fsdp2 x1": ("ddp", FSDP, 1, 2),
}


@pytest.mark.parametrize("move", fast(MOVES, "fsdp2 x2 to one process"))
def test_a_run_goes_on_with_another_strategy_and_number_of_processes(run_of_two, launcher, move):
    before, env, ranks, accumulation = MOVES[move]
    again = copied(run_of_two(before, "full", 2), move.replace(" ", "-"), accumulation=accumulation)
    launcher.train(written(again), ranks=ranks, env=env)
    assert_close(state(again), state(run_of_two("fsdp2", "full", 4)))


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_four(world, launcher):
    """Two steps of two processes that accumulate twice, two of four processes that do not; four of one, four times."""
    shared = {"method": METHODS["full"], "data": {**world("x")["data"], "buckets": ["9x64x64"]}}
    one = changed(world("four-times", **shared), accumulation=4, batch_size=1, ema_decay=0.5)
    train(RunConfig.from_dict(one))
    two = changed(world("two-to-four", **shared), accumulation=2, batch_size=1, ema_decay=0.5, steps=2)
    launcher.train(written(two), env=FSDP)
    four = changed(two, accumulation=1, steps=4)
    launcher.train(written(four), ranks=4, env=FSDP)
    assert len(list((checkpoint(four) / "trainable").iterdir())) == 4
    assert_close(state(four), state(one))


def test_shares_that_do_not_come_out_even(launcher, tmp_path):
    """Rows of one, two and five tensors over three processes, read by three, two and one, and without any launch."""
    (tmp_path / "part").mkdir()
    for phase, ranks in (("write", 3), ("read", 3), ("read", 2), ("read", 1)):
        ends = launcher.run("launcher_cases:uneven_shares", str(tmp_path), phase, ranks=ranks)
        assert [end.code for end in ends] == [0] * ranks, ends[0].log + ends[-1].log
    whole = Shares(ChecksummedFolder.open(tmp_path), "part")
    assert {name: tuple(tensor.shape) for name, tensor in whole.forms().items()} == {
        "steps": (),
        **{f"rows{rows}": (rows, 3) for rows in (1, 2, 5, 12)},
    }
    assert all(torch.equal(whole[f"rows{rows}"].flatten(), torch.arange(rows * 3.0)) for rows in (1, 2, 5, 12))


def test_an_export_of_shares_is_the_export_of_the_whole(run_of_two, alone, tmp_path):
    folders = []
    for name, run in (("shares", run_of_two("fsdp2", "full", 4)), ("whole", alone("full", "5b"))):
        report = export(Path(run["output_dir"]), tmp_path / name)
        assert report.max_abs_diff <= report.tolerance
        folders.append(report.folder)
    assert_close(*(load_file(next(folder.rglob("*.safetensors"))) for folder in folders))


# ------------------------------------------------------------------------------------------------------ none is left


LOST = "another process of the launch failed or was killed"
FAULTS = {
    "killed in a step, DDP": ("die", "step", 1, {}),
    "killed in a step, FSDP2": ("die", "step", 0, FSDP),
    "killed while it saves, DDP": ("die", "save", 0, {}),
    "killed while it saves, FSDP2": ("die", "shares", 1, FSDP),
    "an exception in a step, DDP": ("raise", "step", 1, {}),
    "an exception in a step, FSDP2": ("raise", "step", 1, FSDP),
    "a full disk, DDP": ("disk full", "save", 0, {}),
    "a full disk, FSDP2": ("disk full", "shares", 1, FSDP),
}


@pytest.mark.parametrize(
    "fault", fast(FAULTS, "killed in a step, DDP", "killed while it saves, FSDP2", "a full disk, FSDP2")
)
def test_all_processes_end_when_one_fails(world, launcher, fault):
    """Without a launcher's agent: nobody kills the others, they find out by themselves."""
    how, where, rank, env = FAULTS[fault]
    # A full disk is forgiven (once, between two checkpoints) unless it is the last one's.
    steps = [4] if how == "disk full" else [2, 4]
    name = f"fault-{fault}".replace(" ", "-").replace(",", "")
    values = {**world(name, method=LORA), "checkpoint": {"every": None if how == "disk full" else 2}}
    arguments = ("train", "--config", str(written(values)))
    ends = launcher.run("launcher_cases:faulty", how, where, rank, *arguments, env=env)
    failed, other = ends[rank], ends[1 - rank]
    assert other.code == 2 and failed.code == {"die": -9, "raise": 1, "disk full": 2}[how], failed.log + other.log
    if how == "disk full":
        for end in ends:
            assert "the checkpoint cannot be written: No space left on device" in end.log
    else:
        assert LOST in other.log and "fix:" in other.log and "This is a bug" not in other.log
    assert "ValueError: a bug in one process" in failed.log or how != "raise"
    left = sorted(path.name for path in (Path(values["output_dir"]) / "checkpoints").glob("*"))
    assert not [name for name in left if not name.endswith(".partial")], left
    # And the same command continues, or begins anew, clearing away what was left.
    launcher.train(written(values), env=env)
    standing = sorted((Path(values["output_dir"]) / "checkpoints").iterdir())
    assert standing == [checkpoint(values, step) for step in steps]


def test_all_processes_end_when_one_is_killed_while_it_encodes(world, launcher, tmp_path):
    values = {**world("encode"), "cache": {"dir": str(tmp_path / "cache"), "decode_workers": 0}}
    ends = launcher.run("launcher_cases:faulty", "die", "encode", 1, "precompute", "--config", str(written(values)))
    assert [end.code for end in ends] == [2, -9] and LOST in ends[0].log
    ends = launcher.run("launcher_cases:command", "precompute", "--config", str(written(values)))
    assert [end.code for end in ends] == [0, 0]
    assert "encoded" in ends[0].log and "encoded" not in ends[1].log


def test_a_user_error_ends_all_processes_and_says_it(world, launcher):
    values = world("error", cache={"mode": "require", "dir": "/nowhere/at/all"})
    ends = launcher.run("launcher_cases:command", "train", "--config", str(written(values)))
    assert [end.code for end in ends] == [2, 2] and all("fix:" in end.log for end in ends)


@pytest.mark.slow
def test_torchrun_ends_when_a_process_fails(world):
    values = {**world("torchrun"), "cache": {"mode": "require", "dir": "/nowhere/at/all"}}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(written(values))],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert finished.returncode != 0 and "fix:" in finished.stdout + finished.stderr


# ----------------------------------------------------------------------------------------------------- the same on all


@pytest.mark.parametrize("what", fast(["gradient", "weight", "samples"], "gradient", "samples"))
def test_a_process_that_diverges_is_named(world, launcher, what):
    values = changed(world(f"diverging-{what}", method=LORA), check_ranks=True)
    ends = launcher.run("launcher_cases:diverging", what, "train", "--config", str(written(values)))
    assert [end.code for end in ends] == [2, 2], "\n".join(end.log[-2000:] for end in ends)
    for end in ends:
        assert f"the {what}" in end.log and "process 1 and process 0 do not hold the same" in end.log
    assert not list((Path(values["output_dir"]) / "checkpoints").glob("step-*"))


def test_without_the_check_it_trains_on(world, launcher):
    """Canary: what the check finds would otherwise go unnoticed."""
    values = world("diverging-unnoticed", method=LORA)
    ends = launcher.run("launcher_cases:diverging", "gradient", "train", "--config", str(written(values)))
    assert [end.code for end in ends] == [0, 0]


@pytest.mark.parametrize("together", [True, False])
def test_all_processes_use_one_commit_of_the_model(launcher, tmp_path, together):
    """While its branch moves every process would get another answer: one asks, and the others use what it got."""
    config = run_values(Path("org/model"), tmp_path / "clips", tmp_path / "run")
    commits = ["a" * 40, "b" * 40]
    ends = launcher.run("launcher_cases:pin", config, commits, str(tmp_path), together)
    assert [end.code for end in ends] == [0, 0], ends[0].log + ends[1].log
    used = [(tmp_path / rank).read_text().split() for rank in "01"]
    canary = [[commits[0], "1"], [commits[1], "1"]]
    assert used == ([[commits[0], "1"], [commits[0], "0"]] if together else canary)


def test_text_encoders_are_whole_in_every_process(tiny_model, launcher):
    """With accelerate's default for FSDP, transformers would leave all but the first process with empty weights."""
    env = FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    assert [end.code for end in launcher.run("launcher_cases:load_t5", str(tiny_model()), env=env)] == [0, 0]
