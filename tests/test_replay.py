"""A step that is not finite leaves a report, and a replay tells a bad clip, an overflow and diverged weights apart."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worlds import run_config, run_values

from finetune.caching.precompute import precompute
from finetune.checkpoint.folders import list_checkpoints
from finetune.checkpoint.load import load_checkpoint
from finetune.cli.app import OK, USER_ERROR
from finetune.cli.main import main
from finetune.cogvideox.objective import velocity_losses
from finetune.config.schema import RunConfig
from finetune.core.errors import CacheError, ModelError, TrainingError
from finetune.datasets.cache import Cache
from finetune.parallel.strategy import DataParallel
from finetune.trainers import fault_report
from finetune.trainers.fault_report import read_report
from finetune.trainers.loop import train
from finetune.trainers.replay import replay
from finetune.trainers.run import TrainedModel
from finetune.trainers.tracking import GatheredStep
from finetune.trainers.validation import MeasuredLoss

POISON = 1e25
"""Finite, and stored as it is; its square is not."""


FP32 = {"latents_dtype": "fp32"}


@pytest.fixture
def make(tiny_run) -> Callable[..., RunConfig]:
    """``make("name", **changes)``: ``tiny_run`` with latents that hold what is put into them."""
    return lambda name, **changes: tiny_run(name, cache=FP32, **changes)


def poison(config: RunConfig, value: float = POISON, index: int = 1) -> str:
    """Fill the latents of one clip with ``value``, as a broken encoder might have; returns the clip's name."""
    item = precompute(config, progress=False).manifest.items[index]
    cache = Cache(config.cache.dir)
    with safe_open(cache.path("latents", item.latents_key), "pt") as entry:
        address, shape = json.loads(entry.metadata()["address"]), entry.get_slice("latents_mean").get_shape()
    cache.write_latents(address, torch.full(shape, value), torch.zeros(shape), None)
    return item.clip


def fails(config: RunConfig) -> tuple[Path, TrainingError]:
    """Train into the fault; returns the report's folder and the error."""
    with pytest.raises(TrainingError, match="non-finite") as caught:
        train(config)
    (path,) = (config.output_dir / "reports").iterdir()
    assert str(path) in caught.value.fix and "finetune replay" in caught.value.fix
    return path, caught.value


METHODS = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 4},
    "dora": {"kind": "lora", "rank": 4, "alpha": 4, "use_dora": True},
    "full": {"kind": "full"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_clip_is_told_from_the_good_one_in_its_micro_batch(make, method):
    config = make("run", method=METHODS[method], train={"batch_size": 2}, checkpoint={"every": 1})
    bad = poison(config)
    path, error = fails(config)
    assert bad in error.where and error.where.count("timestep") == 1
    found = replay(path)
    assert found.kind == "clip" and found.reproduced and bad in found.diagnosis
    assert [each.sample.item.clip for each in found.bad] == [bad]
    assert len(found.samples) == 2 and sum(each.is_finite for each in found.samples) == 1
    assert f"{bad}" in str(found) and "reproduced: yes" in str(found)


def test_the_report_holds_what_decides_the_step(make, tmp_path):
    config = make("run", train={"batch_size": 2, "accumulation": 2, "steps": 6}, checkpoint={"every": 1})
    bad = poison(config)
    path, _ = fails(config)
    report, weights = read_report(path)
    assert path.name == f"nonfinite-step-{report.step:08d}"
    assert [(each.rank, each.micro_batch, each.slot) for each in report.samples] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 2),
        (0, 1, 3),
    ]
    assert [math.isfinite(each.loss) for each in report.samples] == [each.item.clip != bad for each in report.samples]
    assert report.config == config.to_dict() and report.config_digest == config.digest
    assert report.lr == config.optimizer.lr and report.loss_scale == 1.0 and report.dtype == "float32"
    assert report.non_finite_gradients == list(report.gradient_norms) and report.gradient_norms.keys() == weights.keys()
    assert torch.__version__.startswith(report.versions["torch"]) and "peft" in report.versions
    assert report.model_files.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_attention_is_computed_by_the_step_s_own_kernel(make, monkeypatch):
    """A fault of one kernel would not come again with another."""
    config = make("run", train={"batch_size": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "math"})})
    poison(config)
    path, _ = fails(config)
    kernels = []
    inner = velocity_losses
    watched = lambda *words: kernels.append(torch.backends.cuda.flash_sdp_enabled()) or inner(*words)  # noqa: E731
    monkeypatch.setattr("finetune.trainers.replay.velocity_losses", watched)
    assert torch.backends.cuda.flash_sdp_enabled()
    replay(path)
    assert kernels == [False, False]


