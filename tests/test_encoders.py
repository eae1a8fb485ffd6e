"""T5 and the VAE within the memory of training: embeddings stay the same, or are told apart from those before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import run_config

from finetune.caching import encode
from finetune.caching.precompute import precompute
from finetune.caching.request import encoding_of
from finetune.cogvideox.encode import encode_prompts, encode_video
from finetune.cogvideox.load import ModelConfig, load_text
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ModelError
from finetune.core.types import Bucket
from finetune.datasets.cache import Cache
from finetune.memory.block_streaming import RING, stream_text, text_placement
from finetune.memory.quantized_linear import QuantisedLinear

CPU = torch.device("cpu")
CAPTIONS = ["a red circle moving left", "", "x" * 100]


@pytest.fixture(scope="module")
def deep_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A look-alike whose T5 has more blocks than the ring holds."""
    import shutil

    from finetune.testing.tiny import tiny_text

    folder = Path(shutil.copytree(tiny_model("5b"), tmp_path_factory.mktemp("deep") / "model"))
    tiny_text(num_layers=5)[1].save_pretrained(folder / "text_encoder")
    return folder


def embeddings(encoder: Any, tokenizer: Any, folder: Path, captions: list[str] = CAPTIONS) -> Tensor:
    return encode_prompts(tokenizer, encoder, captions, read_spec(str(folder)))


# ------------------------------------------------------------------------------------------------------------ T5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_embeddings_are_the_same_to_the_bit(deep_model: Path, dtype: torch.dtype) -> None:
    model = ModelConfig(pretrained=str(deep_model))
    tokenizer, whole = load_text(model, dtype=dtype)
    _, encoder = load_text(model, dtype=dtype)
    streamed = stream_text(encoder, CPU)
    for passes in (1, 2):
        assert torch.equal(embeddings(encoder, tokenizer, deep_model), embeddings(whole, tokenizer, deep_model))
        # One copy per block and pass, but for what the ring still holds; only the very first is waited for.
        assert 5 * passes - RING <= streamed.loads <= 5 * passes + RING and streamed.stalls <= passes
    # Canary: the blocks are computed from what was streamed.
    streamed.home(encoder.encoder.block[3].layer[0].SelfAttention.q.weight).zero_()
    streamed.invalidate()
    assert not torch.equal(embeddings(encoder, tokenizer, deep_model), embeddings(whole, tokenizer, deep_model))


def test_a_pass_that_failed_does_not_spoil_the_next(deep_model: Path) -> None:
    tokenizer, encoder = load_text(ModelConfig(pretrained=str(deep_model)))
    expected = embeddings(encoder, tokenizer, deep_model)
    stream_text(encoder, CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = encoder.encoder.block[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        embeddings(encoder, tokenizer, deep_model)
    hook.remove()
    assert torch.equal(embeddings(encoder, tokenizer, deep_model), expected)


@pytest.mark.parametrize("name", ["accelerator.empty_host_cache", "_C._host_emptyCache"])  # of torch 2.13, of 2.11
def test_pinned_memory_is_given_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("device"))
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.setattr(f"torch.{name}", lambda: given.append(name), raising=False)
    encode.release_memory()
    assert given == ["device", name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_embeddings_are_near_and_are_those_of_the_rounded_weights(deep_model: Path, dtype: torch.dtype) -> None:
    model = ModelConfig(pretrained=str(deep_model))
    tokenizer, native = load_text(model, dtype=dtype)
    _, encoder = load_text(model, dtype=dtype, placement=text_placement("int8"))
    held = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, QuantisedLinear)}
    assert len(held) == 5 * 7 and not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    ours, theirs = embeddings(encoder, tokenizer, deep_model), embeddings(native, tokenizer, deep_model)
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.03
    for name, layer in held.items():
        native.get_submodule(name).weight.data.copy_(layer.dequantised())
    assert torch.equal(ours, embeddings(native, tokenizer, deep_model))


