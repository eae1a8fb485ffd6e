"""Clips divided among processes, sampled and trained: one process's up to rounding, whatever does not come out even."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import pytest
from launcher import FSDP, assert_close, state, written
from worlds import SMOOTH_ADAM, merged, run_config, run_values

from finetune.cli.main import main
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against
from finetune.config.schema import RunConfig
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import ConfigError
from finetune.core.types import Bucket
from finetune.inference.context_parallel import division_faults
from finetune.memory.config import MemoryConfig
from finetune.parallel.deepspeed import Zero
from finetune.parallel.fsdp import FullShard
from finetune.planner.cost_model import DEFAULTS, link_rate
from finetune.planner.estimate import predict
from finetune.planner.plan import PlanOptions, plan
from finetune.planner.step_time import step_cost
from finetune.testing.tiny import VARIANTS
from finetune.trainers.launch import Replicate, require_launch
from finetune.trainers.loop import train

EVEN, UNEVEN = (9, 64, 96), (9, 48, 80)
"""Video tokens that two and three processes can share evenly, and that they cannot: 3 x 4 x 6 and 3 x 3 x 5 (at two
frames to a token 2 x 24 and 2 x 15); text is 16 or 14 tokens long."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_divided_passes_equal_whole_ones(tiny_model, launcher, ranks):
    cases = [*itertools.product(VARIANTS, [6, 5], [UNEVEN]), ("5b", 6, EVEN), ("5b", 5, EVEN)]
    models, sizes = [], []
    for variant, heads, (frames, height, width) in cases:  # five heads do not come out even either
        native = {"frames": frames, "height": height, "width": width}
        models.append(str(tiny_model(variant, num_attention_heads=heads, **native)))
        sizes.append(f"{frames}x{height}x{width}")
    divisions = ["context", "cfg"] if ranks == 2 else ["context"]
    ends = launcher.run("context_parallel_cases:compare", models, sizes, divisions, ranks=ranks)
    assert [end.code for end in ends] == [0] * ranks, "\n".join(end.log[-3000:] for end in ends)


LORA = {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.2, "targets": "all-linear"}
FULL = {"kind": "full"}
SELECTIVE = {"checkpointing": "selective"}
LEAN = {"block": "lean", "checkpointing": "selective"}


def test_divided_clips_have_the_gradients_of_whole_ones(tiny_model, launcher):
    cases = []
    for variant, heads, size, method, memory in [
        ("1.5-5b", 4, EVEN, LORA, SELECTIVE),
        ("1.5-5b-i2v", 5, UNEVEN, FULL, {}),
        ("1.5-5b-i2v", 4, UNEVEN, {**LORA, "dropout": 0}, LEAN),
        ("1.5-5b", 5, UNEVEN, FULL, LEAN),
        ("2b", 4, UNEVEN, LORA, {"checkpointing": "none"}),
        ("5b-i2v", 4, UNEVEN, FULL, SELECTIVE),
    ]:
        frames, height, width = size
        model = str(tiny_model(variant, num_attention_heads=heads, frames=frames, height=height, width=width))
        cases.append((model, f"{frames}x{height}x{width}", method, memory))
    ends = launcher.run("context_parallel_cases:differentiate", cases)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.log[-3000:] for end in ends)


@pytest.mark.parametrize(
    ("division", "processes", "options", "message"),
    [
        ("cfg", 3, {}, "two passes, for two processes"),
        ("cfg", 2, {"guided": False}, "without guidance"),
        ("context", 5, {}, "4 heads cannot be divided among 5 processes"),
        ("cfg", 2, {}, None),
        ("context", 3, {}, None),
    ],
)
def test_what_cannot_be_divided_is_known_before_anything_is_loaded(tiny_model, division, processes, options, message):
    spec = read_spec(str(tiny_model("5b")))
    faults = [*division_faults(division, spec, Bucket(9, 64, 64), processes, **{"guided": True, **options})]
    assert [message in fault.what for fault in faults] == ([True] if message else [])


