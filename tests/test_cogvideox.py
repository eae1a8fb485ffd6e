"""What we hand to the transformer, the VAE and T5 against what the stock diffusers pipelines hand to them."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Tokenizer

from finetune.cogvideox.captions import load_tokenizer, tokenize
from finetune.cogvideox.components import CONFIG_FILES
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise, rotary_table
from finetune.cogvideox.encode import (
    condition_latents,
    encode_image,
    encode_prompts,
    encode_video,
    model_latents,
)
from finetune.cogvideox.load import (
    build_pipeline,
    fingerprint,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
    pipeline_class,
    save_transformer,
)
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.cogvideox.objective import add_noise, alpha_bar, velocity
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.checksums import digest_file
from finetune.core.errors import ModelError
from finetune.core.types import Bucket

CPU = torch.device("cpu")
CAPTIONS = ["a red circle moving left", ""]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

# (variant, native pixels of its tiny look-alike, bucket). Learned positions allow one size; the second generation's
# table must be at least as large as the bucket, and 9, 5 and 1 frames need a padded front where 13 do not.
CASES = [
    ("2b", (64, 64), Bucket(9, 64, 64)),
    ("2b", (64, 64), Bucket(1, 80, 48)),
    ("5b", (48, 80), Bucket(9, 96, 32)),
    ("5b", (48, 80), Bucket(1, 80, 80)),
    ("5b-i2v", (48, 80), Bucket(9, 48, 80)),
    ("1.5-5b", (128, 128), Bucket(9, 64, 64)),
    ("1.5-5b", (128, 128), Bucket(13, 48, 96)),
    ("1.5-5b-i2v", (128, 128), Bucket(9, 64, 64)),
    ("1.5-5b-i2v", (128, 128), Bucket(1, 32, 112)),
]


@dataclass(frozen=True)
class Tiny:
    """A look-alike, loaded once with our own functions, and the stock pipeline around the same modules."""

    folder: Path
    spec: ModelSpec
    pipeline: Any
    tokenizer: Any
    """Ours; the pipeline's is transformers'."""

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    def noise(self, bucket: Bucket, batch: int = 1) -> torch.Tensor:
        channels, _, height, width = self.spec.latent_shape(bucket)
        return seeded(batch, channels, self.spec.padded_latent_frames(bucket.frames), height, width)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    loaded: dict[Any, Tiny] = {}

    def load(variant: str, native: tuple[int, int] = (64, 64)) -> Tiny:
        if (variant, native) not in loaded:
            folder = tiny_model(variant, height=native[0], width=native[1])
            model, spec = ModelConfig(pretrained=str(folder)), read_spec(str(folder))
            tokenizer, encoder = load_text(model)
            modules = {"transformer": load_transformer(model), "vae": load_vae(model)}
            text = {"tokenizer": T5Tokenizer.from_pretrained(folder / "tokenizer"), "text_encoder": encoder}
            pipeline = build_pipeline(spec, scheduler=load_scheduler(model), **modules, **text)
            pipeline.set_progress_bar_config(disable=True)
            loaded[variant, native] = Tiny(folder, spec, pipeline, tokenizer)
        return loaded[variant, native]

    return load


@contextmanager
def recorded(module: nn.Module):
    """Every keyword argument that ``module`` is called with, and what it returned, call by call."""
    calls: list[dict[str, Any]] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append({"args": args, **kwargs, "output": output[0]}), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# ------------------------------------------------------------------------------------- the transformer's inputs, output


@pytest.mark.parametrize(("variant", "native", "bucket"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_denoise_gives_the_transformer_what_the_stock_pipeline_gives_it(tiny, variant, native, bucket):
    model = tiny(variant, native)
    spec = model.spec
    assert spec.check_bucket(bucket) == []
    noise, images = model.noise(bucket, 2), random_pixels(2, 3, bucket.height, bucket.width)
    with recorded(model.transformer) as theirs:
        model.pipeline(
            prompt=CAPTIONS,
            num_frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            latents=noise.transpose(1, 2),
            num_inference_steps=3,
            guidance_scale=1.0,
            max_sequence_length=spec.max_text_seq_length,
            generator=generators(7, 8),
            output_type="latent",
            **({"image": images / 255} if spec.image_to_video else {}),
        )
    assert len(theirs) == 3 and theirs[0]["timestep"].tolist() == [999, 999]
    prompt_embeds = encode_prompts(model.tokenizer, model.pipeline.text_encoder, CAPTIONS, spec)
    image_latents = None
    if spec.image_to_video:
        pairs = zip(images, generators(7, 8), strict=True)
        draws = [encode_image(model.pipeline.vae, image, 1, [each], noise=False) for image, each in pairs]
        image_latents = condition_latents(spec, torch.cat(draws))
    for call in theirs:
        # The first call starts from our noise; the later ones from wherever the stock sampler went.
        latents = call["hidden_states"][:, :, : spec.latent_channels].transpose(1, 2)
        with torch.no_grad(), recorded(model.transformer) as ours:
            prediction = denoise(model.transformer, spec, latents, prompt_embeds, call["timestep"], image_latents)
        assert len(ours) == 1
        assert_same(ours[0], call)
        assert torch.equal(prediction, call["output"].transpose(1, 2))
    assert torch.equal(theirs[0]["hidden_states"][:, :, : spec.latent_channels], noise.transpose(1, 2))


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    compared = ("hidden_states", "encoder_hidden_states", "timestep", "ofs", "image_rotary_emb")
    # Nothing that either side passes is left uncompared.
    passed = {name for call in (ours, theirs) for name, value in call.items() if value is not None}
    assert passed <= {*compared, "args", "output", "return_dict"} and ours["args"] == theirs["args"] == ()
    for name in compared:
        own, stock = ours.get(name), theirs.get(name)
        assert (own is None) == (stock is None), name
        for a, b in zip(own, stock, strict=True) if isinstance(own, tuple) else [(own, stock)]:
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), name


def test_the_comparison_notices_a_wrong_condition(tiny):
    """A canary for the test above: an image condition of the other scale, or one frame late, must not pass."""
    model = tiny("1.5-5b-i2v", (128, 128))
    noise, image = model.noise(Bucket(9, 64, 64)), seeded(1, 4, 1, 8, 8, seed=3)

    def call(image_latents: torch.Tensor) -> dict[str, Any]:
        with torch.no_grad(), recorded(model.transformer) as calls:
            denoise(model.transformer, model.spec, noise, seeded(1, 14, 32), torch.tensor([500]), image_latents)
        return calls[0]

    right = call(condition_latents(model.spec, image))
    assert_same(right, right)
    late = {**right, "hidden_states": right["hidden_states"].roll(1, dims=1)}
    for wrong in (call(image * model.spec.scaling_factor), late):
        with pytest.raises(AssertionError, match="hidden_states"):
            assert_same(wrong, right)


@pytest.mark.parametrize(
    ("name", "bucket"),
    [
        *[("5b", Bucket(49, *size)) for size in ((480, 720), (720, 480), (320, 512), (480, 480), (256, 768))],
        *[("1.5-5b", Bucket(81, *size)) for size in ((768, 1360), (1360, 768), (480, 848))],
        ("1.5-5b-i2v", Bucket(9, 768, 768)),
    ],
    ids=str,
)
def test_rotary_table_of_the_published_sizes(name, bucket):
    spec = read_spec(str(known_model(name)))
    frames = spec.padded_latent_frames(bucket.frames)
    config = SimpleNamespace(**json.loads((known_model(name) / CONFIG_FILES["transformer"]).read_text()))
    stock = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    theirs = pipeline_class(spec)._prepare_rotary_positional_embeddings(stock, bucket.height, bucket.width, frames, CPU)
    ours = rotary_table(spec, frames, bucket.height // 8, bucket.width // 8, device=CPU)
    assert ours[0].shape == (spec.tokens(bucket) - spec.max_text_seq_length, 64)
    for own, stock_table in zip(ours, theirs, strict=True):
        assert own.dtype == stock_table.dtype == torch.float32 and torch.equal(own, stock_table)


def test_the_two_generations_lay_positions_out_differently():
    """Canary for the test above: sliced positions equal stretched ones at the native size only."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    spec = read_spec(str(known_model("5b")))
    for height, width, same in ((60, 90, True), (40, 64, False)):
        cos, _ = rotary_table(spec, 3, height, width, device=CPU)
        size = (height // 2, width // 2)
        sliced, _ = get_3d_rotary_pos_embed(64, None, size, 3, grid_type="slice", max_size=(99, 99))
        difference = float((cos - sliced).abs().max())
        assert difference < 1e-4 if same else difference > 1.0


def test_learned_positions_allow_nothing_but_their_size(tiny):
    """Why check_bucket is strict: diffusers refuses another size, and loses what was learned at another length."""
    model = tiny("5b-i2v")

    def predict(bucket: Bucket) -> torch.Tensor:
        noise = model.noise(bucket)
        image = seeded(1, *noise.shape[1:2], 1, *noise.shape[3:])
        with torch.no_grad():
            return denoise(model.transformer, model.spec, noise, seeded(1, 16, 32), torch.tensor([9]), image)

    table = model.transformer.patch_embed.pos_embedding
    original = table.clone()
    native, shorter = predict(Bucket(9, 64, 64)), predict(Bucket(5, 64, 64))
    try:
        table.add_(1.0)
        assert not torch.equal(predict(Bucket(9, 64, 64)), native)
        assert torch.equal(predict(Bucket(5, 64, 64)), shorter)
    finally:
        table.copy_(original)
    with pytest.raises(ValueError, match="different resolution"):
        predict(Bucket(9, 64, 80))
    assert all(model.spec.check_bucket(bucket) for bucket in (Bucket(5, 64, 64), Bucket(9, 64, 80)))
    with pytest.raises(ValueError, match="image_latents is missing"):
        denoise(model.transformer, model.spec, model.noise(Bucket(9, 64, 64)), seeded(1, 16, 32), torch.ones(1), None)


def test_a_wrapper_is_called_and_gradients_flow(tiny):
    model = tiny("5b")

    class Wrapper(nn.Module):  # like DDP: no dtype, no config, and it counts only if it is called itself
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper(model.transformer)
    noise = model.noise(Bucket(9, 64, 64)).requires_grad_()
    prediction = denoise(wrapper, model.spec, noise, seeded(1, 16, 32), torch.tensor([9]), None)
    (gradient,) = torch.autograd.grad(prediction.sum(), noise)
    assert wrapper.calls == 1 and gradient.isfinite().all() and gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="image_latents is given"):
        denoise(wrapper, model.spec, noise, seeded(1, 16, 32), torch.tensor([9]), noise[:, :, :1])


