"""Which frames an image-to-video model is given: drawn, cached, laid out, trained with, and sampled from."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from decoding import decode, probe
from PIL import Image
from worlds import assert_same_run, fabricate_cache, run_config, stop_after

from finetune.caching.encode import clip_bytes, image_noise
from finetune.caching.precompute import ensure_cache, precompute
from finetune.cogvideox.config import AnyFrames, DropoutConfig, ModelConfig, ObjectiveConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import condition_latents, encode_image
from finetune.cogvideox.load import load_transformer, load_vae
from finetune.cogvideox.objective import NoiseSample, sample_noise
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.types import Bucket, SamplePrompt
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker
from finetune.datasets.entries import read_metadata
from finetune.datasets.geometry import plan_clips
from finetune.datasets.schedule import MicroBatch
from finetune.inference.adapters import TrainingRecord, frame_notes
from finetune.inference.generate import generate
from finetune.inference.request import GenerateRequest, VideoPrompt, read_prompts, write_prompts
from finetune.trainers.loop import train

MODELS = ["5b-i2v", "1.5-5b-i2v"]
ONE = MicroBatch(items=(0,), slots=(0,))


def never(**shares: float) -> dict[str, object]:
    """``any`` with these shares and no other."""
    return {"kind": "any", **dict.fromkeys(("first", "first_last", "last", "random"), 0), **shares}


def drawn(choice: object, step: int, frames: int = 13) -> NoiseSample:
    options = {"latent_shape": (1, frames, 1, 1), "padded_frames": frames, "image_draws": 4, "num_train_timesteps": 9}
    return sample_noise(5, step, 0, dropout=DropoutConfig(condition_frames=choice), **options)


def test_each_choice_comes_as_often_as_its_share_and_moves_no_other():
    count = 3000
    choice = AnyFrames(first=3, first_last=2, last=1, random=4, most=3)
    draws = [drawn(choice, step) for step in range(count)]
    given = [one.given_frames for one in draws]
    assert given == [drawn(choice, step).given_frames for step in range(count)]
    # What random draws of the other choices' frames is 1 frame of 13 twice in 39 samples, and 2 of 13 once in 234.
    shares = {(0,): 0.3 + 0.4 / 39, (12,): 0.1 + 0.4 / 39, (0, 12): 0.2 + 0.4 / 234}
    for frames, share in shares.items():
        assert abs(given.count(frames) - share * count) < 5 * (count * share * (1 - share)) ** 0.5, frames
    sizes = Counter(len(frames) for frames in given if frames not in shares)
    assert set(sizes) == {1, 2, 3} and min(sizes.values()) > 0.25 * sum(sizes.values())
    assert set().union(*given) == set(range(13)) and all(list(frames) == sorted(set(frames)) for frames in given)
    usual = drawn("first", 7)
    assert usual.given_frames == (0,) and drawn("first_last", 7).given_frames == (0, 12)
    assert drawn("first_last", 7, frames=1).given_frames == (0,)
    assert (usual.timestep, usual.image_draw) == (draws[7].timestep, draws[7].image_draw)
    assert torch.equal(usual.noise, draws[7].noise)


@pytest.fixture
def batches(tiny_model, tmp_path):
    def make(variant: str, choice: object, **dropout: float) -> BatchMaker:
        data = {"condition_frames": choice, "caption_dropout": 0, "image_dropout": 0, **dropout}
        output = tmp_path / variant / str(len(list(tmp_path.rglob("cache")))) / "run"
        config = run_config(tiny_model(variant), tmp_path / "none", output, data=data, cache={"mode": "require"})
        fabricate_cache(config, clips=1)
        spec, cache = read_spec(config.model.pretrained), Cache(config.cache.dir)
        manifest = ensure_cache(config, spec, progress=False)
        empty = cache.read_prompt(manifest.empty_prompt_key)
        return BatchMaker(spec, cache, manifest.items, empty, config.data, 5, ObjectiveConfig())

    return make


@pytest.mark.parametrize("variant", MODELS)
def test_each_given_frame_stands_at_its_place_and_zeros_elsewhere(batches, variant):
    made = batches(variant, never(random=1))
    entry, spec = made.cache.read(made.items[0]), made.spec
    frames = entry.latents_mean.shape[1]
    padding = spec.front_padding(frames)
    assert entry.frame_latents.shape[2] == frames - 1 and padding == (1 if variant == "1.5-5b-i2v" else 0)
    seen = set()
    for step in range(12):
        batch = made.training(step, ONE)
        shape = tuple(entry.latents_mean.shape)
        choice = sample_noise(
            5, step, 0, latent_shape=shape, padded_frames=frames + padding, image_draws=2, dropout=made.dropout,
            num_train_timesteps=spec.num_train_timesteps,
        )  # fmt: skip
        seen |= set(choice.given_frames)
        images = torch.cat([entry.image_latents, entry.frame_latents], dim=2)[choice.image_draw].float()
        expected = torch.zeros_like(batch.latents)
        for frame in choice.given_frames:
            expected[0, :, padding + frame if frame else 0] = condition_latents(spec, images[None])[0, :, frame]
        assert torch.equal(batch.image_latents, expected)
    assert seen == set(range(frames))
    dropped = replace(made, dropout=made.dropout.model_copy(update={"image_dropout": 1.0}))
    assert not dropped.training(0, ONE).image_latents.any() and dropped.fixed(0, [3]).image_latents.any()
    assert torch.equal(made.fixed(0, [3, 4]).image_latents[1:], made.fixed(0, [4]).image_latents)


def test_the_first_frame_alone_is_what_it_was_to_the_bit(tiny_model, batches):
    plain, never_others = batches("1.5-5b-i2v", "first"), batches("1.5-5b-i2v", never(first=1))
    usual = plain.training(3, ONE)
    assert usual.image_latents.shape[2] == 1 and plain.items == never_others.items
    assert torch.equal(usual.image_latents, never_others.training(3, ONE).image_latents)
    # Where others may be given, the condition is longer, and of zeros: the model sees the same.
    among = batches("1.5-5b-i2v", never(first=1, last=1e-6)).training(3, ONE)
    assert among.image_latents.shape[2] == 4 and not among.image_latents[:, :, 1:].any()
    transformer = load_transformer(ModelConfig(pretrained=str(tiny_model("1.5-5b-i2v"))))
    short, long = (
        denoise(transformer, plain.spec, usual.noise, usual.prompt_embeds, usual.timesteps, condition)
        for condition in (usual.image_latents, torch.cat([usual.image_latents, among.image_latents[:, :, 1:]], dim=2))
    )
    assert torch.equal(short, long)


# ---------------------------------------------------------------------------------------------------------- the cache


def test_further_frames_are_encoded_as_single_images_beside_what_there_was(tiny_model, demo_clips, tmp_path):
    model = tiny_model("5b-i2v")
    spec = read_spec(str(model))
    clips = tmp_path / "clips"
    clips.mkdir()
    source = sorted(demo_clips.glob("*.mp4"))[0]
    shutil.copy(source, clips / "a.mp4")
    (clips / "a.txt").write_text("a ring")

    def entry_of(choice: object):
        config = run_config(model, clips, tmp_path / "run", data={"condition_frames": choice, "holdout": 0})
        (item,), cache = precompute(config, progress=False).manifest.items, Cache(config.cache.dir)
        kind = {"first": None, "first_last": "last"}.get(str(choice), "all")
        tensors = clip_bytes(spec, item.bucket, "fp16", draws=2, condition_frames=kind)
        assert tensors < cache.sizes("latents")[item.latents_key] < tensors + 3000
        with cache.path("latents", item.latents_key).open("rb") as file:
            address = json.loads(read_metadata(file, item.latents_key)["address"])
        assert address.get("condition_frames") == kind and ("condition_frames" in address) == (kind is not None)
        return cache.read(item), address

    (first, _), (last, address), (every, _) = (entry_of(choice) for choice in ("first", "first_last", never(random=1)))
    assert first.frame_latents is None
    for name in ("latents_mean", "latents_std", "image_latents"):
        assert torch.equal(getattr(first, name), getattr(last, name)) and torch.equal(
            getattr(first, name), getattr(every, name)
        )
    assert last.frame_latents.shape == (2, 4, 1, 8, 8) and every.frame_latents.shape == (2, 4, 2, 8, 8)
    assert torch.equal(last.frame_latents[:, :, -1], every.frame_latents[:, :, -1])
    vae = load_vae(ModelConfig(pretrained=str(model)))
    header = probe(source)
    pixels = decode(source, header, plan_clips(header, run_config(model, clips, tmp_path).data, 8, "")[0]).pixels
    for frame, ours in ((1, every.frame_latents[:, :, [0]]), (2, last.frame_latents)):
        theirs = encode_image(vae, pixels[:, 4 * frame], 2, image_noise(address, 2, frame)).half()
        assert torch.equal(ours, theirs)
    draws = last.frame_latents
    assert not torch.equal(draws[0], draws[1])


def test_a_run_with_any_frames_resumes_to_the_bit_and_is_another_run(tiny_model, demo_clips, tmp_path):
    def config(name: str, choice: object = "any", **changes: object) -> RunConfig:
        data = {"condition_frames": choice, "buckets": ["9x32x32"], "holdout": 1}
        return run_config(tiny_model("1.5-5b-i2v"), demo_clips, tmp_path / name, data=data, **changes)

    picture(1, Bucket(9, 32, 32)).save(tmp_path / "a.png")
    first = {"prompt": "a ring", "image": str(tmp_path / "a.png")}
    samples = [first, first | {"last_image": str(tmp_path / "a.png")}]
    sampled = {"samples": samples, "sample_every": 4, "num_inference_steps": 1, "guidance_scale": 1}
    whole = train(config("whole", validation={"every": 2, "clips": 1, "timesteps": 1, **sampled}))
    plain, both = (path.read_bytes() for path in sorted((whole.run_dir / "samples" / "step-00000004").glob("*.mp4")))
    assert plain != both
    part = config("part", checkpoint={"every": 2}, validation={"every": 2, "clips": 1, "timesteps": 1})
    stop_after(2, part)
    assert_same_run(train(part), whole)
    with pytest.raises(AssertionError, match="tensors of trainable differ"):
        assert_same_run(train(config("other", "first_last")), whole)


# --------------------------------------------------------------------------------------------------------- sampling


def picture(seed: int, bucket: Bucket) -> Image.Image:
    shape = bucket.height, bucket.width, 3
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


@pytest.mark.parametrize(("variant", "frames"), [("5b-i2v", (0, 8)), ("1.5-5b-i2v", (8,)), ("1.5-5b-i2v", (0, 4, 8))])
def test_given_frames_are_what_the_stock_pipeline_makes_of_a_condition_set_by_hand(
    tiny_model, tmp_path, monkeypatch, variant, frames
):
    inputs, stock_forward = [], diffusers.CogVideoXTransformer3DModel.forward

    def forward(self: object, hidden_states: torch.Tensor, *arguments: object, **options: object) -> object:
        inputs.append(hidden_states.clone())  # [2, F, noise and condition, H, W]
        return stock_forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "forward", forward)
    folder = tiny_model(variant)
    spec = read_spec(str(folder))
    bucket = spec.training_bucket if spec.use_learned_positions else Bucket(9, 32, 48)
    pictures = {frame: picture(frame, bucket) for frame in frames}
    for frame, image in pictures.items():
        image.save(tmp_path / f"{frame}.png")
    stock = diffusers.CogVideoXImageToVideoPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    prepare = stock.prepare_latents

    def by_hand(*arguments: object, **options: object):
        """The pipeline's own noise and condition; then the latents of each other image where it belongs."""
        noise, condition = prepare(*arguments, **options)
        if 0 not in pictures:
            condition[:, 0] = 0
        for frame, image in pictures.items():
            if frame:
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
                latents = stock.vae.encode(pixels).latent_dist.sample(arguments[8])
                scale = spec.scaling_factor
                latents = latents * (1 / scale if stock.vae.config.invert_scale_latents else scale)
                condition[:, condition.shape[1] - 3 + frame // 4] = latents[:, :, 0]
        return noise, condition

    stock.prepare_latents = by_hand
    theirs = stock(
        image=pictures[min(frames)],
        prompt="a ring",
        height=bucket.height,
        width=bucket.width,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        max_sequence_length=spec.max_text_seq_length,
    ).frames[0]
    named: dict[str, object] = {"keyframes": {f: tmp_path / f"{f}.png" for f in frames if f not in (0, 8)} or None}
    named |= {name: tmp_path / f"{f}.png" for f, name in ((0, "image"), (8, "last_image")) if f in frames}
    request = GenerateRequest(
        prompts=(VideoPrompt(prompt="a ring", seed=7, **named),),
        out=tmp_path / "out",
        base=str(folder),
        bucket=bucket,
        num_inference_steps=2,
        guidance_scale=2.0,
    )
    report = generate(request)
    assert torch.equal(inputs[0], inputs[2]), "noise and condition of the first of two steps"
    assert np.abs(report.frames[0] - (theirs[-9:] * 255).round()).max() <= 1
    assert any("data.condition_frames" in note for note in report.notes)


def test_frames_that_cannot_be_given_are_refused_and_rows_keep_them(tmp_path):
    keyframes = {frame: Path("b.png") for frame in (0, 6, 12)}
    prompt = VideoPrompt(prompt="a", image=Path("a.png"), keyframes=keyframes)
    assert [*prompt.image_faults(9, 4)] == [
        "frame 0 is given twice, as image and in keyframes",
        "a keyframe at frame 6 is not possible: 0, 4, 8... to 8",
        "a keyframe at frame 12 is not possible: 0, 4, 8... to 8",
    ]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "last_image": "l.png", "keyframes": {"4": "k.png"}}\n')
    (row,) = read_prompts(tmp_path / "rows.jsonl")
    assert row.images_by_frame(9) == {4: tmp_path / "k.png", 8: tmp_path / "l.png"}
    write_prompts(tmp_path / "again.jsonl", [row])
    assert read_prompts(tmp_path / "again.jsonl") == (row,)


def test_weights_that_were_not_trained_for_it_are_remarked_on():
    prompts = [SamplePrompt(prompt="a", image=Path("a.png")), SamplePrompt(prompt="b", last_image=Path("b.png"))]
    assert [*frame_notes([TrainingRecord(condition_frames="any")], prompts)] == []
    assert [*frame_notes([TrainingRecord()], prompts[:1])] == []
    (note,) = frame_notes([TrainingRecord(condition_frames="first")], prompts)
    assert note.startswith("1 of 2 prompts give another frame than the first")
