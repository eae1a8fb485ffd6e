"""What happens at which optimizer step, as pure functions of the step: sample order, learning rate, what is due.

One *step* is one optimizer step of ``micro_batches = accumulation x processes`` micro-batches. An epoch is cut into
micro-batches of one bucket each; the micro-batches of all epochs form one endless sequence, and step ``s`` takes the
next ``micro_batches`` of it. So no sample is dropped at the end of an epoch, a process joins or leaves without
changing what a step trains on, and "where were we" is the step number.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from finetune.core.rng import permutation
from finetune.core.types import MOST_STEPS, Bucket, Strict


class TrainConfig(Strict):
    """How long to train, and on how much at once."""

    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Optimizer steps in all. Give this or ``epochs``."""
    epochs: float | None = Field(None, ge=1e-6, le=100_000)
    """Passes over the training clips, repeats included; may be a fraction."""
    batch_size: int = Field(1, ge=1, le=4_096)
    """Clips per micro-batch and process."""
    accumulation: int = Field(1, ge=1, le=65_536)
    """Micro-batches per process that are summed into one optimizer step."""
    max_grad_norm: float | None = Field(1.0, ge=1e-9, le=1e9)
    """Global L2 norm to which the gradient of a whole step is clipped; null for no clipping."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Everything random in the run follows from this number."""
    deterministic: bool = False
    """Compute with deterministic kernels, so that a run on a GPU repeats bit for bit; some are slower. On a CPU a run
    repeats itself in any case."""
    check_ranks: bool = False
    """Before each update, compare gradients, weights and the step's samples between all processes and stop where they
    differ: to find a faulty card or a bug. Takes a copy of the trainable weights to the host per step."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the trainable weights, such as 0.999; null for none. Validation and export
    then use the average."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs; null takes the other away")
        return self


# ----------------------------------------------------------------------------------------------------- sample order


@dataclass(frozen=True)
class Item:
    """What the order needs to know of one training clip."""

    bucket: Bucket
    repeats: float


@dataclass(frozen=True)
class MicroBatch:
    """Which clips (indices into the items) one micro-batch holds, and their slots in the step."""

    items: tuple[int, ...]
    slots: tuple[int, ...]


Groups = Mapping[tuple[Bucket, float], Sequence[int]]
"""Indices of the clips that share a bucket and a number of repeats."""


def groups_of(items: Iterable[Item]) -> Groups:
    """Clips by bucket and repeats, in the order in which they come."""
    groups: dict[tuple[Bucket, float], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.bucket, item.repeats), []).append(index)
    return groups


def epoch_items(groups: Groups, seed: int, epoch: int) -> dict[Bucket, list[int]]:
    """The clips of one epoch by bucket, each bucket in a fresh random order.

    A clip with repeats 3 stands three times. Of the clips that share a bucket and a fractional repeats such as 2.25,
    every one stands twice and a quarter of them once more, another quarter in the next epoch: the subset moves on
    through a fixed random order, so that over the epochs each clip gets its share, also where a quarter is less than
    one clip and falls due in every so many epochs only.
    """
    chosen: dict[Bucket, list[int]] = {}
    for (bucket, repeats), members in groups.items():
        picked = chosen.setdefault(bucket, [])
        picked += [*members] * math.floor(repeats)
        first, end = (_extra_before(repeats, len(members), e) for e in (epoch, epoch + 1))
        if end > first:
            ring = _permuted(members, seed, "extra", str(bucket), repr(repeats))
            picked += [ring[k % len(ring)] for k in range(first, end)]
    return {bucket: _permuted(picked, seed, "order", str(bucket), epoch) for bucket, picked in chosen.items() if picked}


def _extra_before(repeats: float, members: int, epoch: int) -> int:
    """How many clips a group's fraction of ``repeats`` has brought in all epochs before ``epoch`` together."""
    return math.floor(epoch * (repeats - math.floor(repeats)) * members + 1e-9)