def test_bf16_weights_and_fp32_adapters_give_float32(tiny):
    from peft import LoraConfig

    model = tiny("5b")
    transformer = load_transformer(ModelConfig(pretrained=str(model.folder)), dtype=torch.bfloat16)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "patch_embed.proj"]))
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad(), recorded(transformer) as calls:
        noise = model.noise(Bucket(9, 64, 64))
        prediction = denoise(transformer, model.spec, noise, seeded(1, 16, 32), torch.tensor([9]), None)
    assert calls[0]["hidden_states"].dtype == calls[0]["encoder_hidden_states"].dtype == torch.bfloat16
    assert calls[0]["timestep"].dtype == torch.int64  # bfloat16 cannot count to 1000
    assert calls[0]["image_rotary_emb"][0].dtype == prediction.dtype == torch.float32
    with pytest.raises(ValueError, match="adapters"):
        save_transformer(transformer, model.folder / "never")


def test_a_model_makes_its_positions_once_for_a_shape(tiny, monkeypatch):
    from finetune.cogvideox import denoise as module

    made = []
    monkeypatch.setattr(
        module, "rotary_table", lambda *args, **kwargs: made.append(args) or rotary_table(*args, **kwargs)
    )
    models = [deepcopy(tiny("5b").transformer) for _ in range(2)]
    spec = tiny("5b").spec

    def look(transformer: nn.Module, frames: int) -> torch.Tensor:
        latents = seeded(1, spec.latent_shape(Bucket(9, 64, 64))[0], frames, 8, 8)
        text = seeded(1, spec.max_text_seq_length, spec.text_embed_dim)
        return denoise(transformer, spec, latents, text, torch.tensor([5]), None)

    with torch.inference_mode():
        first = look(models[0], 3)
    again = look(models[0], 3)
    again.sum().backward()  # with positions that were made where no gradient could be
    assert len(made) == 1 and torch.equal(first, again)
    look(models[0], 1)
    look(models[1], 3)
    assert len(made) == 3


