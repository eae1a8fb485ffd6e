"""Whole trainings in every memory state: they learn what a training without learns, and stop and go on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worlds import assert_same_run, fails_where, merged, run_values, stop_after, tensors

from finetune.cogvideox.spec import read_spec
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.errors import CheckpointError
from finetune.memory.runner import block_runner
from finetune.trainers import loop
from finetune.trainers.loop import TrainReport, train

LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}
FULL: dict[str, Any] = {"kind": "full"}
EIGHT_BIT: dict[str, Any] = {"kind": "adamw8bit", "lr": 1e-3}


@dataclass(frozen=True)
class Case:
    """A memory state, and what it is compared with."""

    memory: dict[str, Any]
    method: dict[str, Any]
    dtype: str = "fp32"
    optimizer: dict[str, Any] = field(default_factory=dict)
    bound: float | None = 0.0
    """Of the weights' relative difference from a run without techniques; None where the arithmetic is another."""


HOST = {"gradient_release": "exact", "optimizer_states": "host"}
NO_DROPOUT = LORA | {"dropout": 0.0}
EVERYTHING = {"activations": "host", "streamed_blocks": "all"}
CASES: dict[str, Case] = {
    "stock": Case({**EVERYTHING, "checkpointing": "selective", "ring": 1, "modulation": "host"}, LORA),
    # Other dropout masks, so another run; without dropout see test_memory.py.
    "lean": Case({"block": "lean"}, LORA, bound=None),
    "lean, no dropout": Case({"block": "lean"}, NO_DROPOUT, bound=1e-4),
    "nf4": Case({"base": "nf4"}, LORA, "bf16", bound=None),
    "the 8 GB plan": Case(
        {**EVERYTHING, "block": "lean", "modulation": "host", "base": "fp8"}, LORA, "bf16", EIGHT_BIT, bound=None
    ),
    "released": Case({"gradient_release": "exact"}, FULL, bound=1e-5),
    "released at once": Case({"gradient_release": "per_parameter"}, FULL, "bf16", {"weights": "kahan"}, bound=None),
    "states on the host": Case(HOST, FULL, "bf16", bound=1e-3),
    "all on the host": Case(
        {**HOST, **EVERYTHING, "block": "lean"}, FULL, "bf16", EIGHT_BIT | {"weights": "stochastic"}, bound=None
    ),
}


@pytest.fixture(scope="module")
def whole(
    tiny_model: Callable[..., Path], demo_clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], TrainReport]:
    """``whole(case)``: a run of three steps, made once."""
    reports: dict[str, TrainReport] = {}

    def run(case: Case) -> TrainReport:
        if (key := repr(replace(case, bound=None))) not in reports:
            reports[key] = train(config_of(case, tiny_model(), demo_clips, tmp_path_factory.mktemp("whole")))
        return reports[key]

    return run


def config_of(case: Case, model: Path, clips: Path, output: Path, **changes: Any):
    own = {
        "model": {"dtype": case.dtype},
        "method": case.method,
        "memory": case.memory,
        "optimizer": {"lr": 1e-3, **case.optimizer},
        "train": {"steps": 3},
    }
    return RunConfig.from_dict(merged(merged(run_values(model, clips, output), own), changes))


@pytest.mark.parametrize("name", CASES)
def test_a_run_stops_and_goes_on_bit_for_bit(tiny_model, demo_clips, tmp_path, whole, name):
    part, model = config_of(CASES[name], tiny_model(), demo_clips, tmp_path / "part"), tiny_model()
    stop_after(2, part)
    resumed = train(part)
    assert resumed.step == whole(CASES[name]).step == 3
    assert_same_run(resumed, whole(CASES[name]))
    begun = load_file(next((model / "transformer").glob("*.safetensors")))
    assert any(name not in begun or not torch.equal(t, begun[name].to(t.dtype)) for name, t in tensors(resumed).items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bound is not None])
