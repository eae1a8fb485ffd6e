"""Sampling: equal to the stock pipeline, without traces on the modules, and every mistake named before loading."""

from __future__ import annotations

import gc
import itertools
import json
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import export
from finetune.cogvideox.encode import encode_prompts
from finetune.cogvideox.load import (
    ModelConfig,
    build_pipeline,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
    pipeline_class,
)
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ConfigError, FinetuneError
from finetune.core.files import LORA_FILE
from finetune.core.types import Bucket
from finetune.inference import generate, loading, plan
from finetune.inference import sample as sampling
from finetune.inference.adapters import TRAINING_RECORD, TrainingRecord, base_faults, transformer_root
from finetune.inference.continuation import join, match_colours
from finetune.inference.modes import FromImage, FromImages, FromText, read_clip
from finetune.inference.request import (
    AdapterArgument,
    GenerateRequest,
    VideoPrompt,
    parse_adapter,
    prompts_with_seeds,
    read_prompts,
)
from finetune.inference.sample import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.videos import write_mp4
from finetune.methods.adapter import read_adapter
from finetune.methods.lora import LoraMethod
from finetune.testing.tiny import build_tiny
from finetune.trainers import validation
from tests.broken_disk import disk

SMALL = Bucket(9, 32, 48)
PROMPT = "a red circle moving left"


def bucket_of(spec) -> Bucket:
    return spec.training_bucket if spec.use_learned_positions else SMALL


def loaded(folder: Path) -> tuple[SampleModules, Callable[..., SampleRequest]]:
    """A model's modules, and ``request(seed)`` for one video of ``PROMPT``."""
    model, spec = ModelConfig(pretrained=str(folder)), read_spec(str(folder))
    empty, prompt = encode_prompts(*load_text(model), ["", PROMPT], spec)
    bucket, mode = bucket_of(spec), FromText()
    if spec.image_to_video:
        shape, generator = (3, bucket.height, bucket.width), torch.Generator().manual_seed(3)
        mode = FromImage(torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8))

    def request(seed: int = 7, **changes) -> SampleRequest:
        return replace(SampleRequest(prompt, empty, seed, bucket, mode), **changes)

    return SampleModules(spec, load_transformer(model), load_scheduler(model), load_vae(model)), request


def sample(modules: SampleModules, *requests: SampleRequest, steps: int = 1, guidance: float = 1.0) -> list[np.ndarray]:
    return sample_videos(modules, requests, SampleSettings(steps, guidance))