@pytest.mark.parametrize("parallel", ["prompts", "cfg", "context"])
def test_generate_on_two_processes_writes_what_one_writes(tiny_model, launcher, tmp_path, parallel):
    words = ["generate", "--model", str(tiny_model("5b")), "--bucket", "9x32x48", "--steps", "2", "--dtype", "fp32"]
    words += [word for prompt in ("a red circle", "a blue square", "a ring") for word in ("--prompt", prompt)]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    ends = launcher.run("launcher_cases:command", *words, "--output", str(tmp_path / "two"), "--parallel", parallel)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.log[-3000:] for end in ends)
    assert [end.log.count("sheet.png") for end in ends] == [1, 0]
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 7
    sheets = [imageio.imread(files[-1]).astype(int) for files in (one, two)]  # of the frames before compression
    assert abs(sheets[0] - sheets[1]).max() <= (0 if parallel == "prompts" else 1)


# ---------------------------------------------------------------------------------------------------------- whole runs

UNWATCHED = {"every": None, "sample_every": None}
RUNS = {"lora": {"method": LORA}, "full": {"method": FULL, "memory": SELECTIVE, "validation": UNWATCHED}}


@pytest.fixture(scope="module")
def values(tiny_model, demo_clips, tmp_path_factory):
    """Makes run configurations over one cache; 14 tokens of text and 2 x 3 x 5 of video."""
    root = tmp_path_factory.mktemp("context")

    def make(name: str, method: str, **changes: Any) -> dict[str, Any]:
        base = {
            "data": {"buckets": ["9x48x80"], "holdout": 1, "caption_dropout": 0.3},
            "train": {"steps": 2, "batch_size": 1, "accumulation": 2, "ema_decay": 0.5},
            "validation": {"every": 1, "timesteps": 3, "samples": [{"prompt": "a ring", "seed": 3}]},
            "optimizer": SMOOTH_ADAM,
        }
        base["validation"] |= {"sample_every": 2, "num_inference_steps": 1}
        return run_values(
            tiny_model("1.5-5b", height=48, width=80),
            demo_clips,
            root / name,
            **merged({**base, **RUNS[method]}, changes),
        )

    return make


@pytest.fixture(scope="module")
def alone(values):
    """One process that accumulates twice, by method."""
    runs = {method: values(f"alone-{method}", method) for method in RUNS}
    for run in runs.values():
        train(RunConfig.from_dict(run))
    return runs


