"""The loop as a whole, on tiny models: it trains, resumes bit for bit, and validation leaves it alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import assert_same_run, run_config, stop_after, tensors

from finetune.core.errors import CheckpointError, ConfigError, TrainingError
from finetune.trainers import loop
from finetune.trainers.loop import train
from finetune.trainers.run import TrainedModel
from finetune.trainers.validation import MeasuredLoss, Validator


def tangled(demo_clips: Path, wide_clips: Path) -> dict[str, object]:
    """Two buckets, accumulation, an odd number of clips: steps mix epochs, and some micro-batches are smaller."""
    return {
        "data": {
            "sources": [{"path": str(demo_clips)}, {"path": str(wide_clips)}],
            "buckets": ["9x64x64", "9x32x64"],
            "caption_dropout": 0.3,
        },
        "train": {"steps": 5, "accumulation": 3, "batch_size": 2},
    }


# Rank 64: the adapter's matrices have 4096 elements, the least that the 8-bit optimizer quantises.
METHODS = {"lora": {"kind": "lora", "rank": 64, "alpha": 64, "dropout": 0.1}, "full": {"kind": "full"}}
OPTIMIZERS = {"adamw": {"kind": "adamw", "lr": 1e-3}, "adamw8bit": {"kind": "adamw8bit", "lr": 1e-3}}


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_only_what_trains(tiny_run, tiny_model, method):
    config = tiny_run("run", method=METHODS[method])
    report = train(config)
    assert report.step == report.total_steps == 4 and not report.stopped_by
    trained = tensors(report)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    if method == "lora":
        assert all("lora" in name for name in trained)
        assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    else:
        before = load_file(next((tiny_model() / "transformer").glob("*.safetensors")))
        assert trained.keys() == before.keys()
        assert any(not torch.equal(trained[name], before[name]) for name in trained)


def test_every_step_is_handed_to_the_caller(tiny_run):
    changes = {"train": {"steps": 3, "batch_size": 2, "accumulation": 2}, "checkpoint": {"every": 2}}
    config = tiny_run("run", **changes)
    records = []
    train(config, on_step=records.append)
    assert [record.step for record in records] == [1, 2, 3] and [record.samples_seen for record in records] == [
        4,
        8,
        12,
    ]
    for record in records:
        assert record.loss == pytest.approx(sum(record.losses) / 4) and len(record.timesteps) == 4
        assert record.grad_norm > 0 and record.lr == 1e-3 and record.s_per_step > 0 and record.peak_gib > 0

    def stop(record):
        raise KeyError(record.step)

    with pytest.raises(KeyError, match="1"):
        train(tiny_run("other", **changes), on_step=stop)


@pytest.mark.arithmetic
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_n_steps_are_k_steps_and_a_resume(tiny_model, demo_clips, wide_clips, tmp_path, method, kind):
    changes = tangled(demo_clips, wide_clips) | {"method": METHODS[method], "optimizer": OPTIMIZERS[kind]}
    model = tiny_model()
    whole = train(run_config(model, demo_clips, tmp_path / "whole", **changes))
    split = tmp_path / "split"
    part = run_config(model, demo_clips, split, **changes, checkpoint={"every": 2})
    stop_after(2, part)
    resumed = train(part)
    assert resumed.step == 5
    assert_same_run(resumed, whole)
    if kind == "adamw8bit":
        assert any(tensor.dtype == torch.uint8 for tensor in tensors(whole, "optimizer").values())


def test_an_ended_run_has_nothing_to_do(tiny_run):
    config = tiny_run("run")
    first = train(config)
    again = train(config)
    assert again.step == first.step == 4
    assert_same_run(again, first)


def test_a_longer_run_continues(train_tiny):
    changes = {"optimizer": {"lr": 1e-3}}
    train_tiny("a", **changes, train={"steps": 2})
    longer = train_tiny("a", **changes, train={"steps": 4})
    straight = train_tiny("b", **changes, train={"steps": 4})
    assert_same_run(longer, straight)


@pytest.mark.parametrize(
    "change,field",
    [({"method": {"rank": 8}}, "method.rank"), ({"train": {"seed": 8}}, "train.seed")],
)
def test_a_run_that_cannot_continue_is_refused_field_by_field(train_tiny, change, field):
    train_tiny("run")
    with pytest.raises(CheckpointError, match=field.replace(".", r"\.")):
        train_tiny("run", **change)


def test_what_check_would_advise_is_said_before_the_first_step(tiny_model, demo_clips, tmp_path, capsys, monkeypatch):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(next(iter(sorted(demo_clips.glob("*.mp4")))).read_bytes())
    (tmp_path / "clips" / "a.txt").write_text("a red circle moving left")
    monkeypatch.setattr("finetune.caching.check.MOST_SEEN", 1)
    train(run_config(tiny_model(), tmp_path / "clips", tmp_path / "run", data={"holdout": 0.1}, train={"steps": 2}))
    before, _, _ = capsys.readouterr().out.partition("training clips")
    assert "warning: no clip is held out" in before and "warning: 1 clips for 2 steps are 2 epochs" in before


def test_a_missing_checkpoint_is_an_error(train_tiny, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        train_tiny("run", checkpoint={"resume": str(tmp_path / "nowhere")})


@pytest.mark.arithmetic
def test_validation_changes_no_bit_of_training(tiny_run, tmp_path):
    shared = {
        "method": METHODS["lora"],
        "data": {"holdout": 1},
        "train": {"steps": 4, "ema_decay": 0.9},
        "checkpoint": {"keep_best": False},
    }
    watching = {
        "every": 1,
        "at_start": True,
        "timesteps": 2,
        "samples": [{"prompt": "a red circle moving left", "seed": 3}],
        "sample_every": 2,
        "num_inference_steps": 2,
    }
    steps = {"with": [], "without": []}

    def run(name, validation):
        config = tiny_run(name, **shared, validation=validation)
        return train(
            config,
            lambda step: steps[name].append(
                (step.losses, step.timesteps, step.grad_norm, torch.get_rng_state().tolist())
            ),
        )

    reports = {"without": run("without", {"every": None, "at_start": False}), "with": run("with", watching)}
    assert steps["with"] == steps["without"] and len(steps["with"]) == 4
    assert_same_run(reports["with"], reports["without"])
    videos = sorted(path.relative_to(tmp_path / "with" / "samples") for path in (tmp_path / "with").rglob("*.mp4"))
    assert [str(path.parent) for path in videos] == ["step-00000000", "step-00000002", "step-00000004"]
    history = [json.loads(line) for line in (tmp_path / "with" / "heldout.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [0, 1, 2, 3, 4]
    assert reports["with"].heldout_before == history[0]["heldout"]


def test_the_best_checkpoint_is_kept(tiny_run, tmp_path):
    config = tiny_run(
        "run",
        data={"holdout": 1},
        train={"steps": 6},
        validation={"every": 1, "timesteps": 2},
        checkpoint={"every": 1, "keep_last": 1, "keep_best": True},
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "heldout.jsonl").read_text().splitlines()]
    best = min((row for row in rows if row["step"] > 0), key=lambda row: row["heldout"])["step"]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {f"step-{best:08d}", "step-00000006"}


@pytest.mark.parametrize(
    ("losses", "keep_best", "ending"),
    [
        ([0.2, 0.3, 0.4], True, " --checkpoint best"),
        ([0.2, 0.3, 0.4], False, ""),  # its checkpoint is not there
        ([0.3, 0.2, 0.4], False, "/checkpoints/step-00000002"),  # still there, by keep_last
        ([0.4, 0.3, 0.2], True, ""),
    ],
    ids=["worse", "not kept", "stands", "better"],
)
def test_the_end_says_which_step_was_best_and_how_to_export_it(tiny_run, monkeypatch, losses, keep_best, ending):
    measured = iter(loss for heldout in losses for loss in (heldout, 0.1))

    def evaluate(_, passes):
        return MeasuredLoss(passes[:1], [[next(measured)] * len(passes[0].timesteps)])

    monkeypatch.setattr(Validator, "_evaluate", evaluate)
    config = tiny_run(
        "run",
        data={"holdout": 1},
        train={"steps": 3},
        validation={"every": 1},
        checkpoint={"every": 1, "keep_last": 2, "keep_best": keep_best},
    )
    report = train(config)
    best = losses.index(min(losses)) + 1
    assert (report.best_step, report.best_heldout) == (best, min(losses))
    assert report.verdict in str(report) and f"with {min(losses):.4f}" in report.verdict
    assert report.export_command == f"finetune export {config.output_dir}{ending}"
    assert ("was not kept" in report.verdict) == (ending == "" and best != 3)
    again = train(config)  # done already: it says the same
    assert (again.verdict, again.export_command) == (report.verdict, report.export_command)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({}, "no clip is held out"), ({"data": {"holdout": 1}}, "validation.every is null")],
)
def test_the_end_says_when_nothing_measured_the_run(train_tiny, tmp_path, changes, why):
    report = train_tiny("run", train={"steps": 1}, **changes)
    assert f"nothing measured whether the last step is the best one: {why}" in str(report)
    assert report.best_step is None and report.export_command == f"finetune export {tmp_path / 'run'}"


def test_a_non_finite_loss_stops_before_the_update_and_names_the_clip(tiny_run, tmp_path):
    config = tiny_run("run", checkpoint={"every": 1})
    inner, calls = TrainedModel.losses, 0

    def poisoned(model, batch):
        nonlocal calls
        calls += 1
        return inner(model, batch) * (float("nan") if calls == 3 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedModel, "losses", poisoned)
        with pytest.raises(TrainingError, match="step 2") as caught:
            train(config)
    assert ".mp4" in str(caught.value) and "timestep" in str(caught.value)
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    assert last.name == "step-00000002"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / "trainable.safetensors").values())


@pytest.mark.parametrize("change", [{"model": {"dtype": "bf16"}}, {"data": {"buckets": ["9x32x32"]}}], ids=str)
def test_a_run_that_cannot_continue_is_refused_before_anything_is_encoded(tiny_run, change):
    train(tiny_run(train={"steps": 1}))
    config = tiny_run(train={"steps": 2}, **change)
    before = {path: path.stat().st_mtime_ns for path in config.cache.dir.rglob("*.safetensors")}
    with pytest.raises(CheckpointError, match=r"what a run cannot change|not what this run was trained on"):
        train(config)
    assert before == {path: path.stat().st_mtime_ns for path in config.cache.dir.rglob("*.safetensors")}


@pytest.mark.parametrize("resume", ["none", "nowhere"])
def test_a_checkpoint_that_does_not_go_with_its_folder_is_refused_before_anything_is_encoded(
    tiny_run, tmp_path, resume
):
    train(tiny_run(train={"steps": 1}))
    config = tiny_run(train={"steps": 2}, cache={"dir": tmp_path / "empty"}, checkpoint={"resume": resume})
    with pytest.raises(CheckpointError, match=r"resume is none|there is no checkpoint"):
        train(config)
    assert not [*(tmp_path / "empty").rglob("*.safetensors")]


def test_a_run_folder_that_cannot_be_written_to_is_known_before_anything_is_encoded(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_run("file/run", cache={"dir": tmp_path / "empty"})
    with pytest.raises(CheckpointError, match="cannot be written to"):
        train(config)
    assert not [*(tmp_path / "empty").rglob("*.safetensors")]


def test_full_fine_tuning_in_fp16_is_refused(tiny_run):
    values = {"method": {"kind": "full"}, "memory": {"checkpointing": "none"}}
    config = tiny_run("run", **values)
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "fp16"})})
    with pytest.raises(ConfigError, match="fp16"):
        train(narrow)


def test_a_launchers_own_accumulation_is_refused(train_tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(ConfigError, match="accumulate 3"):
        train_tiny("run", train={"accumulation": 2})


@pytest.mark.arithmetic
def test_the_gradient_is_the_mean_over_samples_also_of_unequal_micro_batches(tiny_run):
    """Four clips in batches of three: micro-batches of three and of one, each clip counting the same."""
    config = tiny_run(
        "run",
        train={"steps": 1, "batch_size": 3, "accumulation": 2, "max_grad_norm": None},
    )
    runs, ours = [], []
    real_setup, real_check = loop.setup_run, loop.require_finite

    def assembled(config, cleanup):
        runs.append(real_setup(config, cleanup))
        return runs[0]

    def captured(*arguments, **named):
        ours.extend(parameter.grad.clone() for parameter in runs[0].model.parameters.values())
        return real_check(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "setup_run", assembled)
        patch.setattr(loop, "require_finite", captured)
        patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)  # the weights stay the initial ones
        train(config)
    run = runs[0]
    micros = run.data.plan.step(0)
    assert sorted(len(micro.items) for micro in micros) == [1, 3]
    total = sum(run.model.losses(run.data.training.training(0, micro)).sum() for micro in micros) / 4
    theirs = torch.autograd.grad(total, list(run.model.parameters.values()))
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-7)


def test_the_run_folder_says_what_was_run(tiny_run, tmp_path):
    from finetune.config.schema import load_config

    config = tiny_run("run")
    train(config)
    assert load_config(Path(tmp_path / "run" / "config.yaml")) == config
