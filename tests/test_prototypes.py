"""What benchmarks try on the demo world (``prototypes/``, ``faults.py``): the arithmetic, and that they run."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from finetune.cogvideox.objective import add_noise, v_mse, velocity
from finetune.inference.inversion import Angles
from finetune.testing import demo

ROOT = Path(__file__).parents[1]


@pytest.fixture
def prototype(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks", "benchmarks/prototypes"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module


@pytest.mark.arithmetic
def test_a_pair_counts_by_how_much_more_the_preferred_clip_gained(prototype):
    loss = prototype("dpo").dpo_loss
    base = torch.tensor([[0.3, 0.2], [0.1, 0.4]])
    # The preferred errors fall by 0.01 and the rejected ones rise by 0.02: -log sigmoid(100 * 0.03).
    learnt = base + torch.tensor([[-0.01], [0.02]])
    assert loss(learnt, base, 100.0).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-4)
    assert loss(base + 0.05, base, 100.0).item() == pytest.approx(math.log(2))  # what both lose does not count


@pytest.mark.arithmetic
def test_a_jump_with_the_true_velocity_lands_on_the_clip_diffused_less(prototype):
    x0, eps = torch.randn(2, 3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    phi, psi = torch.tensor([1.5, 0.9, 0.4]).double(), torch.tensor([0.8, 0.9, 0.0]).double()
    noisy, target = (form(x0, eps, phi.cos().square()) for form in (add_noise, velocity))
    landed = prototype("few_step").jump(noisy, target, phi - psi)
    torch.testing.assert_close(landed, add_noise(x0, eps, psi.cos().square()))


@pytest.mark.arithmetic
def test_the_loss_of_older_trainers_is_velocitys_and_in_bfloat16_the_lowest_noise_levels_teach_nothing(prototype):
    x0, eps = torch.randn(2, 4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=1.0, rescale_betas_zero_snr=True)

    def loss(latents, timesteps):
        return prototype("faults").x0_loss(lambda noisy, _: 0.5 * noisy, scheduler, latents, eps, timesteps).item()

    timesteps = torch.tensor([50, 300, 700, 999])
    level = scheduler.alphas_cumprod[timesteps]
    theirs = v_mse(0.5 * add_noise(x0, eps, level), velocity(x0, eps, level)).mean().item()
    assert loss(x0, timesteps) == pytest.approx(theirs, rel=1e-4)
    lowest = torch.tensor([0, 1, 0, 1])
    assert loss(x0, lowest) > 0.1
    assert loss(x0.bfloat16(), lowest) == 0


def test_a_stretch_ends_where_the_next_one_begins(prototype):
    levels = Angles(timesteps=(999, 749, 499, 249), phi=(1.57, 1.2, 0.8, 0.4, 0.0))
    ends = prototype("few_step").ends
    assert ends(levels, 2).tolist() == pytest.approx([0.8, 0.8, 0.0, 0.0])
    assert ends(levels, 1).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("dpo", "--steps 1 --pool 4 --strength 500", 3),
        ("few_step", "--steps 4 --passes 1 --pool 2", 9),
    ],
)
def test_a_prototype_runs_and_keeps_its_rows(prototype, monkeypatch, tmp_path, name, arguments, rows):
    module, results = prototype(name), tmp_path / "rows.json"
    monkeypatch.setattr(module, "KNOWN", module.KNOWN[:2])
    module.main([*arguments.split(), "--seeds", "0", "--batch", "2", "--output", str(results)])
    measured = json.loads(results.read_text())["rows"]
    assert len(measured) == rows
    assert all(0 <= (row.get("known") or row)["distance"] <= 1 for row in measured)


def test_faults_are_measured_beside_the_base(prototype, monkeypatch, tmp_path):
    module, results = prototype("faults"), tmp_path / "rows.json"
    small = {"UNSEEN": module.UNSEEN[:2], "ASKED": module.ASKED[:2], "SAMPLING_STEPS": 2, "STRENGTHS": (1.0, 2.0)}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "lesson", lambda variations: demo.lesson(variations)[::12])
    faults = ["bf16 noising", "2B's scale"]
    arguments = ["--lrs", "1e-2", "--steps", "1", "--batch", "2", "--variations", "1", "--output"]
    module.main(["--faults", *faults, *arguments, str(results)])
    rows = {row["name"]: row for row in json.loads(results.read_text())["rows"]}
    assert len(rows) == 2 + 2 * len(faults)
    for fault in faults:
        own, doubled = (rows[f"{fault} lr 0.01 strength {strength} seed 0"] for strength in (1, 2))
        assert own["chroma"] > 0 and own["loss"] != doubled["loss"] != rows["base"]["loss"]
    # A trainer at another scale shows it before its first step: the base is bad at such latents.
    assert own["base_loss_at_its_scale"] > 1.2 * rows["base"]["loss"]
