"""Inversion: the arithmetic against diffusers' own, the way to noise and back, and edits that look at a video."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMInverseScheduler
from PIL import Image

import finetune
from finetune.cli.main import main
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import ModelConfig, load_transformer
from finetune.cogvideox.objective import add_noise, alpha_bar, velocity
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ConfigError, DataError
from finetune.inference.inversion import (
    Condition,
    Editing,
    angles,
    attention_to_last,
    edit,
    invert,
    predictor,
    step_down,
    step_up,
    step_up_from,
)
from finetune.testing.tiny import VARIANTS, tiny_scheduler, tiny_transformer

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(spec, seed: int = 0) -> Condition:
    image = randn(1, 4, 1, 8, 8, seed=seed + 1) if spec.image_to_video else None
    return Condition(randn(spec.max_text_seq_length, 32, seed=seed), image)


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_a_step_down_is_that_of_the_stock_scheduler(tiny_model, variant, steps):
    levels, scheduler = angles(read_spec(str(tiny_model(variant))), steps), tiny_scheduler(variant)
    theirs = CogVideoXDDIMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == list(levels.timesteps)
    x, v = randn(1, 3, 2, 4, 4), randn(1, 3, 2, 4, 4, seed=1)
    for timestep, turn in levels.steps_down():
        expected = theirs.step(v, timestep, x, return_dict=False)[0]
        torch.testing.assert_close(step_down(x, v, turn), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_a_step_up_is_that_of_diffusers_where_it_knows_the_schedule(tiny_model, steps):
    """5B's ``snr_shift_scale`` is 1; of 2B's, 3, it takes no notice, and so inverts for another schedule."""
    spec, scheduler = read_spec(str(tiny_model("5b"))), tiny_scheduler("5b")
    theirs = DDIMInverseScheduler(**{k: v for k, v in scheduler.config.items() if not k.startswith("_")})
    theirs.set_timesteps(steps)
    x, v = randn(1, 3, 2, 4, 4), randn(1, 3, 2, 4, 4, seed=1)
    upwards = list(reversed(list(angles(spec, steps).steps_down())))
    assert theirs.timesteps.tolist() == [timestep for timestep, _ in upwards] and upwards[-1][0] == 999
    for timestep, turn in upwards:
        expected = theirs.step(v, timestep, x, return_dict=False)[0]
        torch.testing.assert_close(step_up(x, v, turn), expected, rtol=1e-4, atol=2e-5)
    shifted = dict(angles(read_spec(str(tiny_model("2b"))), steps).steps_down())
    assert max(abs(turn - shifted[timestep]) for timestep, turn in upwards) > 0.015


def test_the_schedule_ends_in_pure_noise_and_every_step_can_be_undone(tiny_model):
    levels = angles(read_spec(str(tiny_model("2b"))), 50)
    assert levels.timesteps[0] == 999 and levels.phi[0] == math.pi / 2 and levels.phi[-1] == 0
    assert all(earlier > later for earlier, later in zip(levels.phi, levels.phi[1:], strict=False))
    x, v = randn(1, 2, 2, 2, 2).double(), randn(1, 2, 2, 2, 2, seed=1).double()
    for _, turn in levels.steps_down():
        torch.testing.assert_close(step_up_from(step_down(x, v, turn), v, turn), x)
    with pytest.raises(ValueError, match="2 to 1000"):
        angles(read_spec(str(tiny_model("2b"))), 1)


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.fixture(scope="module")
def overfitted(tiny_model):
    """``overfitted(variant)``: spec, a transformer that has learned one latent, its condition, and that latent."""

    def build(variant: str):
        spec, transformer = read_spec(str(tiny_model(variant))), tiny_transformer(variant)
        clip, known = randn(1, 4, spec.padded_latent_frames(9), 8, 8), condition(spec)
        draws, levels = torch.Generator().manual_seed(0), alpha_bar(spec)
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3, weight_decay=0)
        images = None if known.image_latents is None else known.image_latents.expand(8, -1, -1, -1, -1)
        for _ in range(60):
            timesteps = torch.randint(0, 1000, (8,), generator=draws)
            noise = torch.randn(8, *clip.shape[1:], generator=draws)
            batch, level = clip.expand_as(noise), levels[timesteps].float()
            noisy, wanted = add_noise(batch, noise, level), velocity(batch, noise, level)
            embeds = known.prompt_embeds.expand(8, -1, -1)
            loss = (denoise(transformer, spec, noisy, embeds, timesteps, images) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return spec, transformer.eval().requires_grad_(False), known, clip

    return build


def psnr(result: torch.Tensor, clip: torch.Tensor) -> float:
    return float(10 * torch.log10((clip.max() - clip.min()) ** 2 / (result - clip).square().mean()))


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_a_video_comes_back_from_its_noise(overfitted, variant):
    """Through t = 999, with sine and with rotary positions; each correction brings it nearer."""
    spec, transformer, known, clip = overfitted(variant)
    predict, levels = predictor(transformer, spec, known, CPU), angles(spec, 20)

    def back(noise: torch.Tensor) -> float:
        unguided = Editing(levels, (), known, known, known.prompt_embeds, guidance_scale=1.0, share=0.0)
        return psnr(edit(transformer, spec, noise, unguided), clip)

    trajectories = [invert(predict, clip, levels, corrections=corrections) for corrections in (0, 1, 2)]
    plain, once, twice = (back(trajectory[0]) for trajectory in trajectories)
    fresh = back(randn(*clip.shape, seed=5))
    print(f"{variant}: {fresh:.1f} dB from other noise, {plain:.1f}, {once:.1f}, {twice:.1f} with corrections")
    assert twice > once + 5 > plain + 10 and once > 40 and plain > fresh + 5
    assert len(trajectories[0]) == 20 and all(torch.isfinite(latents).all() for latents in trajectories[1])


# ----------------------------------------------------------------------------------------------------- shared attention


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_look_at_the_last_one_and_it_at_itself(tiny_model, variant):
    spec = read_spec(str(tiny_model(variant)))
    transformer = load_transformer(ModelConfig(pretrained=str(tiny_model(variant)))).requires_grad_(False)
    shape = (1, 4, spec.padded_latent_frames(9), 8, 8)
    own, last, other = (randn(*shape, seed=seed) for seed in range(3))
    known = condition(spec)

    def run(*latents: torch.Tensor) -> torch.Tensor:
        images = None if known.image_latents is None else torch.cat([known.image_latents] * len(latents))
        embeds, timesteps = known.prompt_embeds.expand(len(latents), -1, -1), torch.full((len(latents),), 500)
        return denoise(transformer, spec, torch.cat(latents), embeds, timesteps, images)

    alone = run(own, last)
    processors = [block.attn1.processor for block in transformer.transformer_blocks]
    with attention_to_last(transformer):
        shared, with_other, twins = run(own, last), run(own, other), run(own, own)
    torch.testing.assert_close(shared[1], alone[1], rtol=1e-4, atol=1e-5)  # the last one as without
    # Every key twice changes nothing: what a sample finds at a place is what stands there.
    torch.testing.assert_close(twins[0], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shared[0], alone[0], atol=1e-4) and not torch.allclose(
        shared[0], with_other[0], atol=1e-4
    )
    assert [block.attn1.processor for block in transformer.transformer_blocks] == processors
    assert torch.equal(run(own, last), alone)


def test_guidance_and_sharing_are_as_they_are_said_to_be(tiny_model):
    spec = read_spec(str(tiny_model("5b")))
    transformer = load_transformer(ModelConfig(pretrained=str(tiny_model("5b")))).requires_grad_(False)
    source, target, levels = condition(spec), condition(spec, seed=7), angles(spec, 4)
    clip, negative = randn(1, 4, 3, 8, 8), randn(spec.max_text_seq_length, 32, seed=9)
    trajectory = invert(predictor(transformer, spec, source, CPU), clip, levels)

    def edited(**changes) -> torch.Tensor:
        options = {"guidance_scale": 3.0, "share": 0.0, **changes}
        return edit(transformer, spec, trajectory[0], Editing(levels, trajectory, source, target, negative, **options))

    scheduler = CogVideoXDDIMScheduler.from_config(tiny_scheduler("5b").config)
    scheduler.set_timesteps(4)
    theirs = trajectory[0]
    for timestep in scheduler.timesteps.tolist():
        towards, away = (
            predictor(transformer, spec, each, CPU)(theirs, timestep) for each in (target, Condition(negative))
        )
        theirs = scheduler.step(away + 3 * (towards - away), timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(edited(), theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(edited(share=1.0), theirs, atol=1e-3)
    assert torch.equal(edited(share=0.1), edited()) and not torch.allclose(edited(share=0.5), edited(share=1.0))


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def clip(demo_clips):
    return sorted(demo_clips.glob("*.mp4"))[0]


def test_a_file_is_inverted_and_edited(tiny_model, clip, tmp_path, capsys):
    words = ["invert", str(clip), "--model", str(tiny_model("2b")), "--device", "cpu", "--output", str(tmp_path)]
    assert main([*words, "--steps", "8", "--corrections", "3"]) == 0
    printed = capsys.readouterr().out
    assert "reconstruction against the source" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reconstruction.mp4", "reconstruction.png"]
    assert main([*words, "--steps", "2", "--prompt", "a blue ring", "--seed", "3"]) == 0
    assert (tmp_path / "edit.mp4").is_file() and "edit against the source" in capsys.readouterr().out


def test_a_reconstruction_is_as_good_as_the_vae(tiny_model, clip, tmp_path):
    report = finetune.invert(
        clip, tmp_path, model=tiny_model("1.5-5b"), num_inference_steps=10, corrections=4, device="cpu"
    )
    assert report.frames.shape == (9, 64, 64, 3) and len(report.psnr) == 9
    assert max(abs(ours - alone) for ours, alone in zip(report.psnr, report.psnr_vae, strict=True)) < 0.1


def test_another_first_frame_and_an_adapter_change_the_edit(tiny_model, clip, tmp_path):
    from test_generate import save_adapter

    model = tiny_model("5b-i2v")
    Image.new("RGB", (64, 64), (0, 200, 0)).save(tmp_path / "green.png")
    adapter = save_adapter(tmp_path / "adapter", model)
    options = {"model": model, "prompt": "a ring", "num_inference_steps": 2, "share": 0.5, "device": "cpu"}
    plain = finetune.invert(clip, tmp_path / "a", **options)
    painted = finetune.invert(clip, tmp_path / "b", image=tmp_path / "green.png", **options)
    adapted = finetune.invert(clip, tmp_path / "c", adapters=adapter, **options)
    assert plain.noise_std == painted.noise_std != adapted.noise_std
    assert (plain.frames != painted.frames).any() and (plain.frames != adapted.frames).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 1}, "1 denoising steps"),
        ({"guidance_scale": 0.5}, "guidance scale 0.5"),
        ({"corrections": -1}, "-1 corrections"),
        ({"share": 1.5}, "share 1.5"),
        ({"image": "x.png", "prompt": "a"}, "takes no image"),
        ({"seed": 3}, "no edit without a prompt"),
        ({"bucket": "8x64x64"}, "8 frames are not possible"),
        ({"adapters": "absent"}, "absent"),
        ({"share": -1, "corrections": -1}, "2 things are wrong"),
        ({"device": "abacus"}, "device cannot be used"),
    ],
)
def test_what_cannot_be_done_is_said_before_weights_load(tiny_model, clip, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("finetune.inference.editing.load_text", None)
    with pytest.raises(ConfigError, match=message):
        finetune.invert(clip, tmp_path / "out", model=tiny_model("5b"), **changes)


def test_a_video_that_is_too_short_is_named(tiny_model, clip, tmp_path):
    with pytest.raises(DataError, match="needs 33"):
        finetune.invert(clip, tmp_path / "out", model=tiny_model("1.5-5b"), bucket="33x64x64")