@pytest.mark.parametrize("name", KNOWN_MODELS)
@pytest.mark.parametrize("scheduler_class", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_schedule_noise_and_velocity_equal_the_schedulers(name, scheduler_class):
    theirs = getattr(diffusers, scheduler_class).from_pretrained(known_model(name) / "scheduler")
    ours = alpha_bar(read_spec(str(known_model(name))))
    assert ours.dtype == theirs.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=1e-12, atol=1e-15)
    assert ours[-1] == 0 and (ours.diff() < 0).all()
    times = torch.arange(1000)
    x0, eps = (seeded(1000, 2, 3, 2, 2, seed=seed, dtype=torch.float64) for seed in (0, 1))
    torch.testing.assert_close(add_noise(x0, eps, ours), theirs.add_noise(x0, eps, times), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(velocity(x0, eps, ours), theirs.get_velocity(x0, eps, times), rtol=1e-9, atol=1e-12)


def test_schedule_without_rescaling_keeps_its_last_signal():
    spec = replace(read_spec(str(known_model("2b"))), rescale_betas_zero_snr=False, snr_shift_scale=2.0)
    theirs = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=False, snr_shift_scale=2.0).alphas_cumprod
    torch.testing.assert_close(alpha_bar(spec), theirs, rtol=1e-12, atol=0)
    assert alpha_bar(spec)[-1] > 0