def save_adapter(folder, base, *, scale: float = 0.5, seed: int = 0, **options):
    """A LoRA with random weights, saved by diffusers for the base model at ``base``."""
    method = LoraMethod(rank=2, alpha=4, **options)
    transformer = load_transformer(ModelConfig(pretrained=str(base)))
    method.apply(transformer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.trainable(transformer).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    pipeline_class(read_spec(str(base))).save_lora_weights(
        folder,
        transformer_lora_layers=method.peft_state(transformer),
        transformer_lora_adapter_metadata=method.lora_metadata(transformer),
    )
    return folder


# ------------------------------------------------------------------------------------------------------------- sampling


def picture(bucket: Bucket, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (bucket.height, bucket.width, 3), dtype=np.uint8)


CASES = [
    *((variant, "text", kind) for variant in ("2b", "5b", "1.5-5b") for kind in ("ddim", "dpm")),
    *((variant, "image", kind) for variant in ("5b-i2v", "1.5-5b-i2v") for kind in ("ddim", "dpm")),
    *((variant, "video", None) for variant in ("2b", "5b", "1.5-5b")),
    ("5b", "video", "ddim"),
]


@pytest.mark.parametrize(("variant", "mode", "kind"), CASES)
def test_videos_are_those_of_the_stock_pipeline_bit_for_bit(tiny_model, tmp_path, variant, mode, kind):
    """Ours is the whole command; theirs is diffusers' own pipeline, loaded and called by hand."""
    folder = tiny_model(variant)
    spec = read_spec(str(folder))
    bucket, steps = bucket_of(spec), 4
    image, frames = picture(bucket, 3), np.stack([picture(bucket, seed) for seed in range(bucket.frames)])
    Image.fromarray(image).save(tmp_path / "first.png")
    prompt = {"image": {"image": tmp_path / "first.png"}, "video": {"video": tmp_path / "v.mp4"}}.get(mode, {})
    kinds = {"text": "CogVideoXPipeline", "image": "CogVideoXImageToVideoPipeline"}
    stock = getattr(diffusers, kinds.get(mode, "CogVideoXVideoToVideoPipeline")).from_pretrained(folder)
    if kind:
        scheduler = getattr(diffusers, f"CogVideoX{kind.upper()}Scheduler")
        stock.scheduler = scheduler.from_config(stock.scheduler.config)
    arguments = {"num_frames": bucket.frames, "image": Image.fromarray(image)}
    if mode == "text":
        del arguments["image"]
    if mode == "video":
        write_mp4(tmp_path / "v.mp4", frames, spec.native_fps)
        stored = list(read_clip(tmp_path / "v.mp4", bucket, spec.native_fps))
        if spec.patch_size_t is not None:  # the pipeline itself refuses an odd number of latent frames
            stored = [stored[0]] * 4 + stored
        arguments = {"video": [Image.fromarray(frame) for frame in stored], "strength": 0.5}
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt=PROMPT,
        negative_prompt="a blue square",
        height=bucket.height,
        width=bucket.width,
        num_inference_steps=steps,
        guidance_scale=3.0,
        use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        max_sequence_length=spec.max_text_seq_length,
        **arguments,
    ).frames[0]
    changes = {"num_inference_steps": steps, "guidance_scale": 3.0, "dynamic_cfg": True, "scheduler": kind}
    changes |= {"prompts": (VideoPrompt(prompt=PROMPT, seed=7, **prompt),), "strength": 0.5, "bucket": bucket}
    ours = frames_of(request_for(folder, tmp_path / "out", negative_prompt="a blue square", **changes))
    assert ours.dtype == np.uint8 and ours.shape == (bucket.frames, bucket.height, bucket.width, 3)
    assert np.array_equal(ours, (theirs[-bucket.frames :] * 255).round().astype(np.uint8))
    assert ours.std() > 1


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b-i2v"])
def test_a_last_frame_fills_the_last_latent_frame_of_the_condition_and_nothing_else(tiny_model, variant, monkeypatch):
    modules, request = loaded(tiny_model(variant))
    first = request().mode.image
    conditions, theirs = [], diffusers.CogVideoXTransformer3DModel.forward

    def forward(self, hidden_states, *args, **kwargs):
        conditions.append(hidden_states[0].clone())  # [F, noise and condition, H, W]
        return theirs(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "forward", forward)
    plain, both = sample(
        modules, request(), request(mode=FromImages({0: first, request().bucket.frames - 1: first.flip(-1)}))
    )
    channels = modules.spec.latent_channels
    without, with_last = conditions
    assert torch.equal(without[:, :channels], with_last[:, :channels])  # the noise
    assert torch.equal(without[:-1], with_last[:-1]) and without[-1, channels:].abs().max() == 0
    # The last frame is scaled as the first is: the first image in its place has latents of the same size.
    scale = with_last[-1, channels:].std() / without[0, channels:].std()
    assert 0.5 < scale < 2 and not np.array_equal(plain, both)


@pytest.mark.parametrize(("variant", "overlap"), [("5b-i2v", 1), ("5b", 5), ("1.5-5b", 5)])
def test_a_continued_video_has_the_first_part_and_shares_frames_with_the_next(tiny_model, tmp_path, variant, overlap):
    spec = read_spec(str(tiny_model(variant)))
    bucket, image = bucket_of(spec), {}
    if spec.image_to_video:
        Image.fromarray(picture(bucket, 3)).save(tmp_path / "first.png")
        image = {"image": tmp_path / "first.png"}
    changes = {"bucket": bucket, "prompts": (VideoPrompt(prompt=PROMPT, seed=5, **image),), "num_inference_steps": 2}
    plain, longer, again = (
        frames_of(request_for(tiny_model(variant), tmp_path / f"{number}", extend=extend, **changes))
        for number, extend in enumerate((0, 2, 2))
    )
    assert len(longer) == bucket.frames + 2 * (bucket.frames - overlap)
    shared = 0 if overlap == 1 else overlap
    assert np.array_equal(longer[: bucket.frames - shared], plain[: bucket.frames - shared])
    assert np.array_equal(longer, again)