def _permuted(members: Sequence[int], seed: int, *path: int | str) -> list[int]:
    return list(map(members.__getitem__, permutation(len(members), seed, *path)))


@dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, so that the epoch cache is cheap
class StepPlan:
    """The order of a whole run: which micro-batches make up each optimizer step.

    Args:
        items: the training clips.
        seed: the run's seed.
        batch_size: clips per micro-batch; the last micro-batch of a bucket in an epoch may be smaller.
        micro_batches: ``accumulation x processes``.
    """

    items: tuple[Item, ...]
    seed: int
    batch_size: int
    micro_batches: int

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("the training set is empty")

    @cached_property
    def groups(self) -> Groups:
        """Its clips by bucket and repeats."""
        return groups_of(self.items)

    @cached_property
    def _sizes(self) -> list[list[tuple[float, int]]]:
        """Per bucket, (repeats, clips) of each group."""
        sizes: dict[Bucket, list[tuple[float, int]]] = {}
        for (bucket, repeats), members in self.groups.items():
            sizes.setdefault(bucket, []).append((repeats, len(members)))
        return list(sizes.values())

    @cached_property
    def _starts(self) -> list[int]:
        """Micro-batches before each epoch, as far as they have been asked for; fractional repeats make them unequal."""
        return [0]

    def start_of(self, epoch: int) -> int:
        """Micro-batches before ``epoch``, in all epochs before it together."""
        while len(self._starts) <= epoch:
            e = len(self._starts) - 1
            count = sum(math.ceil(self._clips(sizes, e) / self.batch_size) for sizes in self._sizes)
            self._starts.append(self._starts[-1] + count)
        return self._starts[epoch]

    @staticmethod
    def _clips(sizes: Sequence[tuple[float, int]], epoch: int) -> int:
        """Clips of one bucket in one epoch."""
        return sum(
            members * math.floor(repeats)
            + _extra_before(repeats, members, epoch + 1)
            - _extra_before(repeats, members, epoch)
            for repeats, members in sizes
        )

    def samples_before(self, epoch: int) -> int:
        """Clips of all epochs before ``epoch`` together, repeats counted."""
        groups = [group for sizes in self._sizes for group in sizes]
        return sum(epoch * n * math.floor(repeats) + _extra_before(repeats, n, epoch) for repeats, n in groups)

    def samples_until(self, step: int) -> int:
        """Clips of all optimizer steps before ``step`` together."""
        end = step * self.micro_batches
        epoch = self.epoch_of(end)
        return self.samples_before(epoch) + sum(len(self._nth(n)) for n in range(self.start_of(epoch), end))

    @property
    def samples_per_epoch(self) -> float:
        """Clips in one epoch, repeats counted; a mean where repeats are fractional."""
        return sum(repeats * members for sizes in self._sizes for repeats, members in sizes)

    @property
    def per_epoch(self) -> float:
        """Micro-batches in one epoch; the mean of the first hundred where fractional repeats make them unequal."""
        if all(float(repeats).is_integer() for sizes in self._sizes for repeats, _ in sizes):
            return self.start_of(1)
        return self.start_of(100) / 100

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in one epoch; a step may begin in one epoch and end in the next."""
        return self.per_epoch / self.micro_batches

    def steps_for_epochs(self, epochs: float) -> int:
        """The fewest steps that cover ``epochs`` passes."""
        whole = math.floor(epochs)
        first, end = self.start_of(whole), self.start_of(whole + 1)
        wanted = first + (epochs - whole) * (end - first)
        return max(1, math.ceil(wanted / self.micro_batches - 1e-9))

    def step(self, step: int) -> tuple[MicroBatch, ...]:
        """All micro-batches of one optimizer step, of all processes, in slot order."""
        batches = [self._nth(step * self.micro_batches + j) for j in range(self.micro_batches)]
        starts = range(0, len(batches) * self.batch_size, self.batch_size)
        return tuple(
            MicroBatch(items, tuple(range(start, start + len(items))))
            for start, items in zip(starts, batches, strict=True)
        )

    def epoch_of(self, n: int) -> int:
        """The epoch that the ``n``-th micro-batch of the run belongs to."""
        while self._starts[-1] <= n:
            self.start_of(len(self._starts))
        return bisect_right(self._starts, n) - 1

    def _nth(self, n: int) -> tuple[int, ...]:
        epoch = self.epoch_of(n)
        return _epoch(self, epoch).batch(n - self._starts[epoch])

    def for_rank(self, step: int, rank: int, processes: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of one step that fall to one process, in the order it runs them."""
        return self.step(step)[rank::processes]


