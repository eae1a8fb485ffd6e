"""``convert --extract-lora``: a full fine-tuning as a LoRA, by the largest singular directions of what it changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_pipeline import load_pipeline
from test_export import inputs

from finetune import convert
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.spec import read_spec
from finetune.conversion.lora_files import read_lora
from finetune.core.errors import ConfigError
from finetune.core.files import LORA_FILE

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
RANK = 3


@pytest.fixture(scope="module")
def tuned(tiny_model, tmp_path_factory) -> Path:
    """A model whose attention and feed-forward weights differ from the base by updates of rank 3."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(tiny_model("5b"), folder)
    tensors, draw = load_file(folder / WEIGHTS), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and (".attn1.to" in name or ".ff.net" in name):
            rows, columns = tensor.shape
            update = torch.randn(rows, RANK, generator=draw) @ torch.randn(RANK, columns, generator=draw)
            tensors[name] = tensor + 0.05 * update
    save_file(tensors, folder / WEIGHTS)
    return folder


@torch.no_grad()
def velocity(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    pipeline = load_pipeline(str(folder))
    if adapter is not None:
        pipeline.load_lora_weights(str(adapter))
    spec = read_spec(str(folder))
    return denoise(pipeline.transformer, spec, *inputs(spec))


@pytest.mark.parametrize("wanted", [3, 0.999])
def test_a_change_of_low_rank_comes_back_whole(tiny_model, tuned, tmp_path, wanted):
    base = tiny_model("5b")
    report = convert(tuned, tmp_path / "lora", model=base, extract_lora=wanted)
    lora, *_ = read_lora(tmp_path / "lora" / LORA_FILE)
    assert set(lora.ranks.values()) == {RANK} and "rank 3 holds 100.0%" in report.notes[0]
    assert "; 0.0% of the whole change is in other weights" in report.notes[0]
    ours, theirs, untouched = velocity(base, tmp_path / "lora"), velocity(tuned), velocity(base)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (theirs - untouched).abs().max() > 1e-2


def test_a_lower_rank_is_the_best_of_that_rank(tiny_model, tuned, tmp_path):
    report = convert(tuned, tmp_path / "lora", model=tiny_model("5b"), extract_lora=1)
    lora, *_ = read_lora(tmp_path / "lora" / LORA_FILE)
    base, own = (load_file(folder / WEIGHTS) for folder in (tiny_model("5b"), tuned))
    module = "transformer_blocks.0.attn1.to_q"
    difference = own[f"{module}.weight"] - base[f"{module}.weight"]
    update = lora.alphas[module] * lora.tensors[f"{module}.lora_B.weight"] @ lora.tensors[f"{module}.lora_A.weight"]
    best = torch.linalg.svdvals(difference)[1:].norm()
    torch.testing.assert_close((difference - update).norm(), best, rtol=1e-3, atol=1e-5)
    assert "rank 1 holds" in report.notes[0] and "100.0%" not in report.notes[0]


def test_what_cannot_be_extracted_is_refused(tiny_model, tuned, tmp_path):
    base, out = tiny_model("5b"), tmp_path / "lora"
    for call, message in (
        (lambda: convert(tuned, out, extract_lora=4), "give --model BASE"),
        (lambda: convert(tuned, out, model=base, extract_lora=0), "neither a rank nor a share"),
        (lambda: convert(tuned, out, model=base, extract_lora=2.5), "neither a rank nor a share"),
        (lambda: convert(tuned, out, model=tiny_model("5b-i2v"), extract_lora=4), "the base is of another model"),
        (lambda: convert(base, out, model=base, extract_lora=4), "no layer of its blocks differs"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
        assert not out.exists()
