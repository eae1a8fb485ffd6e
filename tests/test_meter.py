"""What a step amounted to, over processes of unequal shares; and that nothing non-finite passes for a number."""

from __future__ import annotations

import math

import pytest
import torch

from finetune.optim.ema import Ema
from finetune.trainers.tracking import GatheredStep, StepMetrics


def exchanged(
    *shares: list[tuple[float, int]],
    rows: int = 3,
    stops: tuple[bool, ...] = (),
    faults: tuple[bool, ...] = (),
) -> GatheredStep:
    """Play the collective by hand: every share is one process's."""
    tables: list[torch.Tensor] = []
    none = (False,) * len(shares)
    for share, stop, fault in zip(shares, stops or none, faults or none, strict=True):
        meter = StepMetrics(rows, gather=lambda table: tables.append(table) or table)
        losses, timesteps = zip(*share, strict=True)
        meter.add(torch.tensor(losses), torch.tensor(timesteps))
        meter.exchange(stop=stop, fault=fault)
    final = StepMetrics(rows, gather=lambda _: torch.cat(tables))
    final.add(torch.tensor([0.0]), torch.tensor([0]))
    return final.exchange()


def test_unequal_shares_count_by_sample_in_the_order_of_the_ranks():
    record = exchanged([(1.0, 5), (2.0, 6), (3.0, 7)], [(6.0, 8)])
    assert record.timesteps == (5, 6, 7, 8) and record.losses == (1.0, 2.0, 3.0, 6.0)


@pytest.mark.parametrize("flag,name", [("stops", "stop"), ("faults", "fault")])
def test_what_one_process_has_to_tell_reaches_all(flag, name):
    other = {"stop": "fault", "fault": "stop"}[name]
    for told in ((False, True), (True, False), (True, True)):
        record = exchanged([(1.0, 0)], [(1.0, 0)], **{flag: told})
        assert getattr(record, name) and not getattr(record, other)
    quiet = exchanged([(1.0, 0)], [(1.0, 0)])
    assert not quiet.stop and not quiet.fault
    both = exchanged([(1.0, 0)], [(1.0, 0)], stops=(True, False), faults=(False, True))
    assert both.stop and both.fault


def test_a_non_finite_loss_survives_the_exchange():
    record = exchanged([(math.nan, 3)], [(1.0, 4)])
    assert any(math.isnan(loss) for loss in record.losses) and len(record.losses) == 2


def test_a_step_that_is_begun_again_is_counted_once():
    meter = StepMetrics(2, gather=lambda table: table)
    meter.add(torch.tensor([7.0, 8.0]), torch.tensor([1, 2]))
    meter.reset()
    for loss, timestep in ((1.0, 1), (2.0, 2)):  # the parts of the same micro-batch
        meter.add(torch.tensor([loss]), torch.tensor([timestep]))
    assert meter.exchange().losses == (1.0, 2.0)


def test_finite_steps_pass():
    assert exchanged([(1.0, 5)]).is_finite(0.5)


@pytest.mark.parametrize("loss,norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_does_not_pass(loss, norm):
    assert not exchanged([(1.0, 5)], [(loss, 17)]).is_finite(norm)


def test_the_average_is_applied_and_exactly_taken_back():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0 / 3]))
    average = Ema({"w": weight}, {"w": weight}, decay=0.5)
    before = weight.detach().clone()
    for _ in range(2):  # the first step's weights are taken whole
        with torch.no_grad():
            weight.add_(1.0)
        average.step()
    moved = weight.detach().clone()
    with pytest.raises(RuntimeError), average.applied():
        assert not torch.equal(weight, moved) and not torch.equal(weight, before)
        raise RuntimeError
    assert torch.equal(weight, moved)


def test_a_loaded_average_goes_on_as_the_one_it_was_saved_from():
    def run(steps: int, average: Ema, weight: torch.nn.Parameter) -> None:
        for _ in range(steps):
            with torch.no_grad():
                weight.mul_(0.9).add_(0.1)
            average.step()

    whole = torch.nn.Parameter(torch.ones(3) * 5)
    straight = Ema({"w": whole}, {"w": whole}, decay=0.99)
    run(6, straight, whole)
    part = torch.nn.Parameter(torch.ones(3) * 5)
    first = Ema({"w": part}, {"w": part}, decay=0.99)
    run(4, first, part)
    second = Ema({"w": part}, {"w": part}, decay=0.99)
    second.load(first.state(), 4)
    run(2, second, part)
    assert torch.equal(second.state()["w"], straight.state()["w"])