def test_int8_refuses_what_would_overflow_or_is_incomplete(deep_model: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = ModelConfig(pretrained=str(deep_model), dtype="fp16")
    with pytest.raises(ModelError, match="overflows"):
        load_text(model, placement=text_placement("int8"))
    folder = Path(shutil.copytree(deep_model, tmp_path / "model"))
    path = folder / "text_encoder/model.safetensors"
    weights = load_file(path)
    whole = {**weights, "decoder.stray.weight": torch.zeros(2)}  # as a whole T5 has
    save_file(whole, path, metadata={"format": "pt"})
    model = ModelConfig(pretrained=str(folder))
    load_text(model, placement=text_placement("int8"))
    del whole["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(whole, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, such as .*SelfAttention\.q\.weight"):
        load_text(model, placement=text_placement("int8"))


# ----------------------------------------------------------------------------------------------------- the cache


def test_only_int8_embeddings_have_another_address(deep_model: Path, tmp_path: Path) -> None:
    spec, cache = read_spec(str(deep_model)), Cache(tmp_path / "cache")

    def encoding(how: str, *, fetch: bool) -> Any:
        config = run_config(deep_model, tmp_path / "none", tmp_path / "run", memory={"text_encoder": how})
        return encoding_of(config, spec, cache, fetch=fetch)

    plain, streamed, int8 = ours = [encoding(how, fetch=True) for how in ("device", "streamed", "int8")]
    assert streamed == plain
    assert int8.text_encoder != plain.text_encoder and replace(int8, text_encoder=plain.text_encoder) == plain
    assert [encoding(how, fetch=False) for how in ("device", "streamed", "int8")] == ours


def test_a_cache_is_filled_the_same_whole_and_streamed(deep_model: Path, demo_clips: Path, tmp_path: Path) -> None:
    def done(how: str) -> Any:
        memory = {"text_encoder": how}
        return precompute(run_config(deep_model, demo_clips, tmp_path / "run", memory=memory), progress=False)

    first = done("device")
    cache = Cache(first_cache := tmp_path / "cache")
    keys = {item.prompt_key for item in first.manifest.items}
    content = {path: path.read_bytes() for path in first_cache.rglob("*.safetensors")}
    again = done("streamed")
    assert {item.prompt_key for item in again.manifest.items} == keys  # every entry is found
    int8 = done("int8")
    assert not keys & {item.prompt_key for item in int8.manifest.items}
    assert {item.latents_key for item in int8.manifest.items} == {item.latents_key for item in first.manifest.items}
    assert all(path.read_bytes() == before for path, before in content.items())
    for ours, theirs in zip(int8.manifest.items, first.manifest.items, strict=True):
        near, exact = (cache.read_prompt(item.prompt_key) for item in (ours, theirs))
        assert 1e-4 < (near - exact).norm() / exact.norm() < 0.03


def test_captions_are_streamed_when_asked(deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []
    real = encode.stream_text
    monkeypatch.setattr(encode, "stream_text", lambda encoder, device: seen.append(device) or real(encoder, device))
    spec = read_spec(str(deep_model))
    stored = {}
    for how in ("device", "streamed"):
        cache = Cache(tmp_path / how)
        jobs = [encode.EncodeJob({"kind": "prompts", "text": "a red circle", "how": "the same"})]
        config = run_config(deep_model, tmp_path, tmp_path, memory={"text_encoder": how})
        encode.encode_captions(jobs, config, spec, cache, device=CPU, progress=False)
        stored[how] = {path.name: path.read_bytes() for path in (tmp_path / how).rglob("*.safetensors")}
    assert seen == [CPU] and stored["device"] == stored["streamed"] and len(stored["device"]) == 1


# ------------------------------------------------------------------------------------------------------- the VAE


def test_tiling_is_a_function_of_size_precision_and_free_memory() -> None:
    small, large = Bucket(49, 480, 720), Bucket(81, 768, 1360)
    gib = 2**30
    assert not encode.must_tile(small, torch.bfloat16, 10 * gib) and encode.must_tile(small, torch.bfloat16, 9 * gib)
    assert encode.must_tile(small, torch.float32, 10 * gib)
    assert encode.must_tile(large, torch.bfloat16, 29 * gib)
    assert not encode.must_tile(large, torch.bfloat16, 30 * gib)


@pytest.mark.slow
@pytest.mark.parametrize(("bucket", "gib"), [(Bucket(49, 480, 720), 6.47), (Bucket(81, 768, 1360), 23.9)], ids=str)
def test_the_memory_that_encoding_is_given_is_the_real_vaes_and_a_margin(bucket: Bucket, gib: float) -> None:
    from diffusers import AutoencoderKLCogVideoX
    from storages import StorageCounter
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = AutoencoderKLCogVideoX.load_config(known_model("5b") / "vae")
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = AutoencoderKLCogVideoX.from_config(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        with StorageCounter() as counter:
            encode_video(vae, torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width, dtype=torch.uint8))
    assert counter.peak / 2**30 == pytest.approx(gib, rel=0.02)
    assert 1.15 * counter.peak < encode.untiled_bytes(torch.bfloat16, bucket) < 1.6 * counter.peak
