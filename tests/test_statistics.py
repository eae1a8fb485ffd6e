"""Whether what is called random is: distributions, independence, and that every clip gets its turn.

Seeds are fixed, so a test either always passes or always fails. Bounds are those that a fair generator exceeds once in
about a thousand draws of a seed; every check is fed something unfair as well, and has to say so.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import maker
from worlds import fabricate_cache, run_config

from finetune.cogvideox import objective
from finetune.cogvideox.config import DropoutConfig
from finetune.cogvideox.objective import sample_noise, sample_timestep
from finetune.core import rng
from finetune.core.errors import TrainingError
from finetune.core.rng import seed_for
from finetune.core.types import Bucket
from finetune.datasets import schedule
from finetune.datasets.dataloader import Loader
from finetune.datasets.schedule import Item, MicroBatch, StepPlan
from finetune.trainers.loop import train

Z = 3.3
"""Standard deviations; 1 in 1000, two-sided."""
DRAWS, SLOTS = 64_000, 8
TIMESTEPS, IMAGES = 1000, 4
CAPTION, IMAGE = 0.1, 0.05
CHOICES = ("timestep", "drop_caption", "drop_image", "image_draw", "noise", "posterior_noise")

# ------------------------------------------------------------------------------------------------------ the checks


def chi_square_z(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    """Pearson's chi-square as standard deviations from what chance gives (Wilson and Hilferty's approximation)."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def uniform_faults(values: torch.Tensor, bins: int) -> list[str]:
    counts = torch.bincount(values, minlength=bins).double()
    z = chi_square_z(counts, len(values) / bins)
    faults = [f"chi-square is {z:.1f} standard deviations off"] if abs(z) > Z else []
    # Chi-square over a thousand bins hardly notices one that is empty.
    return faults + ([f"{int((counts == 0).sum())} values never occur"] if bool((counts == 0).any()) else [])


def rate_z(drawn: torch.Tensor, probability: float) -> float:
    """Standard deviations between a share and its probability."""
    return float((drawn.double().mean() - probability) * math.sqrt(len(drawn) / (probability * (1 - probability))))