# ------------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_encode_video_equals_the_vae_on_preprocessed_frames(tiny, frames):
    model = tiny("5b")
    pixels = random_pixels(2, 3, frames, 32, 48)
    videos = [[Image.fromarray(np.asarray(frame.permute(1, 2, 0))) for frame in clip.unbind(1)] for clip in pixels]
    before = torch.random.get_rng_state()
    mean, std = encode_video(model.pipeline.vae, pixels)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        # Contiguous, because convolutions round by memory layout too.
        preprocessed = model.pipeline.video_processor.preprocess_video(videos).contiguous()
        theirs = model.pipeline.vae.encode(preprocessed).latent_dist
    assert mean.shape == (2, 4, model.spec.latent_frames(frames), 4, 6) and mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    assert torch.equal(mean, theirs.mean) and torch.equal(std, theirs.std)


def test_encoders_take_bytes_and_return_float32(tiny):
    vae = load_vae(ModelConfig(pretrained=str(tiny("5b").folder), dtype="bf16"))
    assert vae.dtype == torch.bfloat16 and not any(parameter.requires_grad for parameter in vae.parameters())
    encoded = [*encode_video(vae, random_pixels(1, 3, 9, 32, 32))]
    encoded.append(encode_image(vae, random_pixels(3, 32, 32), 1, generators(0)))
    assert {tensor.dtype for tensor in encoded} == {torch.float32}
    with pytest.raises(TypeError, match="uint8"):
        encode_video(vae, torch.zeros(1, 3, 9, 32, 32))
    with pytest.raises(TypeError, match="uint8"):
        encode_image(vae, torch.zeros(3, 32, 32), 1, generators(0))


