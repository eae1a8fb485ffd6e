"""Where a model is while videos are sampled: the same videos wherever it is, and figures that hold."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import (
    ModelConfig,
    build_pipeline,
    empty_transformer,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
)
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ConfigError
from finetune.core.types import GIB, Bucket
from finetune.inference.gguf import load_gguf
from finetune.inference.loading import load_denoiser, start_device
from finetune.inference.offload import OFFLOADS, offloading
from finetune.inference.placement import Placement, Sampling, fit, peaks
from finetune.inference.quantization import SCHEMES, quantization_config, scheme_faults
from finetune.methods.lora import LoraMethod
from finetune.parallel.context import divide
from finetune.planner.estimate import _vae
from finetune.planner.fake_run import SilentGroup, empty_text_encoder, empty_vae, fake_world, latent_shape, tensors_of
from finetune.planner.memory_tracker import CPU, measure

BF16 = torch.bfloat16

ROOT = Path(__file__).parents[1]


def sampling_of(variant: str, **changes) -> Sampling:
    folder = known_model(variant)
    spec = read_spec(str(folder))
    return Sampling(**{"folder": folder, "spec": spec, "bucket": spec.training_bucket, "dtype": BF16, **changes})


# ------------------------------------------------------------------------------------------------------------ videos


@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
def test_a_video_is_the_same_wherever_the_model_waits(tiny_model, variant):
    model = ModelConfig(pretrained=str(tiny_model(variant)))
    spec = read_spec(model.pretrained)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(2, 1, spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
    images = {"image": torch.rand(1, 3, 64, 64, generator=generator)} if spec.image_to_video else {}
    videos = []
    for how in OFFLOADS:
        pipeline = build_pipeline(
            spec, transformer=load_transformer(model), scheduler=load_scheduler(model), vae=load_vae(model)
        )
        pipeline.set_progress_bar_config(disable=True)
        for _ in range(2):  # the second finds what the first left
            with offloading(pipeline, how, CPU):
                result = pipeline(
                    prompt_embeds=prompts[0],
                    negative_prompt_embeds=prompts[1],
                    height=64,
                    width=64,
                    num_frames=9,
                    num_inference_steps=2,
                    generator=torch.Generator().manual_seed(3),
                    output_type="pt",
                    **images,
                )
        videos.append(result.frames)
    assert all(torch.equal(video, videos[0]) for video in videos[1:])


# ----------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(("variant", "processes"), [("2b", 1), ("5b", 1), ("1.5-5b-i2v", 1), ("1.5-5b", 4), ("2b", 8)])
def test_predicted_peaks_are_those_of_the_code_on_fake_tensors(tmp_path, variant, processes):
    folder = shutil.copytree(known_model(variant), tmp_path / "model")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 3}))
    spec = read_spec(str(folder))
    sampling = sampling_of(variant, folder=folder, spec=spec, processes=processes)
    predicted = peaks(sampling, Placement())

    with fake_world() as tracker, torch.no_grad():
        transformer = empty_transformer(folder, dtype=BF16, device=CPU)
        if processes > 1:
            divide(transformer, SilentGroup(0, processes))
        held = [transformer, empty_vae(folder, BF16)]
        tracker.name("weights", (tensor for module in held for tensor in tensors_of(module)))
        shape, text = latent_shape(spec, sampling.bucket), (2, spec.max_text_seq_length, spec.text_embed_dim)
        image = torch.zeros(2, shape[0], 1, *shape[2:]) if spec.image_to_video else None
        latents, prompts, timesteps = torch.zeros(2, *shape), torch.zeros(text, dtype=BF16), torch.zeros(2).long()
        begin = tracker.tick
        denoise(transformer, spec, latents, prompts, timesteps, image)
        denoising = measure("denoising", tracker.allocations, begin, tracker.tick)
    with fake_world() as tracker, torch.no_grad():
        encoder, _ = empty_text_encoder(folder, BF16, "device")
        tracker.name("weights", tensors_of(encoder))
        begin = tracker.tick
        encoder(torch.zeros(1, spec.max_text_seq_length, dtype=torch.long))
        encoding = measure("encoding", tracker.allocations, begin, tracker.tick)

    for name, phase in (("denoising", denoising), ("encoding the prompts", encoding)):
        assert phase.peak.nbytes <= predicted[name] < 1.03 * phase.peak.nbytes, name


@pytest.mark.parametrize("bucket", [Bucket(25, 320, 480), Bucket(49, 240, 320)])
def test_predicted_peaks_of_decoding(bucket):
    sampling = sampling_of("5b", bucket=bucket)
    latents = (1, *latent_shape(sampling.spec, bucket))
    phase = _vae(sampling.folder, BF16, "decode", latents, tiled=bucket.height == 320)
    predicted = peaks(sampling, Placement(offload="model"))["decoding"]
    assert phase.peak.nbytes <= predicted < 1.03 * phase.peak.nbytes


@pytest.mark.parametrize(
    ("variant", "gib", "asked", "expected"),
    [
        ("5b", 24, Placement(), Placement()),
        ("5b", 15, Placement(), Placement("model")),
        ("5b", 12, Placement(), Placement("group")),
        ("5b", 8, Placement(), Placement("group", stream_text=True)),
        ("5b", 8, Placement(quantization="nf4"), Placement("model", stream_text=True, quantization="nf4")),
        ("1.5-5b", 8.5, Placement(), Placement("sequential", stream_text=True)),
        ("1.5-5b", 12, Placement(quantization="int8"), Placement("group", quantization="int8")),
    ],
)
def test_the_fastest_placement_that_fits(variant, gib, asked, expected):
    sampling = sampling_of(variant)
    assert fit(sampling, asked, round(gib * GIB)) == expected
    assert max(peaks(sampling, expected).values()) < (gib - 1.2) * GIB


def test_a_budget_that_nothing_fits_is_refused_with_what_would_be_needed():
    with pytest.raises(ConfigError, match=r"8.00 GiB is not enough for 81x768x1360: denoising takes 8\.\d+ GiB"):
        fit(sampling_of("1.5-5b"), Placement(), 8 * GIB)
    with pytest.raises(ConfigError, match="leave --offload out"):
        fit(sampling_of("5b"), Placement(), 8 * GIB, among=["model"])
    fit(sampling_of("1.5-5b", guided=False), Placement(), 8 * GIB)
    fit(sampling_of("1.5-5b", processes=2), Placement(), 8 * GIB)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement("group", quantization="nf4"), "layers in nf4 do not move by themselves"),
        (Placement("sequential", compile=True), "cannot be compiled"),
        (Placement("group", quantization="int8", compile=True), None),
    ],
)
def test_what_does_not_go_together_is_refused(placement, message):
    assert [message in fault.what for fault in placement.faults()] == ([True] if message else [])


# ----------------------------------------------------------------------------------------------------------- fewer bits


def velocity(transformer, spec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    channels, frames, height, width = spec.latent_shape(Bucket(9, 64, 64))
    latents = torch.randn(1, channels, frames, height, width, generator=generator)
    prompts = torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
    with torch.no_grad():
        return denoise(transformer, spec, latents, prompts, torch.tensor([500]), None)


def adapted(transformer):
    """With an adapter that acts, the same for every base."""
    LoraMethod(rank=4, alpha=4).apply(transformer, seed=0)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in sorted(transformer.named_parameters()):
        if "lora_B" in name:
            parameter.data = 4 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return transformer


def held(module) -> int:
    """Bytes; torchao's tensors are made of tensors, and claim the size of what they stand for."""
    parts = {t: getattr(t, "__tensor_flatten__", lambda: ([], None))()[0] for t in tensors_of(module)}
    return sum(sum(getattr(t, name).nbytes for name in names) if names else t.nbytes for t, names in parts.items())


