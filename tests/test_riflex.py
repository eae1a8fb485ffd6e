"""RIFLEx: one frequency of the positions in time is lowered, everywhere they are used, and videos may be longer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_export import LORA, make_run

import finetune
from finetune.cli.app import USER_ERROR
from finetune.cli.main import main
from finetune.cogvideox.denoise import rotary_table
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.riflex import riflex_fault
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against
from finetune.core.errors import CheckpointError
from finetune.core.types import Bucket
from finetune.memory.qk_norm import rotate
from finetune.trainers.loop import train
from tests.worlds import assert_same_run, differing, stop_after, tensors

CPU = torch.device("cpu")
PROMPT = "a red circle moving left"


def spec_of(variant: str, riflex: int | None = None):
    return replace(read_spec(str(known_model(variant))), riflex=riflex)


def table(variant: str, frames: int, riflex: int | None):
    """Cosines and sines, [positions, 6 tokens, 64] each, of a video of 32x48 pixels."""
    spec = spec_of(variant, riflex)
    tables = rotary_table(spec, spec.padded_latent_frames(frames), 4, 6, device=CPU)
    return torch.stack(tables).unflatten(1, (-1, 6))


@pytest.mark.parametrize(("variant", "frames"), [("5b", 97), ("5b", 49), ("1.5-5b", 321), ("1.5-5b-i2v", 81)])
def test_the_second_frequency_in_time_is_the_paper_s_and_nothing_else_moves(variant, frames):
    """Theirs is the line that the authors' code adds: ``freqs[k - 1] = 0.9 * 2 * pi / L_test``, with k = 2."""
    longest = 97 if variant == "5b" else 321
    positions = {97: 25, 321: 41}[longest]
    stock, ours = table(variant, frames, None), table(variant, frames, longest)
    freqs = 1.0 / 10_000 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    freqs[2 - 1] = 0.9 * 2 * torch.pi / positions
    angles = torch.outer(torch.arange(ours.shape[1]), freqs).repeat_interleave(2, dim=1)
    theirs = torch.stack([angles.cos(), angles.sin()])[:, :, None].expand(-1, -1, 6, -1)
    torch.testing.assert_close(ours[..., :16].double(), theirs, rtol=0, atol=2e-5)  # stock angles are float32
    moved = (ours != stock).any(dim=0)
    assert moved[1:, :, 2:4].all() and not moved[..., :2].any() and not moved[..., 4:].any()


def test_a_frame_no_longer_looks_like_the_one_a_period_later():
    """The similarity of a query and a key that differ in their frame alone, in what the lowered component has of it."""
    head = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def similarity(riflex: int | None) -> torch.Tensor:
        cos, sin = table("5b", 97, riflex)[:, :, 0]  # one token of each of 25 latent frames
        heads = rotate(head.expand(1, 25, 1, 64), (cos, sin))[0, :, 0, 2:4]
        return torch.cosine_similarity(heads, heads[:1], dim=-1)

    before, after = similarity(None), similarity(97)
    assert before[20] > 0.99 > before[5]  # the period is 19.9 latent frames, so that the video begins again
    assert after[20] < 0 and after[10:].max() < 0.7


@pytest.mark.parametrize(
    ("variant", "frames", "words"),
    [
        ("5b", 97, None),
        ("5b", 73, None),
        ("5b", 65, "give 73 frames or more"),
        ("5b", 225, "give at most 217 frames"),
        ("1.5-5b", 321, None),
        ("1.5-5b", 81, "give 137 frames or more"),
        ("2b", 97, "this model has sine positions"),
        ("5b-i2v", 97, "learned ones, for 49 frames alone"),
    ],
)
def test_what_riflex_cannot_do_is_said_with_what_it_can(variant, frames, words):
    fault = riflex_fault(spec_of(variant, frames))
    assert fault is None if words is None else fault is not None and words in " ".join(fault)


