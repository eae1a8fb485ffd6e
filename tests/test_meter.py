"""What a step amounted to, over processes of unequal shares; and that nothing non-finite passes."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from finetune.errors import TrainingError
from finetune.trainers.ema import Ema
from finetune.trainers.meter import Meter, StepRecord, require_finite
from finetune.trainers.stopping import StopRequest


def exchanged(*shares: list[tuple[float, int]], rows: int = 3, stops: tuple[bool, ...] = ()) -> StepRecord:
    """Play the collective by hand: every share is one process's."""
    tables: list[torch.Tensor] = []
    for share, stop in zip(shares, stops or (False,) * len(shares), strict=True):
        meter = Meter(rows, gather=lambda table: tables.append(table) or table)
        losses, timesteps = zip(*share, strict=True)
        meter.add(torch.tensor(losses), torch.tensor(timesteps), ["clip"] * len(share))
        meter.exchange(stop)
    final = Meter(rows, gather=lambda _: torch.cat(tables))
    final.add(torch.tensor([0.0]), torch.tensor([0]), ["clip"])
    return final.exchange(False)


def test_unequal_shares_count_by_sample():
    record = exchanged([(1.0, 5), (2.0, 6), (3.0, 7)], [(6.0, 8)])
    assert record.loss == 3.0 and sorted(record.timesteps) == [5, 6, 7, 8]


def test_one_process_asking_stops_all():
    assert exchanged([(1.0, 0)], [(1.0, 0)], stops=(False, True)).stop
    assert not exchanged([(1.0, 0)], [(1.0, 0)]).stop


def test_a_non_finite_loss_survives_the_exchange():
    record = exchanged([(math.nan, 3)], [(1.0, 4)])
    assert any(math.isnan(loss) for loss in record.losses) and len(record.losses) == 2


def one(loss: float) -> tuple[StepRecord, Meter]:
    meter = Meter(1, gather=lambda table: table)
    meter.add(torch.tensor([loss]), torch.tensor([17]), ["videos/a.mp4#2"])
    return meter.exchange(False), meter


def same(words: list[str]) -> list[str]:
    return words


def test_finite_steps_pass():
    require_finite(*[one(1.0)[0], 0.5, one(1.0)[1]], step=3, gather_words=same)


@pytest.mark.parametrize("loss,norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_stops_and_is_named(loss, norm):
    record, meter = one(loss)
    with pytest.raises(TrainingError, match="step 3") as caught:
        require_finite(record, norm, meter, step=3, gather_words=same)
    assert "videos/a.mp4#2" in str(caught.value)


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


def test_the_first_signal_asks_and_the_second_interrupts():
    handler = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.by == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