@pytest.fixture
def quantised(tiny_model, tmp_path):
    """``quantised(scheme)``: the tiny 5B, its folder and spec, held so."""
    model = ModelConfig(pretrained=str(tiny_model("5b")), dtype="bf16")

    def load(scheme: str | None):
        placement = Placement(quantization=scheme)
        if scheme == "gguf":
            placement = Placement(gguf=write_gguf(tmp_path / "model.gguf", load_transformer(model)))
        return load_denoiser(model, placement, CPU, BF16)

    return load, read_spec(model.pretrained)


def write_gguf(path: Path, transformer) -> Path:
    """The blocks' linear layers in Q8_0, all else in float32 or bf16."""
    import gguf

    writer = gguf.GGUFWriter(path, "cogvideox")
    for name, tensor in transformer.state_dict().items():
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2 and "transformer_blocks" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        elif name.endswith("bias"):
            kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "fp8", "fp8-cast", "gguf"])
def test_fewer_bits_change_little_and_adapters_act_on_them_as_on_whole_weights(tiny_model, quantised, scheme):
    pytest.importorskip({"gguf": "gguf", "fp8-cast": "torch"}.get(scheme, "torchao"))
    load, spec = quantised
    whole, fewer = load(None), load(scheme)
    assert held(fewer) < 0.8 * held(whole)
    if scheme != "gguf":
        sampling = Sampling(tiny_model("5b"), spec, spec.training_bucket, BF16)
        before, after = (peaks(sampling, Placement("model", quantization=s))["denoising"] for s in (None, scheme))
        decoded = 4 * 64**2 * 2  # of a layer of the feed-forward, as it computes
        assert before - after + decoded == pytest.approx(held(whole) - held(fewer), rel=0.08)

    base, rounded = velocity(whole, spec), velocity(fewer, spec)
    assert 0 < (rounded - base).norm() < 0.05 * base.norm()
    change = velocity(adapted(whole), spec) - base
    assert change.norm() > 0.2 * base.norm()
    assert ((velocity(adapted(fewer), spec) - rounded) - change).norm() < 0.1 * change.norm()