def test_image_draws_depend_on_their_own_generator_only(tiny):
    vae, image = tiny("5b-i2v").pipeline.vae, random_pixels(3, 32, 48)

    def draw(*seeds: int, noise: bool = True) -> torch.Tensor:
        return encode_image(vae, image, len(seeds), generators(*seeds), noise=noise)

    torch.manual_seed(0)
    two = draw(1, 2)
    torch.manual_seed(99)
    assert two.shape == (2, 4, 1, 4, 6)
    assert torch.equal(draw(2)[0], two[1]) and torch.equal(draw(1)[0], two[0])
    assert not torch.equal(two[0], two[1]) and not torch.equal(draw(1, noise=False), draw(1))
    with pytest.raises(ValueError, match="3 draws need as many generators, not 1"):
        encode_image(vae, image, 3, generators(0))


def test_image_noise_has_one_log_normal_sigma_per_draw():
    class Identity:  # a VAE that hands its input back, without any spread
        device, dtype = CPU, torch.float32

        def encode(self, pixels):
            logvar = torch.full_like(pixels, -torch.inf)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels, logvar=logvar))

    image, vae = random_pixels(3, 32, 32), Identity()
    clean = encode_image(vae, image, 1, generators(0), noise=False)
    log_sigma = (encode_image(vae, image, 400, generators(*range(400))) - clean).flatten(1).std(dim=1).log()
    assert abs(float(log_sigma.mean()) + 3.0) < 0.1 and abs(float(log_sigma.std()) - 0.5) < 0.06
    assert clean.amin() == -1 and clean.amax() == 1
    torch.testing.assert_close(clean[0, :, 0], image.float() / 127.5 - 1)


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
def test_prompts_equal_the_stock_pipelines(tiny, variant):
    model = tiny(variant)
    tokenizer, encoder, length = model.tokenizer, model.pipeline.text_encoder, model.spec.max_text_seq_length
    captions = [*CAPTIONS, "a blue square moving right " * 20]
    theirs = model.pipeline._get_t5_prompt_embeds(captions, max_sequence_length=length)
    ours = encode_prompts(tokenizer, encoder, captions, model.spec)
    assert ours.shape == (3, length, model.spec.text_embed_dim) and not ours.requires_grad
    assert torch.equal(ours, theirs)
    # T5 pads without a mask, so a caption's embedding does not depend on what it is batched with.
    torch.testing.assert_close(encode_prompts(tokenizer, encoder, captions[:1], model.spec), ours[:1])


@pytest.mark.parametrize(
    ("caption", "unknown", "tokens"),
    [
        ("a red circle", 0, ["▁a", "▁red", "▁circle", "</s>"]),
        ("一只猫在走", 5, ["▁", "<unk>", "</s>"]),  # one mark, however many characters
        ("你好 世界", 4, ["▁", "<unk>", "▁", "<unk>", "</s>"]),
        ("a 🎈 red", 1, ["▁a", "▁", "<unk>", "▁red", "</s>"]),
        ("a </s> red", 4, ["▁a", "</s>", "▁red", "</s>"]),
        ("", 0, ["</s>"]),
    ],
)
def test_what_the_tokenizer_does_not_know_is_counted(tiny, caption, unknown, tokens):
    model = tiny("5b")
    (tokenized,) = tokenize(model.tokenizer, [caption], model.spec)
    assert tokenized.unknown == unknown
    assert [model.tokenizer.id_to_token(number) for number in tokenized.ids] == tokens