def metrics(values: Mapping[str, Any]) -> list[dict[str, float]]:
    """What a run has told, but for how long it took."""
    lines = (Path(values["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "perf" not in name} for line in lines]


@pytest.mark.parametrize(("strategy", "method"), [({}, "lora"), (FSDP, "full")], ids=["ddp, lora", "fsdp2, full"])
def test_two_groups_of_two_processes_train_like_one_process(values, alone, launcher, strategy, method):
    changes = {"train": {"accumulation": 1, "check_ranks": True}, "parallel": {"context": 2}}
    four, one = values(f"four-{method}", method, **changes), alone[method]
    ends = launcher.train(written(four), ranks=4, env=strategy)
    assert "2 clips = 1 x 1 accumulation x 2 processes of 4: 2 compute a clip together" in ends[0].log
    assert_close(state(four, 2), state(one, 2), rtol=1e-5)
    for ours, theirs in zip(metrics(four), metrics(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    videos = [sorted((Path(run["output_dir"]) / "samples").rglob("*.mp4")) for run in (four, one)]
    assert len(videos[0]) == len(videos[1]) == (method == "lora")


def test_a_divided_run_goes_on_in_one_process(values, alone, launcher):
    two = values("two", "lora", train={"steps": 1}, parallel={"context": 2}, validation=UNWATCHED)
    launcher.train(written(two))
    whole = merged(two, {"train": {"steps": 2}, "parallel": {"context": 1}})
    train(RunConfig.from_dict(whole))
    assert_close(state(whole, 2), state(alone["lora"], 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("launch", "processes", "changes", "message"),
    [
        (Replicate(), 3, {}, "3 processes cannot be divided into groups of 2"),
        (Replicate(), 1, {}, "1 process cannot be divided into groups of 2"),
        (Zero(2), 2, {"train": {"ema_decay": None}}, "not divided among processes under DeepSpeed"),
        (Replicate(), 2, {"memory": {"streamed_blocks": "all"}}, "works in a single process"),
        (FullShard(), 2, {"memory": {"block": "lean"}}, "works in a single process"),
        (Replicate(), 4, {"parallel": {"context": 4}}, None),
        (Replicate(), 6, {}, None),
    ],
)
def test_launches_that_do_not_go_with_divided_clips_are_refused(
    values, monkeypatch, launch, processes, changes, message
):
    monkeypatch.setattr("finetune.trainers.launch.import_deepspeed", lambda: None)
    config = RunConfig.from_dict(values("refused", "lora", **merged({"parallel": {"context": 2}}, changes)))
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        require_launch(launch, config, read_spec(config.model.pretrained), ProcessGroup(0, processes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"context": 5}}, "4 heads cannot be divided among 5 processes"),
        ({"parallel": {"context": 4}, "data": {"buckets": ["1x32x16"]}}, "14 tokens of text and 2 of video"),
        ({"parallel": {"context": 2}, "memory": {"block": "lean"}}, "the lean block draws dropout masks"),
        ({"parallel": {"context": 4}}, None),
    ],
)
def test_clips_that_cannot_be_divided_are_refused_by_the_configuration(values, changes, message):
    config = RunConfig.from_dict(values("refused", "lora", **changes))
    faults = check_against(config, read_spec(config.model.pretrained)).errors
    assert [message in fault.what for fault in faults] == ([True] if message else [])


# ---------------------------------------------------------------------------------------------------------- the planner


def test_the_planner_divides_what_processes_divide(tiny_model, demo_clips, tmp_path):
    """Of four processes each holds a quarter of the activations, and what is embedded and put together whole."""
    model = tiny_model("1.5-5b", num_layers=3, height=256, width=256)
    shared = {"data": {"buckets": ["33x256x256"]}, "method": FULL, "memory": {"checkpointing": "none"}}
    runs = [
        run_config(model, demo_clips, tmp_path / "run", parallel={"context": processes}, **shared)
        for processes in (1, 4)
    ]
    one, four = (predict(run, phases=("train",), processes=4).phase("train").peak.parts for run in runs)
    assert four["trainable weights"] == one["trainable weights"] and four["gradients"] == one["gradients"]
    assert 0.25 < four["saved activations"] / one["saved activations"] < 0.3
    with pytest.raises(ConfigError, match="4 processes compute a clip together, and the run is to have 6"):
        plan(runs[1], PlanOptions(processes=6))


def test_the_planner_counts_what_is_exchanged():
    spec = read_spec(str(known_model("1.5-5b")))
    one, four = (
        step_cost(run_config(known_model("1.5-5b"), Path("clips"), Path("run"), **changes), spec, MemoryConfig(), H100)
        for changes in (LONG, {**LONG, "parallel": {"context": 4}})
    )
    stream = 2 * 45_104 * 3072
    exchanged = (
        3 * 42 * 4 * stream / 4 * 3 / 4 / link_rate("H100")
    )  # three passes through a block, in each four tensors
    assert four.step_s - four.update.seconds == pytest.approx((one.step_s - one.update.seconds) / 4 + exchanged)
    assert exchanged < 0.1 < link_rate("H100") / link_rate("4090")


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_page_shows_the_planners_seconds(processes):
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    model = known_model("1.5-5b")
    changes = {**LONG, "method": {"rank": 128}, "parallel": {"context": processes}}
    config, memory = run_config(model, Path("clips"), Path("run"), **changes), {"checkpointing": "selective"}
    steps = [step_cost(config, read_spec(str(model)), MemoryConfig(block="lean", **memory), card) for card in CARDS]
    (row,) = re.findall(rf"^\| {processes} \|.* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert [float(cell) for cell in row] == pytest.approx([step.step_s for step in steps], abs=0.06)


LONG = {"data": {"buckets": ["81x768x1360"]}}
CARDS = [DEFAULTS[name] for name in ("H100", "A100", "4090")]
H100 = DEFAULTS["H100"]