def test_a_gguf_file_of_another_model_is_refused(tiny_model, tmp_path):
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "2b.gguf", load_transformer(ModelConfig(pretrained=str(tiny_model("5b-i2v")))))
    with pytest.raises(ConfigError, match=r"are unknown, such as patch_embed\.pos_embedding"):
        load_gguf(file, tiny_model("5b"), device=CPU, dtype=BF16)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bnb-int8"])
def test_a_text_encoder_in_fewer_bits(tiny_model, scheme):
    pytest.importorskip("bitsandbytes" if scheme == "bnb-int8" else "torchao")
    model = ModelConfig(pretrained=str(tiny_model("5b")), dtype="bf16")
    tokens = torch.arange(16)[None]
    embeds = []
    for config in (None, quantization_config(scheme, text=True)):
        _, encoder = load_text(model, quantization=config)
        embeds.append(encoder(tokens)[0].float())
    assert 0 < (embeds[1] - embeds[0]).norm() < 0.1 * embeds[0].norm()


@pytest.mark.parametrize(
    ("scheme", "option", "dtype", "message"),
    [
        ("nf4", "--quantize", BF16, "needs a GPU of NVIDIA's"),
        ("fp8-dynamic", "--quantize", BF16, "needs a GPU of NVIDIA's"),
        ("fp8-cast", "--quantize-text", BF16, "for the transformer alone"),
        ("bnb-int8", "--quantize-text", torch.float16, "compute in bf16, and the model in float16"),
        ("fp8-cast", "--quantize", torch.float16, None),
    ],
)
def test_what_cannot_run_here_is_refused_by_name(scheme, option, dtype, message):
    faults = [*scheme_faults(scheme, option, CPU, dtype)]
    assert (message is None and not faults) or any(message in fault.what for fault in faults)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("how", OFFLOADS)
def test_every_scheme_on_a_gpu(tiny_model, scheme, how):
    device = torch.device("cuda", 0)
    if [*Placement(how, quantization=scheme).faults()] or [*scheme_faults(scheme, "--quantize", device, BF16)]:
        pytest.skip("refused")
    model = ModelConfig(pretrained=str(tiny_model("5b")), dtype="bf16")
    spec = read_spec(model.pretrained)
    placement = Placement(how, quantization=scheme)
    transformer = load_denoiser(model, placement, device, BF16)
    vae = load_vae(model, device=start_device(placement, device))
    pipeline = build_pipeline(spec, transformer=transformer, scheduler=load_scheduler(model), vae=vae)
    with offloading(pipeline, how, device):
        prompts = torch.randn(2, 1, spec.max_text_seq_length, spec.text_embed_dim, dtype=BF16, device=device)
        video = pipeline(
            prompt_embeds=prompts[0],
            negative_prompt_embeds=prompts[1],
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            output_type="pt",
        ).frames
    assert torch.isfinite(video).all()


# --------------------------------------------------------------------------------------------------------- the table


def test_the_page_has_the_figures_of_today(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("sampling_memory")
    found = json.loads(benchmark.RESULTS.read_text())
    assert found["predicted_gib"] == benchmark.predicted()
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.renewed(page, found) == page
    assert benchmark.renewed(page, {**found, "machine": "another"}) != page


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_up_to_rounding(tiny_model):
    model = ModelConfig(pretrained=str(tiny_model("5b")))
    spec = read_spec(model.pretrained)
    plain, compiled = (load_denoiser(model, Placement(compile=c), CPU, torch.float32) for c in (False, True))
    torch.testing.assert_close(velocity(compiled, spec), velocity(plain, spec), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity(adapted(compiled), spec), velocity(adapted(plain), spec), rtol=1e-4, atol=1e-4)