def test_the_weights_are_those_before_the_update(make, tmp_path, monkeypatch):
    """A fault of the third step, made up, so that there is a step before to have moved the weights."""
    config = make("run", optimizer={"lr": 1e-2}, train={"accumulation": 2}, checkpoint={"every": 1})
    checks = []
    inner = GatheredStep.is_finite
    monkeypatch.setattr(
        GatheredStep, "is_finite", lambda self, norm: checks.append(norm) or (inner(self, norm) and len(checks) < 3)
    )
    path, _ = fails(config)
    report, weights = read_report(path)
    before = load_file(config.output_dir / "checkpoints" / "step-00000002" / "trainable.safetensors")
    earlier = load_file(config.output_dir / "checkpoints" / "step-00000001" / "trainable.safetensors")
    assert report.step == 2 and weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert any(not torch.equal(weights[name], earlier[name]) for name in before)  # canary: a step shows
    # The second pass is the first one: its gradient has the norm that was recorded before clipping.
    assert math.hypot(*report.gradient_norms.values()) == pytest.approx(report.grad_norm, rel=1e-6)
    found = replay(path)
    assert found.kind == "gone" and found.reproduced is False and "every sample is finite" in str(found)
    assert [each.loss for each in found.samples] == pytest.approx([each.loss for each in report.samples], rel=1e-6)


def test_diverged_weights_are_the_diagnosis(make, monkeypatch):
    monkeypatch.setattr("finetune.trainers.loop.lr_at", lambda *_: 1e6)  # beyond what a configuration may ask for
    path, _ = fails(make("run", train={"steps": 40}))
    found = replay(path)
    assert found.kind == "weights" and found.reproduced and "a lower optimizer.lr" in found.diagnosis
    assert found.bad and not any(each.has_bad_input for each in found.samples)


def test_an_overflow_of_fp16_is_finite_in_fp32(tiny_model, demo_clips, tmp_path):
    """One layer's weights just fit fp16, and its output does not; fp32 and the normalisation behind it do."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.1.ff.net.2.weight"] *= 6e4 / tensors["transformer_blocks.1.ff.net.2.weight"].abs().max()
    save_file(tensors, file, metadata={"format": "pt"})
    values = run_values(model, demo_clips, tmp_path / "run")
    values["model"]["dtype"] = "fp16"
    path, _ = fails(RunConfig.from_dict(values))
    here = replay(path)
    assert here.kind == "overflow?" and here.reproduced and "--dtype fp32" in here.diagnosis
    assert {each.bad_module for each in here.samples} == {"transformer_blocks.1.ff.net.2"}
    wider = replay(path, dtype="fp32")
    assert wider.kind == "overflow" and wider.reproduced is None and not wider.bad
    assert all(each.peak_module == "transformer_blocks.1.ff.net.2" and each.peak > 65504 for each in wider.samples)


# ------------------------------------------------------------------------------------- a measurement that is not finite


def watched(**changes) -> dict[str, object]:
    """Changes of a run whose held-out loss is measured after every second step."""
    return {"data": {"holdout": 1}, "validation": {"every": 2, "timesteps": 2}, "train": {"steps": 4}, **changes}


def poison_heldout(config: RunConfig) -> str:
    items = precompute(config, progress=False).manifest.items
    return poison(config, index=next(index for index, item in enumerate(items) if item.holdout))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_held_out_loss_that_is_not_finite_is_never_the_best_and_stops_the_run(make, ema_decay):
    """The steps so far are saved, the report says which clip, and the next start measures first."""
    config = make("run", **watched(train={"steps": 4, "ema_decay": ema_decay}))
    bad = poison_heldout(config)
    path, error = fails(config)
    assert path.name == "nonfinite-heldout-00000002" and error.where.count(bad) == 2  # two timesteps
    ((step, saved),) = list_checkpoints(config.output_dir)
    state = load_checkpoint(saved).state
    assert step == 2 and state.best_step is None and state.best_heldout_loss is None
    assert not (config.output_dir / "heldout.jsonl").exists()
    report, weights = read_report(path)
    assert report.measured and report.step == 2 and {each.item.clip for each in report.samples} > {bad}
    measured = load_checkpoint(saved).trainable if ema_decay is None else load_checkpoint(saved).ema
    assert all(torch.equal(weights[name], measured[name]) for name in weights)
    found = replay(path)
    assert (
        found.kind == "clip" and found.reproduced and bad in found.diagnosis and "measured after step 2" in str(found)
    )
    assert {each.sample.item.clip for each in found.bad} == {bad}
    assert fails(config)[0] == path and [step for step, _ in list_checkpoints(config.output_dir)] == [2]


def test_the_loss_on_training_clips_is_looked_at_as_well(make):
    config = make("run", **watched(validation={"every": 2, "timesteps": 2, "at_start": True}))
    items = precompute(config, progress=False).manifest.items
    bad = poison(config, index=next(index for index, item in enumerate(items) if not item.holdout))
    path, error = fails(config)
    assert path.name == "nonfinite-heldout-00000000" and bad in error.where
    assert not list_checkpoints(config.output_dir)  # before the first step there is nothing to save


@pytest.mark.parametrize("measured", [True, False])
def test_weights_that_are_not_finite_take_no_good_ones_place(make, measured, monkeypatch):
    """A step whose loss and gradient were finite, and whose update was not: made up here."""
    config = make("run", **watched(checkpoint={"every": 1}, **({} if measured else {"validation": {"every": None}})))
    updates, inner = [], DataParallel.step

    def spoilt(self):
        inner(self)
        updates.append(1)
        if len(updates) == 2:
            next(iter(self.parameters.values())).data[0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(DataParallel, "step", spoilt)
        with pytest.raises(TrainingError, match=r"non-finite|not finite") as caught:
            train(config)
    assert ("finetune replay" in caught.value.fix) is measured
    assert [step for step, _ in list_checkpoints(config.output_dir)] == [1]
    assert train(config).step == 4


def test_without_the_look_at_it_nan_would_be_the_best(make, monkeypatch):
    """Canary: what the first NaN did before it was looked at, in the middle of a save."""
    config = make("run", **watched())
    poison_heldout(config)
    monkeypatch.setattr(MeasuredLoss, "is_finite", True)
    with pytest.raises(ValueError, match="Out of range float"):
        train(config)


# ------------------------------------------------------------------------------------------ what a replay insists upon


@pytest.fixture(scope="module")
def reported(tiny_model, demo_clips, encoded_cache, tmp_path_factory) -> Path:
    """A report, its run and its cache, not to be changed."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copytree(encoded_cache(**FP32), folder / "cache")
    config = run_config(tiny_model(), demo_clips, folder / "run", cache=FP32)
    poison(config)
    return fails(config)[0]