class _Epoch(NamedTuple):
    """The micro-batches of one epoch, each cut out when it is asked for: a million tuples would take a second."""

    members: list[list[int]]
    """Clips by bucket, in their order."""
    starts: list[int]
    """Micro-batches before each bucket's."""
    order: list[int]
    """Of the micro-batches of all buckets."""
    size: int
    """Clips of a micro-batch."""

    def batch(self, n: int) -> tuple[int, ...]:
        number = self.order[n]
        bucket = bisect_right(self.starts, number) - 1
        first = (number - self.starts[bucket]) * self.size
        return tuple(self.members[bucket][first : first + self.size])


@lru_cache(maxsize=4)
def _epoch(plan: StepPlan, epoch: int) -> _Epoch:
    members = list(epoch_items(plan.groups, plan.seed, epoch).values())
    *starts, count = accumulate((math.ceil(len(clips) / plan.batch_size) for clips in members), initial=0)
    return _Epoch(members, starts, permutation(count, plan.seed, "batches", epoch), plan.batch_size)


# ---------------------------------------------------------------------------------------------------- learning rate


class _Warmup(Strict):
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps over which the learning rate rises linearly from (nearly) zero."""


class Constant(_Warmup):
    """The optimizer's learning rate throughout."""

    kind: Literal["constant"] = "constant"

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the base learning rate after warm-up."""
        return 1.0


class Linear(_Warmup):
    """A straight line down to ``final`` at the last step."""

    kind: Literal["linear"] = "linear"
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the optimizer's."""

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the base learning rate after warm-up."""
        return 1 - (1 - self.final) * _progress(step, self.warmup_steps, total_steps)


class Cosine(_Warmup):
    """Half a cosine down to ``final`` at the last step."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the optimizer's."""

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the base learning rate after warm-up."""
        wave = (1 + math.cos(math.pi * _progress(step, self.warmup_steps, total_steps))) / 2
        return self.final + (1 - self.final) * wave


class Exponential(_Warmup):
    """Up from ``first`` to the optimizer's learning rate at the last step, by the same factor each step: what
    ``finetune lr-find`` trains with.
    """

    kind: Literal["exponential"] = "exponential"
    first: float = Field(1e-4, ge=1e-12, le=1)
    """Learning rate at the first step, as a fraction of the optimizer's."""

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the base learning rate after warm-up."""
        return float(self.first ** (1 - _progress(step, self.warmup_steps, total_steps)))


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    last = total_steps - 1
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, last - warmup_steps)))


LRSchedule = Constant | Linear | Cosine | Exponential

LRScheduleConfig = Annotated[LRSchedule, Field(discriminator="kind")]


def lr_at(step: int, base_lr: float, schedule: LRSchedule, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    During warm-up step s trains at (s + 1) / (warmup_steps + 1) of the base rate: no step trains at zero.
    """
    if step < schedule.warmup_steps:
        return base_lr * (step + 1) / (schedule.warmup_steps + 1)
    return base_lr * schedule.factor(step, total_steps)


def is_due(step: int, every: int | None, *, last: int | None = None) -> bool:
    """Whether something done ``every`` so many completed steps falls on ``step``; always at ``last``; None is never."""
    if every is None:
        return False
    return step == last or (step > 0 and step % every == 0)