def test_buckets_may_be_as_long_as_it_says(tiny_run):
    bucket = Bucket(97, 480, 720)
    assert "at most 49" in spec_of("5b").check_bucket(bucket)[0]
    assert not spec_of("5b", 97).check_bucket(bucket) and spec_of("5b", 97).check_bucket(Bucket(105, 480, 720))
    assert not spec_of("1.5-5b", 321).advise_bucket(Bucket(321, 480, 720))
    for changes, path, fix in (
        ({"data": {"buckets": ["97x480x720"]}}, "data.buckets.0", "set model.riflex: 97"),
        ({"model": {"riflex": 49}}, "model.riflex", "give 73 frames or more"),
    ):
        config = tiny_run(**changes)
        (error,) = check_against(config, spec_of("5b", config.model.riflex)).errors
        assert error.where == config.where(path) and fix in error.fix


def test_a_run_trains_with_it_and_goes_on_with_nothing_else(train_tiny, tiny_run):
    lowered = {"model": {"riflex": 25}, "train": {"steps": 4}}
    usual, whole = train_tiny("usual"), train_tiny("whole", **lowered)
    assert differing(tensors(usual), tensors(whole))
    config = tiny_run("halves", **lowered)
    stop_after(2, config)
    assert_same_run(train(config), whole)
    with pytest.raises(CheckpointError, match=r"model\.riflex: 25 -> not set"):
        train(tiny_run("halves", train={"steps": 6}))


def test_an_adapter_is_sampled_with_the_positions_that_it_was_trained_with(tiny_model, tmp_path, monkeypatch):
    """Theirs is the code of its model card: the stock pipeline, in the hands of whoever reads the card."""
    monkeypatch.chdir(tmp_path)
    changes = {"model": {"riflex": 25}, "data": {"buckets": ["25x64x64"]}}
    run = make_run(tmp_path, tiny_model("5b"), LORA, validation={"num_inference_steps": 2}, **changes)
    exported = finetune.export(run.relative_to(tmp_path))
    card = (exported.folder / "README.md").read_text()
    assert "| RIFLEx | temporal positions for 25 frames" in card
    theirs: dict[str, list] = {}
    exec(card.split("```python\n")[1].split("```")[0], theirs)

    def sampled(adapter, **options):
        return finetune.generate("a video", "videos", adapters=adapter, num_inference_steps=2, **options)

    ours = sampled(exported.folder)
    assert ours.bucket == Bucket(25, 64, 64)
    difference = np.subtract(ours.frames[0], np.stack([np.asarray(frame) for frame in theirs["video"]]), dtype=int)
    assert np.abs(difference).max() <= 1  # the card turns in float32
    assert ours.notes[0].endswith("was trained with riflex 25, and is sampled so")
    assert np.array_equal(sampled(run).frames[0], ours.frames[0])
    whole = finetune.export(run, layout="merged", full_pipeline=True)
    assert "riflex 25, and is sampled so" in sampled(None, model=whole.folder).notes[0]
    short = sampled(exported.folder, bucket="9x64x64", riflex=0)
    assert "was trained with riflex 25, and is sampled with none" in short.notes[0]
    assert not np.array_equal(short.frames[0], sampled(exported.folder, bucket="9x64x64").frames[0])


@pytest.mark.parametrize(
    ("variant", "words", "message"),
    [
        ("5b", ["--bucket", "25x64x64"], "give --riflex 25 for longer videos"),
        ("5b", ["--bucket", "33x64x64", "--riflex", "25"], "at most 25"),
        ("2b", ["--bucket", "9x64x64", "--riflex", "25"], "sine positions"),
    ],
)
def test_lengths_are_refused_before_anything_is_loaded(tiny_model, tmp_path, capsys, variant, words, message):
    base = ["generate", "--model", str(tiny_model(variant)), "--prompt", PROMPT, "--output", str(tmp_path / "out")]
    assert main([*base, *words]) == USER_ERROR
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