def sentencepiece_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """As the published checkpoints have it: a model of sentencepiece, and its sentinels named in the settings."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    pieces = ("<pad>", "</s>", "<unk>", "\u2581a", "\u2581caption", "\u2581", *"abcdefghijklmnopqrstuvwxyz")
    for piece in pieces:
        model.pieces.add(piece=piece, score=-1.0, type=2 if piece == "<unk>" else 3 if piece[0] == "<" else 1)
    model.trainer_spec.unk_id = 2
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


SPECIAL = {0: "<pad>", 1: "</s>", 2: "<unk>", **{131 - n: f"<extra_id_{n}>" for n in range(100)}}
SENTINELS = {
    str(number): {"content": token, "lstrip": number > 2, "rstrip": number > 2, "normalized": False, "special": True}
    for number, token in SPECIAL.items()
}
TEXTS = ["a caption", "", "a  b", "  a lead ", "\u732b a", "a <extra_id_1> b", "a<extra_id_99>b </s> c", "<pad> <unk>",
         "a\tb\nc", "\u2581a", "a <bar> b", "a\u00a0b", "\ufb01 \u212b", "caption " * 40]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"extra_ids": 0},
        {"added_tokens_decoder": SENTINELS, "extra_ids": 100},
        {"added_tokens_decoder": SENTINELS, "extra_ids": 0},  # numbered in the decoder's order
        {"bos_token": "<bar>", "sep_token": "</s>", "mask_token": "<extra_id_100>"},
    ],
)
@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_tokens_are_those_of_transformers(config, kind, tmp_path):
    folder = tmp_path / "tokenizer"
    sentencepiece_tokenizer(folder, config)
    theirs = T5Tokenizer.from_pretrained(folder)
    if kind == "json":
        shutil.rmtree(folder)
        theirs.save_pretrained(folder)
        theirs = T5Tokenizer.from_pretrained(folder)
    ours = load_tokenizer(ModelConfig(pretrained=str(tmp_path)))
    assert ours.padding["pad_id"] == theirs.pad_token_id
    for text, tokens in zip(TEXTS, tokenize(ours, TEXTS, SimpleNamespace(max_text_seq_length=12)), strict=True):
        assert list(tokens.ids) == theirs(text, max_length=12, truncation=True).input_ids, text
        assert tokens.length == len(theirs(text).input_ids)


# -------------------------------------------------------------- from the cache to model space, and back by the pipeline


@pytest.mark.parametrize(("variant", "native", "bucket"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_the_stock_pipeline_decodes_our_latents_to_the_posterior_sample(tiny, variant, native, bucket, monkeypatch):
    """A sampler that lands on our x0 must hand the VAE the posterior sample: same scale, same frames dropped."""
    model = tiny(variant, native)
    spec, pipeline = model.spec, model.pipeline
    mean, eps, std = (seeded(1, *spec.latent_shape(bucket), seed=seed) for seed in (1, 2, 3))
    x0 = model_latents(spec, mean, std.abs(), eps)
    assert x0.shape[2] == spec.padded_latent_frames(bucket.frames) and x0.dtype == torch.float32
    padding = x0.shape[2] - mean.shape[2]
    assert all(torch.equal(x0[:, :, frame], x0[:, :, padding]) for frame in range(padding))

    decoded: list[torch.Tensor] = []
    picture = SimpleNamespace(sample=torch.zeros(1, 3, 1, 8, 8))
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: decoded.append(z) or picture)
    landed = x0.transpose(1, 2)
    result = (landed, landed) if "DPM" in type(pipeline.scheduler).__name__ else (landed,)
    monkeypatch.setattr(type(pipeline.scheduler), "step", lambda *_, **__: result)
    pipeline(
        prompt_embeds=seeded(1, spec.max_text_seq_length, 32),
        num_frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
        **({"image": torch.zeros(1, 3, bucket.height, bucket.width)} if spec.image_to_video else {}),
    )
    torch.testing.assert_close(decoded[0], mean + std.abs() * eps, rtol=1e-6, atol=1e-6)


def test_latents_stored_in_half_precision_are_scaled_in_float32():
    spec = read_spec(str(known_model("5b")))
    mean, std, eps = (seeded(1, 4, 3, 2, 2, seed=seed) for seed in range(3))
    mean, std = mean.half(), std.abs().half()
    ours = model_latents(spec, mean, std, eps)
    assert ours.dtype == torch.float32
    theirs = (mean.double() + std.double() * eps.double()) * 0.7
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


def test_front_padding_follows_the_temporal_patch():
    spec = replace(read_spec(str(known_model("1.5-5b"))), patch_size_t=4, scaling_factor=1.0)
    latents = torch.arange(5.0).reshape(1, 1, 5, 1, 1)
    padded = model_latents(spec, latents, torch.zeros_like(latents), torch.zeros_like(latents))
    assert padded.flatten().tolist() == [0, 0, 0, 0, 1, 2, 3, 4]  # 5 -> 8: (4 - 5 mod 4) mod 4 = 3 copies


# --------------------------------------------------------------------------------------------------- loading and saving


@pytest.fixture
def copy(tiny_model, tmp_path) -> Path:
    """A 5B look-alike that a test may change."""
    return Path(shutil.copytree(tiny_model("5b"), tmp_path / "model"))


def test_auto_dtype_follows_the_stored_weights(tiny_model, copy):
    # Learned positions are stored in float64 beside float32 weights: the majority decides, not the first.
    assert ModelConfig(pretrained=str(tiny_model("5b-i2v"))).torch_dtype() == torch.float32
    weights, model = copy / WEIGHTS, ModelConfig(pretrained=str(copy))
    for stored in (torch.bfloat16, torch.float16):
        save_file({name: tensor.to(stored) for name, tensor in load_file(weights).items()}, weights)
        assert model.torch_dtype() == torch.bfloat16
        assert ModelConfig(pretrained=str(copy), dtype="fp32").torch_dtype() == torch.float32
    weights.unlink()
    assert model.torch_dtype() == torch.bfloat16
    weights.write_bytes(struct.pack("<Q", 10) + b"not json!!")
    with pytest.raises(ModelError, match="transformer cannot be loaded"):
        model.torch_dtype()


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_everything_is_in_the_dtype_that_was_asked_for(tiny_model, variant):
    model = ModelConfig(pretrained=str(tiny_model(variant)), dtype="bf16")
    tokenizer, encoder = load_text(model)
    for module in (load_transformer(model), load_vae(model), encoder):
        tensors = [*module.parameters(), *module.buffers()]  # 2B's table of positions is a buffer, built in float64
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}
        assert not module.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert tokenizer.encode("").ids == [1]


def test_t5_is_what_transformers_loads(copy):
    """Also in float16, where its outputs stay float32, and of a whole T5, which has a decoder."""
    from transformers import T5EncoderModel

    path = copy / "text_encoder/model.safetensors"
    save_file({**load_file(path), "decoder.stray.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, ours = load_text(ModelConfig(pretrained=str(copy)), dtype=dtype)
        theirs = T5EncoderModel.from_pretrained(copy / "text_encoder", dtype=dtype).state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        for name, tensor in ours.state_dict().items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), (name, dtype)
    assert {t.dtype for name, t in theirs.items() if ".wo." in name} == {torch.float32}, "canary"


def test_casting_positions_once_changes_no_value(tiny):
    model = tiny("2b")
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        model.folder / "transformer", torch_dtype=torch.bfloat16
    )
    ours = load_transformer(ModelConfig(pretrained=str(model.folder), dtype="bf16"))
    assert theirs.patch_embed.pos_embedding.dtype == torch.float64  # what the cast is for
    noise, embeds = model.noise(Bucket(9, 64, 64)), seeded(1, 16, 32)
    with torch.no_grad():
        a, b = (denoise(module, model.spec, noise, embeds, torch.tensor([9]), None) for module in (ours, theirs))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path, weights: save_file(dict(list(weights.items())[1:]), path), "1 weights are missing, such as"),
        (lambda path, weights: save_file({**weights, "stray.weight": torch.zeros(2)}, path), "stray.weight"),
        (lambda path, weights: save_file({**weights, "proj_out.weight": torch.zeros(3, 3)}, path), "proj_out.weight"),
        (lambda path, weights: path.write_bytes(path.read_bytes()[:-100]), ""),
        (lambda path, weights: path.unlink(), ""),
    ],
    ids=["missing", "unknown", "shape", "truncated", "absent"],
)
def test_a_damaged_transformer_is_refused(copy, change, named):
    change(copy / WEIGHTS, load_file(copy / WEIGHTS))
    with pytest.raises(ModelError, match="the transformer cannot be loaded") as raised:
        load_transformer(ModelConfig(pretrained=str(copy)))
    assert raised.value.where.startswith(str(copy / "transformer")) and raised.value.fix and named in str(raised.value)


def test_damaged_text_and_scheduler_are_refused(copy):
    path, model = copy / "text_encoder/model.safetensors", ModelConfig(pretrained=str(copy))
    weights = load_file(path)
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file({**weights, "decoder.stray.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, such as .*SelfAttention\.q\.weight"):
        load_text(model)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_text(model)
    (copy / CONFIG_FILES["scheduler"]).write_text('{"_class_name": "EulerDiscreteScheduler"}')
    with pytest.raises(ModelError, match="EulerDiscreteScheduler"):
        load_scheduler(model)


def test_a_saved_transformer_is_what_diffusers_loads(tiny, tmp_path):
    model = tiny("5b-i2v", (48, 80))
    save_transformer(model.transformer, tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    assert config["_class_name"] == "CogVideoXTransformer3DModel" and "_name_or_path" not in config
    again = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
    own = model.transformer.state_dict()
    assert again.keys() == own.keys() and all(torch.equal(tensor, own[name]) for name, tensor in again.items())


def test_pipelines_can_be_built_without_encoders(tiny):
    model = tiny("5b")
    bare = build_pipeline(model.spec, transformer=model.transformer, scheduler=model.pipeline.scheduler)
    bare.set_progress_bar_config(disable=True)
    tensors = {"prompt_embeds": seeded(1, 16, 32), "latents": model.noise(Bucket(9, 64, 64)).transpose(1, 2)}
    sizes = {"num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    ours, theirs = (p(**tensors, **sizes, generator=generators(5)[0]).frames for p in (bare, model.pipeline))
    assert torch.equal(ours, theirs)


def test_fingerprints_change_with_what_an_encoder_is_made_of(tiny_model, copy):
    digested: list[Path] = []

    def both() -> tuple[str, str]:
        return fingerprint(copy, "vae"), fingerprint(copy, "text_encoder")

    def memo(path: Path) -> str:
        digested.append(path)
        return digest_file(path)

    vae, text = both()
    assert both() == (vae, text) and vae != text
    assert fingerprint(tiny_model("5b"), "vae", digest_file=memo) == vae  # the folder's place does not matter
    assert {path.name for path in digested} == {"config.json", "diffusion_pytorch_model.safetensors"}
    (copy / "vae/README.md").write_text("nothing that loading reads")
    assert both() == (vae, text)
    (copy / "vae/config.json").write_text((copy / "vae/config.json").read_text() + "\n")
    assert both()[0] != vae and both()[1] == text
    for file in ("tokenizer/tokenizer.json", "text_encoder/model.safetensors"):
        before = both()
        with (copy / file).open("ab") as stream:
            stream.write(b" ")
        assert both()[0] == before[0] and both()[1] != before[1], file
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelError, match="the text_encoder has no weights"):
        fingerprint(copy, "text_encoder")
