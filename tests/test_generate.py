"""Sampling: equal to the stock pipeline, without traces on the modules, and every mistake named before loading."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
from finetune.core.errors import ConfigError
from finetune.core.files import LORA_FILE
from finetune.core.types import Bucket, SamplePrompt
from finetune.inference import generate
from finetune.inference.adapters import TRAINING_RECORD, TrainingRecord, base_faults, transformer_root
from finetune.inference.generate import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.request import AdapterArgument, GenerateRequest, parse_adapter, prompts_with_seeds, read_prompts
from finetune.methods.adapter import read_adapter
from finetune.methods.lora import LoraMethod
from finetune.testing.tiny import build_tiny
from tests.broken_disk import disk

SMALL = Bucket(9, 32, 48)
PROMPT = "a red circle moving left"


def bucket_of(spec) -> Bucket:
    return spec.training_bucket if spec.use_learned_positions else SMALL


def loaded(folder: Path) -> tuple[SampleModules, Callable[..., SampleRequest]]:
    """A model's modules, and ``request(seed)`` for one video of ``PROMPT``."""
    model, spec = ModelConfig(pretrained=str(folder)), read_spec(str(folder))
    empty, prompt = encode_prompts(*load_text(model), ["", PROMPT], spec)
    bucket, picture = bucket_of(spec), None
    if spec.image_to_video:
        shape, generator = (3, bucket.height, bucket.width), torch.Generator().manual_seed(3)
        picture = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)

    def request(seed: int = 7, **changes) -> SampleRequest:
        return replace(SampleRequest(prompt, empty, seed, bucket, picture), **changes)

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


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_videos_are_those_of_the_stock_pipeline(tiny_model, variant):
    folder = tiny_model(variant)
    modules, request = loaded(folder)
    spec, wanted = modules.spec, request(seed=7)
    (ours,) = sample(modules, wanted, steps=2, guidance=3.0)
    stock = pipeline_class(spec).from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    image = {} if wanted.image is None else {"image": Image.fromarray(wanted.image.permute(1, 2, 0).numpy())}
    theirs = stock(
        prompt=PROMPT,
        num_frames=wanted.bucket.frames,
        height=wanted.bucket.height,
        width=wanted.bucket.width,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        max_sequence_length=spec.max_text_seq_length,
        **image,
    ).frames[0]
    assert ours.dtype == np.uint8 and ours.shape == (wanted.bucket.frames, wanted.bucket.height, wanted.bucket.width, 3)
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 0.5 + 1e-4
    assert ours.std() > 1


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
    for limit in (generate.DECODE_WHOLE_BELOW, 1_000_000):
        monkeypatch.setattr(generate, "DECODE_WHOLE_BELOW", limit)
        sample(modules, request())
    assert tiled == [False, True] and not modules.vae.use_tiling
    monkeypatch.undo()
    # The published size, the demo's, and one that depends on the dtype.
    cases = [((49, 480, 720), torch.bfloat16, True), ((9, 64, 64), torch.bfloat16, False)]
    cases += [((9, 256, 256), torch.float32, True), ((9, 256, 256), torch.bfloat16, False)]
    for sizes, dtype, tiles in cases:
        assert generate.decodes_in_tiles(Bucket(*sizes), dtype) == tiles


def test_images_and_dtypes_must_fit_the_model(tiny_model):
    modules, request = loaded(tiny_model("5b"))
    with pytest.raises(ValueError, match="text-to-video, but an image is given"):
        sample(modules, request(image=torch.zeros(3, 32, 48, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"VAE is torch.bfloat16"):
        sample(replace(modules, vae=modules.vae.bfloat16()))


# ---------------------------------------------------------------------------------------------------------- the command


def request_for(folder, out, **changes) -> GenerateRequest:
    defaults = {
        "base": str(folder),
        "prompts": (SamplePrompt(prompt=PROMPT, seed=5),),
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

    def write_mp4(path, frames, fps):
        written.append(fps)
        return theirs(path, frames, fps)

    monkeypatch.setattr(generate, "write_mp4", write_mp4)
    return written


def frames_of(request) -> np.ndarray:
    (frames,) = generate.generate(request).frames
    return frames


def test_generate_writes_a_video_per_prompt_and_a_sheet(tiny_model, tmp_path, rates):
    prompts = prompts_with_seeds([PROMPT, "a Blue/square..  moving"], [], seed=5)
    report = generate.generate(request_for(tiny_model("5b"), tmp_path / "out", prompts=prompts))
    assert [path.name for path in report.videos] == [
        "000-a-red-circle-moving-left-seed5.mp4",
        "001-a-blue-square-moving-seed6.mp4",
    ]
    assert all(path.stat().st_size > 0 for path in report.videos)
    assert Image.open(report.sheet).size[0] > 0 and str(report.sheet) in str(report)
    assert rates == [8, 8]


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
    prompts = (SamplePrompt(prompt=PROMPT, image=tmp_path / "other.png"),)
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
    load_text_ = generate.load_text

    def spy_text(*args, **options):
        loaded = load_text_(*args, **options)
        encoders.append(weakref.ref(loaded[1]))
        return loaded

    def spy_transformer(*args, **options):
        gc.collect()
        assert [encoder() for encoder in encoders] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_text", spy_text)
    monkeypatch.setattr(generate, "load_transformer", spy_transformer)
    with pytest.raises(KeyboardInterrupt):
        generate.generate(request_for(tiny_model("5b"), tmp_path))


# --------------------------------------------------------------------------------------------------------- bad requests


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a weight is loaded."""
    for name in ("load_text", "load_transformer", "load_vae"):
        monkeypatch.setattr(generate, name, lambda *a, **k: pytest.fail("a weight was loaded"))


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
        ({"prompts": prompts_with_seeds(["a"], [Path("x.png")])}, "takes no image"),
        ({"device": "cuda:99"}, "device cannot be used"),
        ({"device": "cpu", "offload": True}, "no GPU to offload from"),
    ],
)
def test_bad_requests_are_refused_before_any_loading(tiny_model, tmp_path, no_weights, changes, message):
    with pytest.raises(ConfigError) as caught:
        generate.generate(request_for(tiny_model("5b"), tmp_path / "out", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_mistakes_are_told_at_once(tiny_model, tmp_path, no_weights):
    request = request_for(
        tiny_model("1.5-5b-i2v"),
        tmp_path / "out",
        prompts=(SamplePrompt(prompt="a"), SamplePrompt(prompt="b", image=tmp_path / "x.png")),
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

    monkeypatch.setattr(generate, "load_text", load_text)
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

    monkeypatch.setattr(generate, "pin_revision", pinned)
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
        (
            "transformer.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
            "the layout of diffusers before peft",
        ),
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
    assert "alpha" not in caught.value.what and caught.value.fix


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
    assert [(p.prompt, p.seed) for p in read_prompts(text, seed=3)] == [("a red ring", 3), ("a blue ring", 4)]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a", "image": "x.png"}\n{"prompt": "b", "seed": 9}\n', encoding="utf-8")
    assert read_prompts(rows) == (
        SamplePrompt(prompt="a", image=tmp_path / "x.png", seed=0),
        SamplePrompt(prompt="b", seed=9),
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


def test_the_native_size_of_every_published_model_is_legal():
    sizes = {name: read_spec(str(known_model(name))).training_bucket for name in KNOWN_MODELS}
    assert len(sizes) == 5
    for name, size in sizes.items():
        assert read_spec(str(known_model(name))).check_bucket(size) == []
        assert size == (Bucket(81, 768, 1360) if name.startswith("1.5") else Bucket(49, 480, 720))