def test_a_run_learns_what_a_run_without_learns(whole, name):
    case = CASES[name]
    with_it, without = tensors(whole(case)), tensors(whole(replace(case, memory={})))
    assert with_it.keys() == without.keys()
    assert distance(with_it, without) <= (case.bound or 0.0)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of two models, relative; over all weights together, because Adam moves a weight whose gradient is noise as far as
    any other.
    """
    both = [torch.cat([weights[key].float().flatten() for key in sorted(theirs)]) for weights in (ours, theirs)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def test_a_base_in_another_format_is_another_run_and_no_resume(tiny_model, demo_clips, tmp_path, whole):
    """Also the canary of the test above: a changed base is seen."""
    case, plain = CASES["nf4"], replace(CASES["nf4"], memory={})
    ours, theirs = tensors(whole(case)), tensors(whole(plain))
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)
    stop_after(2, config_of(case, tiny_model(), demo_clips, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"memory\.base"):
        train(config_of(plain, tiny_model(), demo_clips, tmp_path / "run"))


@pytest.mark.parametrize(
    ("method", "memory", "last"),
    [
        (NO_DROPOUT, {"checkpointing": "none"}, "memory.streamed_blocks: all"),
        (FULL, {"gradient_release": "exact", "optimizer_states": "host"}, "memory.streamed_blocks: all"),
    ],
    ids=["lora", "full"],
)
def test_a_run_goes_down_the_whole_ladder(
    tiny_model, demo_clips, tmp_path, whole, monkeypatch, capsys, method, memory, last
):
    """Memory runs out at every notch of the second step but the last; the run ends, and learns what a calm one does."""
    case = Case(memory, method)
    config = config_of(case, tiny_model(), demo_clips, tmp_path / "hit")
    notches = config.memory.fallbacks(memory_traits(config, read_spec(config.model.pretrained)))
    assert len(notches) >= 4
    with monkeypatch.context() as patch:
        fails_where(patch, lambda batch, call: 1 < call <= len(notches))
        hit = train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of GPU memory" in line]
    assert len(said) == len(notches) - 1 and last in said[-1]
    assert distance(tensors(hit), tensors(whole(case))) <= 1e-4


def test_measuring_and_sampling_pass_through_the_same_state(tiny_model, demo_clips, tmp_path, monkeypatch):
    """A held-out loss and a video, with everything on the host: no bit of training changes."""
    case = CASES["the 8 GB plan"]
    seen = []
    inner = loop.Sampler.sample
    monkeypatch.setattr(
        loop.Sampler,
        "sample",
        lambda self, step: (seen.append(block_runner(self._run.model.module)), inner(self, step))[1],
    )
    quiet = train(config_of(case, tiny_model(), demo_clips, tmp_path / "quiet", data={"holdout": 0.25}))
    watched = train(
        config_of(
            case,
            tiny_model(),
            demo_clips,
            tmp_path / "watched",
            data={"holdout": 0.25},
            validation={
                "every": 1,
                "sample_every": 2,
                "samples": [{"prompt": "a red circle", "seed": 0}],
                "num_inference_steps": 2,
                "clips": 1,
                "timesteps": 2,
            },
        )
    )
    assert seen and all(blocks is not None for blocks in seen)
    assert watched.heldout_after is not None
    assert_same_run(watched, quiet)


MEASURED = {"every": 1, "clips": 1, "timesteps": 2}


def measured(tmp_path, model, clips, name: str, memory: dict[str, Any]) -> str:
    """The held-out losses of a run that keeps an average of its weights, which is what is measured."""
    train(
        config_of(
            Case(memory, FULL, "bf16"),
            model,
            clips,
            tmp_path / name,
            data={"holdout": 0.25},
            validation=MEASURED,
            train={"steps": 3, "ema_decay": 0.5},
        )
    )
    return (tmp_path / name / "heldout.jsonl").read_text()


def test_the_average_is_measured_also_where_weights_stream(tiny_model, demo_clips, tmp_path, monkeypatch):
    model = tiny_model()
    streamed = measured(tmp_path, model, demo_clips, "streamed", {**HOST, "streamed_blocks": "all"})
    assert streamed == measured(tmp_path, model, demo_clips, "resident", HOST)
    assert len(streamed.splitlines()) == 3
    # Canary: without the word that weights were exchanged, copies of the old ones are measured.
    monkeypatch.setattr("finetune.trainers.run.rewriting_weights", lambda module: nullcontext())
    assert measured(tmp_path, model, demo_clips, "stale", {**HOST, "streamed_blocks": "all"}) != streamed