def test_colours_are_brought_back_to_those_of_the_part_before():
    video = np.stack([picture(SMALL, seed) // 2 + 40 for seed in range(6)])
    drifted = (video * np.array([0.8, 1.0, 1.2]) + np.array([10, 0, -20])).round().clip(0, 255).astype(np.uint8)
    corrected = match_colours(drifted, drifted[:1], video[:1])
    assert np.abs(corrected.astype(int) - video).max() <= 2 < np.abs(drifted.astype(int) - video).max()
    flat = np.full((2, 8, 8, 3), 90, np.uint8)  # no contrast to go by: the level alone
    assert np.array_equal(match_colours(flat, flat, flat + 20), flat + 20)
    faded = join(np.zeros((4, 2, 2, 3), np.uint8), np.full((4, 2, 2, 3), 90, np.uint8), 2)
    assert faded[:, 0, 0, 0].tolist() == [0, 0, 30, 60, 90, 90]


def test_sampling_leaves_the_modules_and_the_random_state_as_they_were(tiny_model):
    modules, request = loaded(tiny_model("5b"))
    transformer, scheduler, vae = modules.transformer, modules.scheduler, modules.vae
    LoraMethod(rank=2, alpha=4, dropout=0.5).apply(transformer, seed=0)
    transformer.train()
    scheduler.set_timesteps(10)

    def everything():
        members = [*transformer.named_modules(), *vae.named_modules()]
        hooks = [name for name, m in members if m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook")]
        own = sorted(set(vars(transformer)) | set(vars(vae)))
        flags = [(name, member.training) for name, member in members]
        forms = [(name, p.dtype, p.device, p.requires_grad) for name, p in transformer.named_parameters()]
        return hooks, own, flags, forms, scheduler.timesteps.tolist(), torch.get_rng_state().tolist()

    weights = {name: p.clone() for name, p in transformer.named_parameters()}
    before = everything()
    (first,) = sample(modules, request())
    torch.rand(3)
    state = torch.get_rng_state()
    (second,) = sample(modules, request())
    assert np.array_equal(first, second)  # also: LoRA dropout is off, and nothing depends on the global state
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(torch.tensor(before[-1], dtype=torch.uint8))
    assert everything() == before
    assert all(torch.equal(p, weights[name]) for name, p in transformer.named_parameters())
    # Canary: what diffusers leaves when nobody cleans up.
    stock = build_pipeline(modules.spec, transformer=transformer, scheduler=scheduler, vae=vae)
    embeds = {"prompt_embeds": request().prompt_embeds[None], "output_type": "latent"}
    stock(**embeds, num_frames=9, height=32, width=32, num_inference_steps=1, guidance_scale=1)
    assert set(vars(transformer)) - set(before[1]) == {"_diffusers_hook"}


def test_a_video_depends_on_its_seed_and_not_on_its_neighbours(tiny_model, caplog):
    modules, request = loaded(tiny_model("5b"))
    together = sample(modules, request(1), request(2), guidance=2.0)
    (alone,) = sample(modules, request(2), guidance=2.0)
    assert np.array_equal(together[1], alone)
    assert not np.array_equal(together[0], together[1])
    (frames,) = sample(modules, request(1, prompt_embeds=request().prompt_embeds * float("nan")))
    assert frames.max() == 0
    assert "seed 1 holds values that are not numbers" in caplog.text


def test_large_videos_are_decoded_in_tiles_and_the_vae_is_left_as_it_was(tiny_model, monkeypatch):
    modules, request = loaded(tiny_model("5b"))
    tiled = []
    decode = modules.vae.decode
    monkeypatch.setattr(
        modules.vae,
        "decode",
        lambda *args, **options: (tiled.append(modules.vae.use_tiling), decode(*args, **options))[1],
    )
    for limit in (sampling.DECODE_WHOLE_BELOW, 1_000_000):
        monkeypatch.setattr(sampling, "DECODE_WHOLE_BELOW", limit)
        sample(modules, request())
    assert tiled == [False, True] and not modules.vae.use_tiling
    monkeypatch.undo()
    # The published size, the demo's, and one that depends on the dtype.
    cases = [((49, 480, 720), torch.bfloat16, True), ((9, 64, 64), torch.bfloat16, False)]
    cases += [((9, 256, 256), torch.float32, True), ((9, 256, 256), torch.bfloat16, False)]
    for sizes, dtype, tiles in cases:
        assert sampling.decodes_in_tiles(Bucket(*sizes), dtype) == tiles


def test_images_and_dtypes_must_fit_the_model(tiny_model):
    modules, request = loaded(tiny_model("5b"))
    with pytest.raises(ValueError, match="text-to-video, but an image is given"):
        sample(modules, request(mode=FromImage(torch.zeros(3, 32, 48, dtype=torch.uint8))))
    with pytest.raises(ValueError, match=r"VAE is torch.bfloat16"):
        sample(replace(modules, vae=modules.vae.bfloat16()))


# ---------------------------------------------------------------------------------------------------------- the command


def request_for(folder, out, **changes) -> GenerateRequest:
    defaults = {
        "base": str(folder),
        "prompts": (VideoPrompt(prompt=PROMPT, seed=5),),
        "out": out,
        "bucket": SMALL,
        "num_inference_steps": 1,
        "guidance_scale": 2.0,
    }
    return GenerateRequest(**{**defaults, **changes})


@pytest.fixture
def rates(monkeypatch):
    """The frame rates that ``generate`` writes files with."""
    written, theirs = [], generate.write_mp4

    def write_mp4(path, frames, fps, metadata):
        written.append(fps)
        return theirs(path, frames, fps, metadata)

    monkeypatch.setattr(generate, "write_mp4", write_mp4)
    return written


_numbers = itertools.count()


def frames_of(request) -> np.ndarray:
    """What a request samples, in a folder of its own: a finished video would be kept."""
    (frames,) = generate.generate(replace(request, out=request.out / f"{next(_numbers)}")).frames
    return frames


def test_generate_writes_a_video_per_prompt_and_a_sheet(tiny_model, tmp_path, rates):
    prompts = prompts_with_seeds([PROMPT, "a Blue/square..  moving"], [], seeds=range(5, 9))
    report = generate.generate(request_for(tiny_model("5b"), tmp_path / "out", prompts=prompts))
    assert [path.name for path in report.videos] == [
        "000-a-red-circle-moving-left-seed5.mp4",
        "001-a-blue-square-moving-seed6.mp4",
    ]
    assert all(path.stat().st_size > 0 for path in report.videos)
    assert Image.open(report.sheet).size[0] > 0 and str(report.sheet) in str(report)
    assert rates == [8, 8]


@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_an_export_at_strength_1_samples_what_validation_sampled(
    train_tiny, tiny_model, tmp_path, variant, monkeypatch
):
    """Bit for bit on a CPU, from another process's point of view: through files, T5 and the stock loader."""
    bucket, image = Bucket(9, 64, 64), {}
    if "i2v" in variant:
        Image.fromarray(picture(bucket, 3)).save(tmp_path / "first.png")
        image = {"image": str(tmp_path / "first.png")}
    sampled, theirs = [], validation.write_mp4
    monkeypatch.setattr(validation, "write_mp4", lambda path, *args: (sampled.append(args[0]), theirs(path, *args)))
    report = train_tiny(
        variant=variant,
        train={"steps": 3},
        optimizer={"lr": 1e-2},
        validation={
            "samples": [{"prompt": "a red circle", "seed": 4, **image}],
            "sample_every": 3,
            "num_inference_steps": 2,
            "guidance_scale": 2.0,
        },
    )
    adapters = (AdapterArgument(export(report.run_dir).folder),)
    prompts = (VideoPrompt(prompt="a red circle", seed=4, image=image.get("image")),)
    changes = {"prompts": prompts, "bucket": bucket, "num_inference_steps": 2}
    request = request_for(tiny_model(variant), tmp_path / "out", **changes)
    assert np.array_equal(frames_of(replace(request, adapters=adapters)), sampled[-1])
    assert not np.array_equal(frames_of(request), sampled[-1])


def test_adapters_act_by_their_strength(tiny_model, tmp_path):
    base = tiny_model("5b")
    one, two = save_adapter(tmp_path / "one", base), save_adapter(tmp_path / "two", base, seed=1, use_rslora=True)

    def frames(*adapters):
        return frames_of(request_for(base, tmp_path / "out", adapters=adapters))

    plain = frames()
    assert np.array_equal(frames(AdapterArgument(one, 0.0)), plain)
    full, half = frames(AdapterArgument(one)), frames(AdapterArgument(one / LORA_FILE, 0.5))
    both = frames(AdapterArgument(one), AdapterArgument(two, -0.5))
    different = [plain, full, half, both]
    assert all(not np.array_equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_a_row_has_its_own_adapters_seed_and_size(tiny_model, tmp_path):
    """What each row of one batch gives is what a request of its own gives, whatever was loaded before."""
    base = tiny_model("5b")
    save_adapter(tmp_path / "one", base), save_adapter(tmp_path / "two", base, seed=1)
    rows = [
        {"seed": 1, "adapter": "one"},
        {"seed": 1, "adapter": ["two:0.5", "one:-1"]},
        {"seed": 1, "adapter": []},
        {"seed": 4, "adapter": "one:0.25", "bucket": "9x48x32"},
        {"seed": 1},
    ]
    lines = [json.dumps({"prompt": PROMPT, **row}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    own = (AdapterArgument(tmp_path / "two"),)
    prompts = read_prompts(tmp_path / "rows.jsonl")
    together = generate.generate(request_for(base, tmp_path / "out", prompts=prompts, adapters=own)).frames
    for index, prompt in enumerate(prompts):
        adapters = own if prompt.adapters is None else prompt.adapters
        alone = VideoPrompt(prompt=PROMPT, seed=prompt.seed)
        request = request_for(base, tmp_path / f"{index}", prompts=(alone,), adapters=adapters)
        assert np.array_equal(frames_of(replace(request, bucket=prompt.bucket or SMALL)), together[index])
    assert together[3].shape == (9, 48, 32, 3)
    assert len({frames.tobytes() for frames in together}) == 5


def test_several_videos_of_a_prompt_are_all_saved_each_with_its_seed(tiny_model, tmp_path):
    prompts = prompts_with_seeds(["a", "b"], seeds=range(5, 99, 2))
    report = generate.generate(request_for(tiny_model("5b"), tmp_path, prompts=prompts, videos=2, gif=True))
    assert [path.name for path in report.videos] == [f"00{i}-{'aabb'[i]}-seed{5 + i}.mp4" for i in range(4)]
    assert all(Image.open(path.with_suffix(".gif")).n_frames == 9 for path in report.videos)
    assert len({frames.tobytes() for frames in report.frames}) == 4


def test_size_and_fps_come_from_the_adapters_training_record(tiny_model, tmp_path, rates):
    base = tiny_model("1.5-5b")
    adapter = save_adapter(tmp_path / "one", base)
    request = request_for(base, tmp_path / "out", adapters=(AdapterArgument(adapter),), bucket=None)
    assert frames_of(request).shape == (9, 64, 64, 3)
    assert rates[-1] == 16
    (adapter / TRAINING_RECORD).write_text(json.dumps({"buckets": ["5x48x32"], "fps": 12}))
    assert frames_of(request).shape == (5, 48, 32, 3)
    assert rates[-1] == 12


def test_image_to_video_from_a_file_of_another_size(tiny_model, tmp_path):
    picture = tmp_path / "first.png"
    Image.new("RGB", (100, 90), (200, 30, 30)).save(picture)
    prompts = prompts_with_seeds([PROMPT], [picture])
    frames = frames_of(request_for(tiny_model("1.5-5b-i2v"), tmp_path / "out", prompts=prompts))
    assert frames.shape == (9, 32, 48, 3)
    prompts = (VideoPrompt(prompt=PROMPT, image=tmp_path / "other.png"),)
    Image.new("RGB", (100, 90), (30, 30, 200)).save(tmp_path / "other.png")
    other = frames_of(request_for(tiny_model("1.5-5b-i2v"), tmp_path / "out", prompts=prompts))
    assert not np.array_equal(frames, other)


def test_a_full_fine_tuning_replaces_the_transformer(tiny_model, tmp_path):
    base = tiny_model("5b")
    tuned = load_transformer(ModelConfig(pretrained=str(base)))
    with torch.no_grad():
        tuned.proj_out.bias.add_(1.0)
    tuned.save_pretrained(tmp_path / "tuned" / "transformer")
    plain = frames_of(request_for(base, tmp_path / "out"))
    ours = [
        frames_of(request_for(base, tmp_path / "out", transformer=folder))
        for folder in (tmp_path / "tuned", tmp_path / "tuned" / "transformer")
    ]
    assert np.array_equal(ours[0], ours[1]) and not np.array_equal(ours[0], plain)
    with pytest.raises(ConfigError, match="no fine-tuned transformer"):
        transformer_root(tmp_path)


def test_the_text_encoder_is_gone_before_the_transformer_comes(tiny_model, tmp_path, monkeypatch):
    encoders = []
    load_text_ = loading.load_text

    def spy_text(*args, **options):
        loaded = load_text_(*args, **options)
        encoders.append(weakref.ref(loaded[1]))
        return loaded

    def spy_transformer(*args, **options):
        gc.collect()
        assert [encoder() for encoder in encoders] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_text", spy_text)
    monkeypatch.setattr(loading, "load_transformer", spy_transformer)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(request_for(tiny_model("5b"), tmp_path))


# --------------------------------------------------------------------------------------------------------- bad requests


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a weight is loaded."""
    for module, name in ((loading, "load_text"), (loading, "load_transformer"), (generate, "load_vae")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("a weight was loaded"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "there is no prompt"),
        ({"bucket": Bucket(10, 32, 48)}, "10 frames are not possible"),
        ({"adapters": (AdapterArgument(Path("nowhere")),)}, "no such file or folder"),
        ({"adapters": (AdapterArgument(Path(), float("nan")),)}, "strength nan is not a number"),
        ({"num_inference_steps": 0}, "0 denoising steps"),
        ({"guidance_scale": 0.5}, "guidance scale 0.5"),
        ({"fps": -1.0}, "frames per second"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"videos": 0}, "give 1 to "),
        ({"extend": -1}, "give 0 to "),
        ({"prompts": (VideoPrompt(prompt="a", bucket="8x32x48"),)}, "8 frames are not possible"),
        ({"prompts": (VideoPrompt(prompt="a", last_image=Path("x.png")),)}, "takes no image"),
        ({"prompts": (VideoPrompt(prompt="a", video=Path("none.mp4")),)}, "none.mp4"),
        ({"prompts": (VideoPrompt(prompt="a", adapters=(AdapterArgument(Path("no")),)),)}, "no such file or folder"),
        ({"prompts": prompts_with_seeds(["a"], [Path("x.png")])}, "takes no image"),
        ({"device": "cuda:99"}, "device cannot be used"),
        ({"device": "cpu", "offload": "model"}, "no GPU to offload from"),
        ({"device": "cpu", "budget": 2**33}, "no GPU to offload from"),
        ({"device": "cpu", "quantize": "nf4"}, "needs a GPU of NVIDIA's"),
        ({"device": "cpu", "transformer": Path("none.gguf")}, "the file cannot be read"),
        ({"parallel": "context"}, "there is one process"),
    ],
)
def test_bad_requests_are_refused_before_any_loading(tiny_model, tmp_path, no_weights, changes, message):
    with pytest.raises(ConfigError) as caught:
        generate.generate(request_for(tiny_model("5b"), tmp_path / "out", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("5b-i2v", {"bucket": Bucket(9, 64, 48)}, "its learned positions fix it to 9x64x64"),
        ("1.5-5b", {"bucket": Bucket(9, 80, 32)}, "height 80 is not possible: it must be a multiple of 16, at most 64"),
        ("5b", {"bucket": Bucket(17, 32, 48)}, "at most 9"),
        ("5b-i2v", {"video": True}, "only text-to-video models make video-to-video"),
        ("5b", {"video": True, "bucket": Bucket(9, 32, 48)}, "the video has 5 frames at 8 fps, and 9x32x48 needs 9"),
        ("5b", {"video": True, "strength": 0.1}, "strength 0.1 of 4 steps is none"),
    ],
)
def test_what_a_model_cannot_make_is_refused_by_name(tiny_model, tmp_path, no_weights, variant, changes, message):
    """Portrait and other sizes as far as the positions go; videos that are too short."""
    clip = write_mp4(tmp_path / "clip.mp4", np.stack([picture(SMALL, seed) for seed in range(5)]), 8)
    prompt = VideoPrompt(prompt=PROMPT, video=clip if changes.pop("video", False) else None)
    request = request_for(tiny_model(variant), tmp_path / "out", prompts=(prompt,), num_inference_steps=4, **changes)
    with pytest.raises(FinetuneError, match=re.escape(message)):
        generate.generate(request)


def test_all_mistakes_are_told_at_once(tiny_model, tmp_path, no_weights):
    request = request_for(
        tiny_model("1.5-5b-i2v"),
        tmp_path / "out",
        prompts=(VideoPrompt(prompt="a"), VideoPrompt(prompt="b", image=tmp_path / "x.png")),
        guidance_scale=0.0,
        bucket=Bucket(9, 33, 48),
    )
    with pytest.raises(ConfigError) as caught:
        generate.generate(request)
    for message in ("4 things", "needs a first frame", "no such image", "height 33", "guidance scale 0.0"):
        assert message in str(caught.value)


def test_a_file_that_diffusers_would_silently_ignore_is_refused(tiny_model, tmp_path, no_weights):
    from safetensors.torch import save_file

    save_file({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 64)}, tmp_path / "bare.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    for name, message in (("bare", "holds no LoRA for a diffusers transformer"), ("broken", "cannot be read")):
        adapter = AdapterArgument(tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=message):
            generate.generate(request_for(tiny_model("5b"), tmp_path / "out", adapters=(adapter,)))


def test_a_video_is_not_made_in_place_of_its_source(tiny_model, tmp_path, no_weights):
    clip = write_mp4(tmp_path / "000-a-seed0.mp4", np.stack([picture(SMALL, seed) for seed in range(9)]), 8)
    prompts = (VideoPrompt(prompt="a", video=clip, strength=1),)
    with pytest.raises(ConfigError, match="would take the place of what it is made from"):
        generate.generate(request_for(tiny_model("5b"), tmp_path, prompts=prompts))


@pytest.mark.parametrize("change", [{"attention_head_dim": 32}, {"num_layers": 3}], ids=["wider", "deeper"])
def test_an_adapter_of_another_base_is_refused(tiny_model, tmp_path, no_weights, change):
    other = build_tiny(tmp_path / "other", "5b", **change)
    adapter = AdapterArgument(save_adapter(tmp_path / "adapter", other))
    with pytest.raises(ConfigError, match="does not fit the base model"):
        generate.generate(request_for(tiny_model("5b"), tmp_path / "out", adapters=(adapter,)))


class ArrivedError(Exception):
    """Nothing was wrong with the request: the first weights are asked for."""


def outcome(monkeypatch, request) -> str:
    """What ``generate`` refuses a request with before any weight is loaded; empty if it does not."""

    def load_text(*_, **__):
        raise ArrivedError

    monkeypatch.setattr(loading, "load_text", load_text)
    try:
        generate.generate(request)
    except ArrivedError:
        return ""
    except ConfigError as error:
        return str(error)
    raise AssertionError("it sampled")


@pytest.mark.parametrize(
    ("variant", "record", "said"),
    [
        ("5b-i2v", {"image_to_video": False, "base_model": "org/it"}, "a text-to-video model, org/it, and"),
        ("5b", {"image_to_video": True}, "an image-to-video model, and"),
        ("5b", {"base_model": "THUDM/CogVideoX-5b-I2V"}, "an image-to-video model, zai-org/CogVideoX-5b-I2V, and"),
        ("5b", {"base_model": "zai-org/CogVideoX1.5-5B"}, "another model, zai-org/CogVideoX1.5-5B, not on"),
        ("5b", {"base_facts": {"patch_size_t": 2}}, "patch_size_t is 2 there, None here"),
        ("5b", {}, ""),
        ("5b", {"base_model": "5b", "image_to_video": False}, ""),  # a folder's name, not the published model's
        ("5b", {"base_model": "somebody/elses", "image_to_video": False, "trigger": 3, "base_facts": "x"}, ""),
    ],
)
def test_a_record_of_another_base_is_refused_by_name(tiny_model, tmp_path, monkeypatch, variant, record, said):
    base = tiny_model(variant)
    adapter = save_adapter(tmp_path / "one", base)
    (adapter / TRAINING_RECORD).write_text(json.dumps(record))
    picture = tmp_path / "x.png"
    Image.new("RGB", (48, 32)).save(picture)
    prompts = prompts_with_seeds(["a"], [picture] if "i2v" in variant else [])
    changes = {"adapters": (AdapterArgument(adapter),), "prompts": prompts, "bucket": bucket_of(read_spec(str(base)))}
    told = outcome(monkeypatch, request_for(base, tmp_path / "out", **changes))
    assert said in told and (str(base) in told) == bool(said)


@pytest.mark.parametrize(
    ("base", "record", "refused"),
    [
        ("somebody/tuned-5b", {"base_model": "zai-org/CogVideoX-5b"}, True),
        ("THUDM/CogVideoX-5b", {"base_model": "zai-org/CogVideoX-5b"}, False),
        ("5b", {"base_model": "THUDM/CogVideoX-5b"}, False),
        ("somebody/copy-of-5b", {"base_model": "zai-org/CogVideoX-5b", "base_digest": "0" * 32}, False),
        ("/data/models/it", {"base_model": "zai-org/CogVideoX-5b"}, False),
    ],
)
def test_names_on_the_hub_tell_models_apart_where_no_digest_does(base, record, refused):
    faults = list(base_faults(TrainingRecord(**record), "--adapter a", base, read_spec(str(known_model("5b")))))
    assert bool(faults) == refused
    assert all("was trained on zai-org/CogVideoX-5b, not on somebody/tuned-5b" in str(fault) for fault in faults)


def test_a_whole_transformer_of_another_kind_is_refused(tiny_model, tmp_path, monkeypatch):
    load_transformer(ModelConfig(pretrained=str(tiny_model("5b")))).save_pretrained(tmp_path / "tuned" / "transformer")
    (tmp_path / "tuned" / TRAINING_RECORD).write_text(json.dumps({"image_to_video": True}))
    request = request_for(tiny_model("5b"), tmp_path / "out", transformer=tmp_path / "tuned")
    assert "an image-to-video model" in outcome(monkeypatch, request)
    request = request_for(tiny_model("5b"), tmp_path / "out", adapters=(AdapterArgument(tmp_path / "tuned"),))
    assert f"give --transformer {tmp_path / 'tuned'}" in outcome(monkeypatch, request)


def test_a_missing_trigger_word_is_said(tiny_model, tmp_path, monkeypatch, caplog):
    adapter = save_adapter(tmp_path / "one", tiny_model("5b"))
    (adapter / TRAINING_RECORD).write_text(json.dumps({"trigger": "zkx"}))
    for words, lacking in ((["a zkx ring", "a zkxy"], "1 of 2 prompts lack, such as 'a zkxy'"), (["zkx, a ring"], "")):
        caplog.clear()
        prompts = prompts_with_seeds(words, [])
        request = request_for(tiny_model("5b"), tmp_path / "out", adapters=(AdapterArgument(adapter),), prompts=prompts)
        assert outcome(monkeypatch, request) == ""
        assert lacking in caplog.text and bool(lacking) == ("trigger word 'zkx'" in caplog.text)


def test_a_prompt_that_the_model_cannot_read_is_said(tiny_model, tmp_path, monkeypatch, caplog):
    prompts = prompts_with_seeds(["a red circle", "\u4e00\u53ea\u732b red"], [])
    request = request_for(tiny_model("5b"), tmp_path / "out", prompts=prompts)
    assert outcome(monkeypatch, request) == ""
    (said,) = (line for line in caplog.messages if "unknown" in line)
    assert said.startswith("3 characters of the prompt '\u4e00\u53ea\u732b red' are unknown")


def test_the_base_is_the_one_that_the_record_names(tiny_model, tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "one", tiny_model("5b"))
    asked = []

    def pinned(base, revision):
        asked.append((base, revision))
        raise ConfigError("enough")

    monkeypatch.setattr(plan, "pin_revision", pinned)
    request = request_for(None, tmp_path / "out", base=None, adapters=(AdapterArgument(adapter),))
    for record in ({"base_model": "org/it", "revision": "0" * 40}, {"base_model": str(tiny_model("5b"))}):
        (adapter / TRAINING_RECORD).write_text(json.dumps(record))
        assert outcome(monkeypatch, request) == "enough"
    assert asked == [("org/it", "0" * 40), (str(tiny_model("5b")), None)]
    (adapter / TRAINING_RECORD).write_text(json.dumps({"base_model": "model"}))
    assert "the record names 'model', a folder of the machine that trained it" in outcome(monkeypatch, request)
    (adapter / TRAINING_RECORD).unlink()
    assert "there is no base model" in outcome(monkeypatch, request)


LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"base_model.model.{LAYER}.lora_A.weight", "it is in peft's layout"),
        (f"diffusion_model.{LAYER}.lora_A.weight", "it is in ComfyUI's layout"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "it is in kohya's layout"),
        (f"transformer.{LAYER}.lora_down.weight", "it is in kohya's layout"),
        ("transformer.layers.0.attention.query_key_value.matrix_A.0", "it is in SAT's layout"),
        ("lycoris_transformer_blocks_0.lokr_w1", "a LoHa, LoKr"),
    ],
)
def test_other_programs_layouts_are_named_at_once(tiny_model, tmp_path, monkeypatch, name, said):
    from safetensors.torch import save_file

    file = tmp_path / "theirs.safetensors"
    save_file({name: torch.zeros(2, 64)}, file)
    told = outcome(monkeypatch, request_for(tiny_model("5b"), tmp_path / "out", adapters=(AdapterArgument(file),)))
    assert said in told and "fix:" in told
    with pytest.raises(ConfigError, match=said) as caught:
        read_adapter(file)
    assert "alpha" not in caught.value.what
    assert f"finetune convert {file} --out" in caught.value.fix or "LyCORIS" in caught.value.what


def test_a_folder_of_peft_s_own_is_named(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    request = request_for(tiny_model("5b"), tmp_path / "out", adapters=(AdapterArgument(tmp_path),))
    assert "it is in peft's layout" in outcome(monkeypatch, request)
    with pytest.raises(ConfigError, match="it is in peft's layout"):
        read_adapter(tmp_path)


def test_an_output_that_cannot_be_written_is_found_before_sampling(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    told = outcome(monkeypatch, request_for(tiny_model("5b"), tmp_path / "file" / "out"))
    assert "the videos cannot be written" in told
    with disk(fail_at=1):
        assert "No space left" in outcome(monkeypatch, request_for(tiny_model("5b"), tmp_path / "full"))
    assert outcome(monkeypatch, request_for(tiny_model("5b"), tmp_path / "full")) == ""
    assert list((tmp_path / "full").iterdir()) == []


def test_parse_adapter(tmp_path):
    assert parse_adapter("my/lora") == AdapterArgument(Path("my/lora"), 1.0)
    assert parse_adapter("my/lora:-0.5") == AdapterArgument(Path("my/lora"), -0.5)
    odd = tmp_path / "a:0.5"
    odd.mkdir()
    assert parse_adapter(str(odd)) == AdapterArgument(odd)
    with pytest.raises(ConfigError, match="'much' is not a number"):
        parse_adapter("my/lora:much")


def test_read_prompts(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a red ring\n\n  a blue ring \n", encoding="utf-8")
    assert [(p.prompt, p.seed) for p in read_prompts(text, seeds=range(3, 9))] == [
        ("a red ring", 3),
        ("a blue ring", 4),
    ]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a", "image": "x.png"}\n{"prompt": "b", "seed": 9}\n', encoding="utf-8")
    assert read_prompts(rows) == (
        VideoPrompt(prompt="a", image=tmp_path / "x.png", seed=0),
        VideoPrompt(prompt="b", seed=9),
    )


def test_bad_prompt_lines_are_told_together(tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a"}\n{"promt": "b"}\n\n[1]\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_prompts(rows)
    for message in ("3 prompts", ":2", "promt", ":4", "expected an object", ":5"):
        assert message in str(caught.value)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="no prompt in the file"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_images_pair_with_prompts():
    x, y = Path("x"), Path("y")
    assert [p.image for p in prompts_with_seeds(["a", "b"], [x])] == [x, x]
    assert [p.image for p in prompts_with_seeds(["a", "b"], [x, y])] == [x, y]
    assert [p.image for p in prompts_with_seeds(["a", "b"], [])] == [None, None]
    with pytest.raises(ConfigError, match="2 images for 3 prompts"):
        prompts_with_seeds(["a", "b", "c"], [x, y])
    for seeds in (range(-1, 9), range(2**63, 2**62)):
        with pytest.raises(ConfigError, match=f"seed {seeds.start}"):
            prompts_with_seeds(["a"], seeds=seeds)


def test_the_native_size_of_every_published_model_is_legal():
    sizes = {name: read_spec(str(known_model(name))).training_bucket for name in KNOWN_MODELS}
    assert len(sizes) == 5
    for name, size in sizes.items():
        assert read_spec(str(known_model(name))).check_bucket(size) == []
        assert size == (Bucket(81, 768, 1360) if name.startswith("1.5") else Bucket(49, 480, 720))
