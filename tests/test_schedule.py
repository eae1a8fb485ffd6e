"""Sample order, learning rate and what is due, as pure functions of the step."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from finetune.core.types import Bucket
from finetune.datasets.samples import ValSplitConfig, choose_val_split
from finetune.datasets.schedule import (
    Constant,
    Cosine,
    Item,
    Linear,
    StepPlan,
    TrainConfig,
    epoch_items,
    groups_of,
    is_due,
    lr_at,
)

WIDE, TALL = Bucket(9, 64, 96), Bucket(9, 96, 64)
ITEMS = tuple(Item(WIDE if i % 3 else TALL, 1.0) for i in range(11))


def plan(items=ITEMS, *, batch_size=2, micro_batches=1, seed=3) -> StepPlan:
    return StepPlan(items=tuple(items), seed=seed, batch_size=batch_size, micro_batches=micro_batches)


def epoch_of(plan: StepPlan, epoch: int) -> list[int]:
    """The items of one epoch, read off single-micro-batch steps."""
    steps = range(plan.start_of(epoch), plan.start_of(epoch + 1))
    return [item for step in steps for micro in plan.step(step) for item in micro.items]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_every_epoch_holds_every_clip_exactly_once(batch_size):
    order = plan(batch_size=batch_size)
    for epoch in range(3):
        assert sorted(epoch_of(order, epoch)) == list(range(11))
    assert epoch_of(order, 0) != epoch_of(order, 1)


def test_a_micro_batch_never_mixes_buckets():
    order = plan(batch_size=4)
    for step in range(order.start_of(3)):
        for micro in order.step(step):
            assert len({ITEMS[i].bucket for i in micro.items}) == 1


def test_whole_repeats_are_honoured():
    order = plan([Item(WIDE, 3.0), Item(WIDE, 1.0), Item(TALL, 2.0)])
    assert Counter(epoch_of(order, 0)) == {0: 3, 1: 1, 2: 2}
    assert order.samples_per_epoch == 6


def test_fractional_repeats_share_out_over_epochs():
    order = plan([Item(WIDE, 0.25)] * 8 + [Item(TALL, 1.0)], batch_size=1)
    counts = [Counter(epoch_of(order, epoch)) for epoch in range(4)]
    assert all(sum(count.values()) == 3 for count in counts)
    assert sum(counts, Counter()) == {**dict.fromkeys(range(8), 1), 8: 4}


@pytest.mark.parametrize("processes,accumulation", [(1, 4), (2, 2), (4, 1)])
def test_a_step_is_the_same_however_it_is_split(processes, accumulation):
    whole = plan(micro_batches=4)
    split = plan(micro_batches=processes * accumulation)
    for step in range(7):
        ranks = [split.for_rank(step, rank, processes) for rank in range(processes)]
        assert all(len(micros) == accumulation for micros in ranks)
        ours = sorted(
            pair for micros in ranks for micro in micros for pair in zip(micro.slots, micro.items, strict=True)
        )
        theirs = sorted(pair for micro in whole.step(step) for pair in zip(micro.slots, micro.items, strict=True))
        assert ours == theirs


def test_slots_are_unique_inside_a_step():
    order = plan(batch_size=3, micro_batches=5)
    for step in range(10):
        slots = [slot for micro in order.step(step) for slot in micro.slots]
        assert len(set(slots)) == len(slots)


def test_steps_run_over_the_end_of_an_epoch_without_losing_a_clip():
    order = plan(batch_size=1, micro_batches=4)
    seen = [item for step in range(11) for micro in order.step(step) for item in micro.items]
    assert Counter(seen) == dict.fromkeys(range(11), 4)


def test_another_seed_gives_another_order():
    assert epoch_of(plan(seed=1), 0) != epoch_of(plan(seed=2), 0)


def test_epochs_become_steps():
    order = plan(batch_size=1, micro_batches=4)
    assert order.steps_per_epoch == 11 / 4
    assert [order.steps_for_epochs(e) for e in (4, 1, 0.01)] == [11, 3, 1]


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        plan([])


@pytest.mark.parametrize("repeats", [0.1, 0.4, 0.5, 0.6, 1.5, 2.25])
def test_a_fraction_of_one_clip_gets_its_share_in_every_so_many_epochs(repeats):
    order = plan([Item(WIDE, repeats), Item(TALL, 1.0)], batch_size=1)
    counts = Counter(item for epoch in range(20) for item in epoch_of(order, epoch))
    assert counts == {0: round(20 * repeats), 1: 20}
    assert order.samples_per_epoch == repeats + 1
    assert order.steps_for_epochs(20) == 20 + round(20 * repeats)


def test_bucket_order_does_not_depend_on_other_buckets():
    alone = epoch_items(groups_of([Item(WIDE, 1.0)] * 5), seed=1, epoch=0)[WIDE]
    beside = epoch_items(groups_of([Item(WIDE, 1.0)] * 5 + [Item(TALL, 1.0)]), seed=1, epoch=0)[WIDE]
    assert alone == beside


def test_holdout_moves_little_when_a_video_is_added():
    videos = [f"video{i}" for i in range(40)]
    before, after = choose_val_split(videos, 10), choose_val_split([*videos, "new"], 10)
    assert len(before) == 10 and len(before & after) >= 9


@pytest.mark.parametrize("holdout,expected", [(0, 0), (0.1, 1), (0.5, 2), (3, 3), (99, 3)])
def test_holdout_counts(holdout, expected):
    assert len(choose_val_split(["a", "b", "c", "d", "a"], holdout)) == expected


def test_one_video_is_never_held_out():
    assert choose_val_split(["only"], 0.5) == frozenset()


def test_a_fractional_count_is_refused():
    with pytest.raises(ValidationError, match="whole number"):
        ValSplitConfig(holdout=2.5)


def test_train_length_is_given_once():
    for wrong in ({}, {"steps": 3, "epochs": 1}):
        with pytest.raises(ValidationError, match="exactly one"):
            TrainConfig(**wrong)


def test_warmup_rises_to_the_base_rate_and_never_trains_at_zero():
    rates = [lr_at(step, 1.0, Constant(warmup_steps=4), 100) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("schedule", [Linear(warmup_steps=10, final=0.1), Cosine(warmup_steps=10, final=0.1)])
def test_decay_starts_at_one_and_ends_at_final(schedule):
    assert lr_at(10, 2.0, schedule, 110) == pytest.approx(2.0)
    assert lr_at(110, 2.0, schedule, 111) == pytest.approx(0.2)
    assert lr_at(60, 2.0, schedule, 111) == pytest.approx(1.1)
    rates = [lr_at(step, 2.0, schedule, 111) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_is_due():
    assert [step for step in range(11) if is_due(step, 4, last=10)] == [4, 8, 10]
    assert not is_due(8, None)
