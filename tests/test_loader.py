"""Batches are made ahead of time, and are a pure function of their address."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from waiting import HANG_S
from worlds import fabricate_cache, run_config

from finetune.caching.precompute import ensure_cache
from finetune.cogvideox.config import DropoutConfig, ObjectiveConfig
from finetune.cogvideox.objective import alpha_bar
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import CacheError
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker, Loader
from finetune.datasets.schedule import Item, MicroBatch, StepPlan

CPU = torch.device("cpu")


def maker(model, tmp_path, dropout=None, objective=None, **changes) -> BatchMaker:
    config = run_config(model, tmp_path / "none", tmp_path / "run", cache={"mode": "require"}, **changes)
    fabricate_cache(config, clips=3)
    spec, cache = read_spec(str(model)), Cache(config.cache.dir)
    manifest = ensure_cache(config, spec)
    empty = cache.read_prompt(manifest.empty_prompt_key)
    return BatchMaker(
        spec,
        cache,
        manifest.items,
        empty,
        dropout or DropoutConfig(caption_dropout=0),
        5,
        objective or ObjectiveConfig(),
    )


@pytest.mark.parametrize("variant", ["5b", "1.5-5b", "5b-i2v", "1.5-5b-i2v"])
def test_a_batch_has_the_shapes_the_model_wants(tiny_model, tmp_path, variant):
    made = maker(tiny_model(variant), tmp_path)
    batch = made.training(0, MicroBatch(items=(0, 2), slots=(0, 1)))
    spec = made.spec
    channels, frames, height, width = spec.latent_shape(made.items[0].bucket)
    padded = spec.padded_latent_frames(9)
    assert batch.latents.shape == batch.noise.shape == (2, channels, padded, height, width)
    assert batch.latents.dtype == torch.float32 and batch.timesteps.dtype == torch.int64
    assert (batch.image_latents is not None) == spec.image_to_video
    if batch.image_latents is not None:
        assert batch.image_latents.shape == (2, channels, 1, height, width)
    for copy in range(spec.front_padding(frames)):
        assert torch.equal(batch.latents[:, :, copy], batch.latents[:, :, spec.front_padding(frames)])


def test_a_batch_depends_on_its_address_alone(tiny_model, tmp_path):
    made = maker(tiny_model(), tmp_path)
    first = made.training(3, MicroBatch(items=(1,), slots=(4,)))
    torch.rand(10)
    again = made.training(3, MicroBatch(items=(1,), slots=(4,)))
    beside = made.training(3, MicroBatch(items=(0, 1), slots=(0, 4)))
    for name in ("latents", "noise", "timesteps", "prompt_embeds"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name)[0], getattr(beside, name)[1])
    assert not torch.equal(first.noise, made.training(4, MicroBatch(items=(1,), slots=(4,))).noise)


def test_dropped_conditions_are_the_unconditional_ones(tiny_model, tmp_path):
    made = maker(tiny_model("5b-i2v"), tmp_path, DropoutConfig(caption_dropout=1, image_dropout=1))
    batch = made.training(0, MicroBatch(items=(0,), slots=(0,)))
    assert torch.equal(batch.prompt_embeds[0], made.empty_prompt)
    assert batch.image_latents is not None and not batch.image_latents.any()


def test_the_objective_changes_what_is_trained_and_not_what_is_measured(tiny_model, tmp_path):
    bands = {"kind": "bands", "bands": [{"first": 900, "last": 910}]}
    plain = maker(tiny_model(), tmp_path)
    changed = maker(tiny_model(), tmp_path, objective=ObjectiveConfig(weighting="min_snr", timesteps=bands))
    micro = MicroBatch(items=(0, 1), slots=(0, 1))
    batch, usual = changed.training(0, micro), plain.training(0, micro)
    assert all(900 <= timestep <= 910 for timestep in batch.timesteps.tolist())
    levels = alpha_bar(plain.spec)[batch.timesteps]
    torch.testing.assert_close(batch.weights, torch.minimum(levels, 5 * (1 - levels)).float())
    assert usual.weights is None and torch.equal(batch.noise, usual.noise)
    measured = changed.fixed(1, (100, 900))
    assert measured.timesteps.tolist() == [100, 900] and measured.weights is None


def test_fixed_batches_never_drop_and_never_change(tiny_model, tmp_path):
    made = maker(tiny_model("5b-i2v"), tmp_path, DropoutConfig(caption_dropout=1, image_dropout=1))
    batch = made.fixed(1, (100, 900))
    assert batch.timesteps.tolist() == [100, 900]
    assert torch.equal(batch.noise, made.fixed(1, (100, 900)).noise)
    assert torch.equal(batch.noise[1], made.fixed(1, (900,)).noise[0])
    fewer = replace(made, items=made.items[1:])
    assert torch.equal(batch.noise, fewer.fixed(0, (100, 900)).noise), "it is the clip's, whatever else is there"
    assert not torch.equal(batch.prompt_embeds[0], made.empty_prompt)
    assert batch.image_latents is not None and batch.image_latents.any()


def loader(make, *, steps: int = 4, items: int = 4) -> Loader:
    from finetune.core.types import Bucket

    plan = StepPlan(tuple(Item(Bucket(9, 64, 64), 1.0) for _ in range(items)), 0, batch_size=1, micro_batches=2)
    return Loader(plan, make, rank=0, processes=1, total_steps=steps, device=CPU)


def test_the_next_step_is_made_while_this_one_runs(tiny_model, tmp_path):
    made = maker(tiny_model(), tmp_path)
    begun: list[int] = []
    second = threading.Event()

    def make(step: int, micro: MicroBatch):
        begun.append(step)
        if step == 1:
            second.set()
        return made.training(step, MicroBatch(items=(0,), slots=micro.slots))

    ahead = loader(make)
    assert len(list(ahead.step(0))) == 2
    assert second.wait(HANG_S), "step 1 was not begun before it was asked for"
    assert len(list(ahead.step(1))) == 2
    ahead.close()
    assert begun[:4] == [0, 0, 1, 1]


def test_what_the_host_computes_ahead_is_computed_in_the_thread(tiny_model, tmp_path):
    made = maker(tiny_model(), tmp_path)
    ahead, seen = loader(lambda step, micro: made.training(step, MicroBatch((0,), micro.slots)), steps=1), []
    ahead.prepare = lambda batch: seen.append((threading.current_thread(), batch.timesteps_on_host))
    batches = list(ahead.step(0))
    ahead.close()
    assert [tuple(batch.timesteps.tolist()) for batch in batches] == [timesteps for _, timesteps in seen]
    assert threading.current_thread() not in {thread for thread, _ in seen}


def test_nothing_is_made_beyond_the_last_step(tiny_model, tmp_path):
    made = maker(tiny_model(), tmp_path)
    begun: list[int] = []

    def make(step: int, micro: MicroBatch):
        begun.append(step)
        return made.training(step, MicroBatch(items=(0,), slots=micro.slots))

    ahead = loader(make, steps=2)
    for step in (0, 1):
        list(ahead.step(step))
    ahead.close()
    assert max(begun) == 1


def test_waiting_is_counted(tiny_model, tmp_path, monkeypatch):
    made = maker(tiny_model(), tmp_path)
    clock = count()
    monkeypatch.setattr("finetune.datasets.dataloader.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    ahead = loader(lambda step, micro: made.training(step, MicroBatch(items=(0,), slots=micro.slots)), steps=1)
    list(ahead.step(0))
    ahead.close()
    assert ahead.waited_s == 2  # by a clock that goes on by one whenever it is read: one for each micro-batch


def test_an_unreadable_entry_is_named_where_it_is_used(tiny_model, tmp_path):
    made = maker(tiny_model(), tmp_path)
    made.cache.path("latents", made.items[0].latents_key).unlink()
    ahead = loader(lambda step, micro: made.training(step, MicroBatch(items=(0,), slots=micro.slots)))
    with pytest.raises(CacheError, match=r"0\.mp4"):
        list(ahead.step(0))
    ahead.close()


def test_a_fault_is_told_before_the_step_that_it_would_stop(tiny_model, tmp_path):
    made = maker(tiny_model(), tmp_path)
    path = made.cache.path("latents", made.items[1].latents_key)
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    def make(step: int, micro: MicroBatch):
        return made.training(step, MicroBatch(items=(step,), slots=micro.slots))

    ahead = loader(make, steps=2)
    assert ahead.fault(0) is None and ahead.fault(2) is None  # step 2 is beyond the last
    assert len(list(ahead.step(0))) == 2
    fault = ahead.fault(1)
    assert isinstance(fault, CacheError) and "damaged" in str(fault) and "1.mp4" in str(fault)
    with pytest.raises(CacheError, match="damaged"):
        list(ahead.step(1))
    ahead.close()


def test_any_error_of_the_next_step_is_a_fault(tiny_model, tmp_path):
    def make(step: int, micro: MicroBatch):
        raise MemoryError(f"step {step}")

    ahead = loader(make)
    fault = ahead.fault(3)
    assert isinstance(fault, MemoryError) and str(fault) == "step 3" and ahead.waited_s > 0
    ahead.close()