@pytest.fixture
def copied(reported, tmp_path) -> Path:
    return shutil.copytree(reported, tmp_path / reported.name)


@pytest.mark.parametrize("name", ["report.json", "trainable.safetensors", "COMPLETE"])
def test_every_change_of_a_report_is_found(copied, name):
    whole = (copied / name).read_bytes()
    places = [0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2]
    damaged = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in places]
    damaged += [whole[: len(whole) // 2], b"", whole + b" "]
    for content in damaged:
        (copied / name).write_bytes(content)
        with pytest.raises(TrainingError, match="the report cannot be read"):
            replay(copied)
    (copied / name).unlink()
    with pytest.raises(TrainingError, match="the report cannot be read"):
        replay(copied)
    (copied / name).write_bytes(whole)
    assert replay(copied).kind == "clip"


def test_a_report_of_a_later_version_is_refused(copied):
    from finetune.core.checksums import folder_checksums
    from finetune.core.files import atomic_write_text

    content = json.loads((copied / "report.json").read_text()) | {"format": 99}
    (copied / "COMPLETE").unlink()
    (copied / "report.json").write_text(json.dumps(content))
    atomic_write_text(copied / "COMPLETE", folder_checksums(copied))
    with pytest.raises(TrainingError, match="format 99"):
        replay(copied)


def test_a_moved_cache_and_a_moved_model_are_named_and_found(copied, reported, tiny_model, tmp_path):
    cache = reported.parents[2] / "cache"
    moved = shutil.copytree(cache, tmp_path / "moved")
    with pytest.raises(CacheError, match="does not hold what the step read") as caught:
        replay(copied, cache=tmp_path / "empty")
    assert "--cache" in caught.value.fix
    assert replay(copied, cache=moved).kind == "clip"
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    assert replay(copied, pretrained=str(model)).reproduced
    (file,) = (model / "transformer").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors changed"):
        replay(copied, pretrained=str(model))


def test_without_room_for_the_weights_the_report_goes_without(make, monkeypatch):
    config = make("run")
    poison(config)
    monkeypatch.setattr(fault_report, "free_space", lambda path: 100)
    path, _ = fails(config)
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE", "report.json"]
    found = replay(path)
    assert found.kind == "clip" and found.reproduced is None
    assert "weights: as at step 0, because they need 0." in str(found) and "the disk has 0.000 MiB free" in str(found)


def test_a_disk_that_takes_nothing_does_not_hide_the_fault(make, monkeypatch):
    config = make("run")
    poison(config)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fault_report, "publish_dir", full)
    with pytest.raises(TrainingError, match="non-finite loss") as caught:
        train(config)
    assert "no report could be written" in caught.value.fix and "No space left" in caught.value.fix


def test_the_command_prints_the_table_and_the_diagnosis(reported, tmp_path, capsys):
    assert main(["replay", str(reported), "--device", "cpu"]) == OK
    printed = capsys.readouterr().out
    assert "diagnosis: bad clip" in printed and "first module not finite" in printed
    assert main(["replay", str(tmp_path)]) == USER_ERROR
    assert "the report cannot be read" in capsys.readouterr().err


def test_replaying_changes_nothing(reported):
    files = {path: path.read_bytes() for path in reported.rglob("*") if path.is_file()}
    first, second = replay(reported), replay(reported)
    assert str(first) == str(second)
    assert files == {path: path.read_bytes() for path in reported.rglob("*") if path.is_file()}


def test_without_the_check_the_weights_would_be_lost(make, monkeypatch):
    """Canary: what a step that is not finite does to a run that does not look."""
    config = make("run")
    poison(config)
    monkeypatch.setattr(GatheredStep, "is_finite", lambda self, norm: True)
    monkeypatch.setattr(TrainedModel, "is_finite", lambda self: True)
    trained = load_file(train(config).checkpoint / "trainable.safetensors")
    assert any(not torch.isfinite(tensor).all() for tensor in trained.values())