def correlation_z(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two samples, as standard deviations from none."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1] * math.sqrt(len(a)))


def normal_ks(values: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's distance from N(0, 1), times the root of the count; 1.95 is 1 in 1000."""
    ordered = values.double().sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max() * math.sqrt(len(ordered)))


# ------------------------------------------------------------------------------------------ one sample's random choices


@pytest.fixture(scope="module")
def draws() -> dict[str, torch.Tensor]:
    """What the real ``draw`` gives over many steps and slots of one seed; [DRAWS] each."""
    rows = []
    for number in range(DRAWS):
        one = sample_noise(
            42,
            number // SLOTS,
            number % SLOTS,
            latent_shape=(1, 1, 1, 1),
            padded_frames=1,
            image_draws=IMAGES,
            dropout=DropoutConfig(caption_dropout=CAPTION, image_dropout=IMAGE),
            num_train_timesteps=TIMESTEPS,
        )
        rows.append([float(getattr(one, name)) for name in CHOICES])
    return dict(zip(CHOICES, torch.tensor(rows, dtype=torch.float64).unbind(1), strict=True))


def test_timesteps_are_uniform(draws):
    timesteps = draws["timestep"].long()
    print("chi-square:", chi_square_z(torch.bincount(timesteps, minlength=TIMESTEPS).double(), DRAWS / TIMESTEPS))
    assert uniform_faults(timesteps, TIMESTEPS) == []
    for slot in range(SLOTS):
        assert uniform_faults(timesteps[slot::SLOTS] // 10, TIMESTEPS // 10) == []


def test_uneven_timesteps_are_noticed(draws):
    timesteps = draws["timestep"].long()
    assert "1 values never occur" in uniform_faults(timesteps * 999 // 1000, TIMESTEPS)  # randint(999)
    leaning = (TIMESTEPS * (draws["timestep"] / TIMESTEPS) ** 1.03).long()
    assert "chi-square" in uniform_faults(leaning, TIMESTEPS)[0]


def test_conditions_are_dropped_at_their_rates(draws):
    for name, rate in (("drop_caption", CAPTION), ("drop_image", IMAGE)):
        print(name, float(draws[name].mean()), f"{rate_z(draws[name], rate):+.2f} standard deviations")
        assert abs(rate_z(draws[name], rate)) < Z
        assert abs(rate_z(draws[name], rate * 1.1)) > Z  # a canary
    assert uniform_faults(draws["image_draw"].long(), IMAGES) == []
    assert uniform_faults((draws["image_draw"] * 0.99).long(), IMAGES)


def test_the_choices_about_a_sample_are_independent(draws):
    names = sorted(draws)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert abs(correlation_z(draws[a], draws[b])) < Z, (a, b)
    both = rate_z(draws["drop_caption"] * draws["drop_image"], CAPTION * IMAGE)
    assert abs(both) < Z
    # Canaries: the same stream for two choices, and a choice that leans on the timestep by a hundredth.
    assert abs(correlation_z(draws["drop_caption"], (draws["drop_caption"] + draws["drop_image"]) > 0)) > Z
    assert abs(correlation_z(draws["timestep"], draws["noise"] + draws["timestep"] / 5e3)) > Z


@pytest.mark.parametrize("apart", [1, 2, SLOTS, 2 * SLOTS], ids=["slot", "2 slots", "step", "2 steps"])
def test_neighbours_are_independent(draws, apart):
    for name, values in draws.items():
        assert abs(correlation_z(values[:-apart], values[apart:])) < Z, name
    shared = draws["noise"][:-apart] + 0.02 * draws["noise"][apart:]
    assert abs(correlation_z(shared, draws["noise"][apart:])) > Z  # a canary


def test_seeds_are_independent(draws):
    other = torch.tensor([sample_timestep(43, n // SLOTS, n % SLOTS, TIMESTEPS) for n in range(20_000)])
    ours = draws["timestep"][:20_000]
    assert abs(correlation_z(ours, other)) < Z
    assert 5 < int((ours == other).sum()) < 40  # a thousandth of them by chance
    assert abs(correlation_z(ours, other + ours / 20)) > Z  # a canary


def test_noise_is_standard_normal(draws):
    for name in ("noise", "posterior_noise"):
        print(name, "Kolmogorov-Smirnov", normal_ks(draws[name]))
        assert normal_ks(draws[name]) < 1.95
    # Large tensors are drawn by another, vectorised code of torch than single numbers.
    options = {"latent_shape": (4, 3, 8, 8), "padded_frames": 4, "image_draws": 0, "num_train_timesteps": TIMESTEPS}
    tensors = [sample_noise(42, step, 0, dropout=DropoutConfig(), **options) for step in range(100)]
    noise = torch.stack([one.noise for one in tensors])
    posterior = torch.stack([one.posterior_noise for one in tensors])
    assert normal_ks(noise.flatten()) < 1.95 and normal_ks(posterior.flatten()) < 1.95
    assert abs(correlation_z(noise[:, :, :3].flatten(), posterior.flatten())) < Z
    assert abs(correlation_z(noise[:-1].flatten(), noise[1:].flatten())) < Z
    assert normal_ks(noise.flatten() * 1.02) > 1.95  # a canary


def used_addresses(monkeypatch, make=sample_noise) -> list[tuple]:
    """The address of every stream that 60 steps of 4 samples, their validation and their order open."""
    used: list[tuple] = []
    real = objective.generator

    def noting(seed: int, *path):
        used.append((seed, *path))
        return real(seed, *path)

    monkeypatch.setattr(objective, "generator", noting)
    monkeypatch.setattr(rng, "generator", noting)  # of orders
    options = {"latent_shape": (1, 1, 1, 1), "padded_frames": 1, "image_draws": 2, "num_train_timesteps": TIMESTEPS}
    for seed in (7, 8):
        order = StepPlan(tuple(Item(Bucket(9, 64, 64), 1.5) for _ in range(5)), seed, batch_size=2, micro_batches=2)
        for step in range(60):
            for micro in order.step(step):
                for slot in micro.slots:
                    make(seed, step, slot, dropout=DropoutConfig(), **options)
        for timestep in (100, 900):
            make(seed, 12345, timestep, dropout=DropoutConfig(), purpose="validation", **options)
    return used


def test_no_two_choices_of_a_run_share_a_stream(monkeypatch):
    used = used_addresses(monkeypatch)
    # The subset that a fraction of repeats takes moves on through one fixed order, which every epoch looks up.
    used = [one for one in used if one[1] != "extra"]
    assert len(used) > 2000
    assert [one for one, count in Counter(used).items() if count > 1] == []
    assert len({seed_for(*one) for one in used}) == len(used)


def test_a_shared_stream_is_noticed(monkeypatch):
    def forgetful(seed, step, slot, **options):
        return sample_noise(seed, step, slot // 2, **options)

    assert max(Counter(used_addresses(monkeypatch, forgetful)).values()) > 1


# ------------------------------------------------------------------------------------------------------- the posterior


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
def test_latents_are_samples_of_the_cached_posterior(tiny_model, tmp_path, monkeypatch, variant):
    """Element by element, through ``BatchMaker``: the mean, the deviation and the shape of what is trained on."""
    made, count = maker(tiny_model(variant), tmp_path), 2000
    entry = made.cache.read(made.items[0])
    entry = replace(entry, latents_std=0.1 + torch.rand(entry.latents_std.shape, generator=torch.Generator()))
    monkeypatch.setattr(type(made.cache), "read", lambda cache, item: entry)
    frames = entry.latents_mean.shape[1]
    batches = [made.training(step, MicroBatch((0,) * 4, tuple(range(4)))) for step in range(count // 4)]
    latents = torch.cat([batch.latents[:, :, -frames:] for batch in batches]) / made.spec.scaling_factor
    z = ((latents - entry.latents_mean.float()) / entry.latents_std.float()).double()
    assert posterior_faults(z) == []
    assert posterior_faults(z * 1.02) and posterior_faults(z + 0.01)  # canaries
    # The noise that is trained to be removed is another.
    noise = torch.cat([batch.noise[:, :, -frames:] for batch in batches])
    assert abs(correlation_z(z.flatten(), noise.flatten())) < Z


def posterior_faults(z: torch.Tensor) -> list[str]:
    """What is not as in a sample of N(0, 1) per element; z is [count, ...]."""
    count, faults = len(z), []
    means, variances = z.mean(0) * math.sqrt(count), (z.var(0) - 1) * math.sqrt(count / 2)
    # Of a thousand elements one is beyond 3.3 by chance.
    for name, values in (("mean", means), ("variance", variances)):
        if values.abs().max() > 5 or normal_ks(values.flatten()) > 1.95:
            faults.append(f"{name}: up to {values.abs().max():.1f} standard deviations off")
    return faults


# ------------------------------------------------------------------------------------------------------------ the order

ITEMS = st.lists(
    st.builds(
        Item,
        bucket=st.sampled_from([Bucket(9, 64, 64), Bucket(9, 32, 64), Bucket(17, 64, 64)]),
        repeats=st.sampled_from([1.0, 2.0, 3.0, 0.5, 0.25, 1.5, 2.25]),
    ),
    min_size=1,
    max_size=12,
)
PLANS = {
    "items": ITEMS,
    "seed": st.integers(0, 2**31),
    "batch_size": st.integers(1, 5),
    "accumulation": st.integers(1, 3),
    "processes": st.integers(1, 4),
}


def order_faults(items: list[Item], seed: int, batch_size: int, accumulation: int, processes: int) -> list[str]:
    """What is wrong with the first epochs of a plan, as its processes see it."""
    plan = StepPlan(tuple(items), seed, batch_size, accumulation * processes)
    epochs = 4  # after which every fraction above comes out even
    faults, trained = [], Counter()
    due = plan.start_of(epochs)
    for step in range(math.ceil(due / plan.micro_batches)):
        parts = [plan.for_rank(step, rank, processes) for rank in range(processes)]
        if sorted(len(part) for part in parts) != [accumulation] * processes:
            faults.append(f"step {step}: processes make {[len(part) for part in parts]} micro-batches")
        # Process r runs every n-th: put together they are the step, each micro-batch once.
        united = [parts[n % processes][n // processes] for n in range(plan.micro_batches)]
        if united != list(plan.step(step)):
            faults.append(f"step {step}: the processes' parts are not the step")
        slots = [slot for micro in united for slot in micro.slots]
        if len(set(slots)) != len(slots):
            faults.append(f"step {step}: two samples share a slot")
        for n, micro in enumerate(united, start=step * plan.micro_batches):
            if len({items[index].bucket for index in micro.items}) != 1:
                faults.append(f"step {step}: a micro-batch mixes buckets")
            if n < due:
                trained.update((plan.epoch_of(n), index) for index in micro.items)
    for index, item in enumerate(items):
        times = [trained[epoch, index] for epoch in range(epochs)]
        if not all(math.floor(item.repeats) <= count <= math.ceil(item.repeats) for count in times):
            faults.append(f"clip {index} of {item.repeats} repeats was trained on {times} times")
    for group in {(item.bucket, item.repeats) for item in items}:
        members = [index for index, item in enumerate(items) if (item.bucket, item.repeats) == group]
        totals = [sum(trained[epoch, index] for epoch in range(epochs)) for index in members]
        if totals != [epochs * group[1]] * len(members):
            faults.append(f"clips of {group[1]} repeats were trained on {totals} times in {epochs} epochs")
    if sum(trained.values()) != plan.samples_before(epochs):
        faults.append("the plan's own count is another")
    return faults


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**PLANS)
def test_every_clip_is_trained_on_as_often_as_its_repeats_say(items, seed, batch_size, accumulation, processes):
    assert order_faults(items, seed, batch_size, accumulation, processes) == []


def in_place_of_another(patch: pytest.MonkeyPatch) -> None:
    """The first clip of a bucket stands where its last one should."""
    real = schedule.epoch_items

    def items(*arguments: object) -> dict:
        return {bucket: [*order[:-1], order[0]] for bucket, order in real(*arguments).items()}

    patch.setattr(schedule, "epoch_items", items)


def drop_last(patch: pytest.MonkeyPatch) -> None:
    """An epoch's smaller last micro-batch is left out, as loaders commonly do."""
    patch.setattr(schedule, "math", SimpleNamespace(**{**vars(math), "ceil": math.floor}))


@pytest.mark.parametrize("damage", [in_place_of_another, drop_last])
def test_a_lost_or_doubled_clip_is_noticed(monkeypatch, damage):
    damage(monkeypatch)
    assert order_faults([Item(Bucket(9, 64, 64), 1.0)] * 7, 3, 2, 1, 1)


def test_processes_that_take_the_same_clips_are_noticed(monkeypatch):
    monkeypatch.setattr(StepPlan, "for_rank", lambda plan, step, rank, processes: plan.step(step)[::processes])
    assert order_faults([Item(Bucket(9, 64, 64), 1.0)] * 7, 3, 2, 1, 2)


def test_every_order_is_as_likely():
    """Where the first clip stands in each of 3000 epochs, and which one comes after it."""
    places, successors = torch.tensor(positions(range(3000))).unbind(1)
    assert uniform_faults(places, 6) == []
    assert uniform_faults(successors[successors > 0] - 1, 5) == []
    assert uniform_faults(torch.tensor(positions([0] * 3000))[:, 0], 6)  # a canary: the same order every epoch


def positions(epochs) -> list[tuple[int, int]]:
    items, found = schedule.groups_of([Item(Bucket(9, 64, 64), 1.0)] * 6), []
    for epoch in epochs:
        (order,) = schedule.epoch_items(items, 11, epoch).values()
        place = order.index(0)
        found.append((place, order[place + 1] if place + 1 < len(order) else 0))
    return found


# ------------------------------------------------------------------------------------ that a run trains on what it says


def training(tiny_model, tmp_path):
    changes = {"cache": {"mode": "require"}, "train": {"steps": 3, "batch_size": 2, "accumulation": 2}}
    config = run_config(tiny_model(), tmp_path / "none", tmp_path / "run", **changes)
    fabricate_cache(config, clips=5)
    return config


@pytest.mark.parametrize("damage", ["loses one", "takes one twice"])
def test_a_loader_that_does_not_follow_the_plan_stops_the_run(tiny_model, tmp_path, monkeypatch, damage):
    real = Loader.step

    def damaged(loader, step):
        batches = list(real(loader, step))
        return iter(batches[:-1] if damage == "loses one" else [batches[0]] * len(batches))

    monkeypatch.setattr(Loader, "step", damaged)
    with pytest.raises(TrainingError, match=r"step 0: .* of the plan"):
        train(training(tiny_model, tmp_path))


def test_a_run_logs_its_epochs(tiny_model, tmp_path, monkeypatch):
    from finetune.trainers.tracking import Tracker

    logged: list[tuple[int, dict]] = []
    monkeypatch.setattr(Tracker, "log", lambda tracker, step, metrics: logged.append((step, dict(metrics))))
    train(training(tiny_model, tmp_path))
    epochs = [(step, row["train/epoch"], row["train/samples_in_epoch"]) for step, row in logged if "train/epoch" in row]
    assert epochs == [(2, 1, 5), (3, 2, 5)]
