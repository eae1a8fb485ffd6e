"""``merge``: one LoRA for several, exactly; at a lower rank with its error; and under any program's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stock_pipeline import load_pipeline
from test_export import inputs
from test_inspect import attention, header, lora_of, write

from finetune import inspect, merge
from finetune.cli.main import main
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.spec import read_spec
from finetune.conversion.lora_files import read_lora
from finetune.conversion.lora_layouts import LAYOUTS, Lora
from finetune.conversion.merge import combine
from finetune.core.errors import ConfigError, ExportError, FinetuneError

LAYERS = attention(64, 2)
SOME = {name: shape for name, shape in LAYERS.items() if "to_q" in name}


def updates(lora: Lora) -> dict[str, torch.Tensor]:
    def half(module: str, which: str) -> torch.Tensor:
        return lora.tensors[f"{module}.lora_{which}.weight"]

    return {
        module: lora.alphas[module] / rank * half(module, "B") @ half(module, "A")
        for module, rank in lora.ranks.items()
    }


def scaled(lora: Lora, factor: float) -> Lora:
    return Lora({name: tensor * factor for name, tensor in lora.tensors.items()}, lora.alphas)


@pytest.fixture
def sources(tmp_path) -> tuple[Path, Path]:
    """Of different layout, rank, alpha and layers."""
    settings = header(r=4, lora_alpha=2, target_modules=sorted(LAYERS))
    first, second = lora_of(LAYERS, rank=4, alpha=2), scaled(lora_of(SOME, rank=3, alpha=6), 0.5)
    return (
        write(tmp_path / "first.safetensors", first, "diffusers", settings),
        write(tmp_path / "second.safetensors", second, "kohya"),
    )


def test_a_sum_is_exact_and_loads_as_both_together(tiny_model, tmp_path, sources):
    out = tmp_path / "both.safetensors"
    report = merge([f"{sources[0]}:0.7", f"{sources[1]}:-0.5"], out)
    assert report.ranks == (4, 7) and report.error is None and report.layers == len(LAYERS)
    first, second, both = (updates(read_lora(path)[0]) for path in (*sources, out))
    for module, update in both.items():
        expected = 0.7 * first[module] - (0.5 * second[module] if module in second else 0)
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-5)
    model, spec = tiny_model("5b"), read_spec(str(tiny_model("5b")))
    plain = merge(sources[1], tmp_path / "second-diffusers.safetensors").files[0]
    pipeline = load_pipeline(str(model))

    @torch.no_grad()
    def velocity(**strengths: float) -> torch.Tensor:
        pipeline.set_adapters(list(strengths), list(strengths.values()))
        return denoise(pipeline.transformer, spec, *inputs(spec))

    for name, path in (("a", sources[0]), ("b", plain), ("both", out)):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    ours, theirs = velocity(both=1.0), velocity(a=0.7, b=-0.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, velocity(a=0.7), atol=1e-3)


def test_sums_and_lower_ranks_are_those_of_peft(tmp_path):
    """Which needs a model for it: ours and theirs on one layer."""
    from peft import LoraConfig, LoraModel

    name = "transformer_blocks.0.attn1.to_q"
    first, second = (lora_of({name: (24, 16)}, rank=rank, alpha=3) for rank in (4, 5))
    model = torch.nn.Sequential(torch.nn.Linear(16, 24))
    theirs = LoraModel(model, LoraConfig(r=4, lora_alpha=3, target_modules=["0"]), "a")
    theirs.inject_adapter(model, "a")
    theirs.peft_config["b"] = LoraConfig(r=5, lora_alpha=3, target_modules=["0"])
    theirs.inject_adapter(model, "b")
    layer = model[0]
    with torch.no_grad():
        for adapter, lora in (("a", first), ("b", second)):
            layer.lora_A[adapter].weight.copy_(lora.tensors[f"{name}.lora_A.weight"])
            layer.lora_B[adapter].weight.copy_(lora.tensors[f"{name}.lora_B.weight"])
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.5], "cat", combination_type="cat")
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.5], "svd", combination_type="svd", svd_rank=3)
    sources = [(first, 0.7), (second, 0.5)]
    for rank, adapter in ((None, "cat"), (3, "svd")):
        ours = updates(combine(sources, rank).lora)[name]
        torch.testing.assert_close(ours, layer.get_delta_weight(adapter), rtol=1e-4, atol=1e-4)
    exact, lower = layer.get_delta_weight("cat"), combine(sources, 3)
    lost = (updates(lower.lora)[name] - exact).norm() / exact.norm()
    assert lower.error == pytest.approx(lost.item(), rel=1e-3) and lost > 0.1
    assert combine(sources, 9).error == pytest.approx(0, abs=1e-6)


def test_a_convolution_keeps_its_form_at_a_lower_rank():
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(8, 4, 2, 2, generator=generator), torch.randn(64, 8, 1, 1, generator=generator)
    lora = Lora(
        {"patch_embed.proj.lora_A.weight": down, "patch_embed.proj.lora_B.weight": up}, {"patch_embed.proj": 8.0}
    )
    lower = combine([(lora, 1.0)], 3)
    shapes = {name: tuple(tensor.shape) for name, tensor in lower.lora.tensors.items()}
    assert shapes == {"patch_embed.proj.lora_A.weight": (3, 4, 2, 2), "patch_embed.proj.lora_B.weight": (64, 3, 1, 1)}
    a, b = (lower.lora.tensors[name].flatten(1) for name in shapes)
    whole = up.flatten(1) @ down.flatten(1)
    values = torch.linalg.svdvals(whole)
    assert (b @ a - whole).norm() == pytest.approx(values[3:].norm(), rel=1e-4)
    assert lower.error == pytest.approx(values[3:].norm() / values.norm(), rel=1e-4)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya", "peft"])
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_becomes_any_other_and_nothing_changes(tmp_path, source, layout):
    metadata = header(r=4, lora_alpha=2) if source == "diffusers" else {"ss_tag_frequency": "{}"}
    original = write(tmp_path / "original.safetensors", lora_of(LAYERS, alpha=2), source, metadata)
    out = tmp_path / ("peft" if layout == "peft" else f"{layout}.safetensors")
    report = merge(original, out, layout=layout)
    before, after = read_lora(original)[0], read_lora(out)[0]
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert after.alphas == pytest.approx(before.alphas) and report.error is None
    found = inspect(out, norms=True)
    assert found.layout == LAYOUTS[layout].label and found.ranks == (4,)
    with safe_open(report.files[0], framework="pt") as file:
        assert source == "diffusers" or file.metadata()["ss_tag_frequency"] == "{}"
        assert file.metadata()["modelspec.merged_from"] == "original.safetensors:1"


def test_the_command_says_what_a_lower_rank_loses(tmp_path, sources, capsys):
    out = tmp_path / "small.safetensors"
    words = [f"{sources[0]}:0.7", str(sources[1]), "--rank", "2", "--out", str(out)]
    assert main(["merge", *words]) == 0
    printed = capsys.readouterr().out
    assert (
        "8 layers of rank 2" in printed and "% of the update" in printed and f"next: finetune inspect {out}" in printed
    )
    assert {len(tensor) for name, tensor in load_file(out).items() if "lora_A" in name} == {2}


def test_merges_that_make_no_sense(tmp_path, sources):
    dora = write(tmp_path / "dora.safetensors", lora_of(LAYERS, dora=True), "diffusers")
    wide = write(tmp_path / "wide.safetensors", lora_of(attention(128, 2)), "diffusers")
    (tmp_path / "taken.safetensors").write_bytes(b"")
    out = tmp_path / "out.safetensors"
    cases = [
        ([sources[0], dora], {}, "a DoRA cannot be added"),
        ([dora], {"rank": 2}, "a DoRA cannot be added"),
        ([dora], {"layout": "kohya"}, "pass over its magnitudes"),
        ([dora], {"layout": "comfyui"}, "divides by the norms of the base's weights"),
        ([sources[0], wide], {}, "of different models"),
        ([sources[0]], {"rank": 0}, "a rank of 0"),
        ([], {}, "nothing to merge"),
        ([tmp_path / "taken.safetensors"], {}, "no safetensors file, or a damaged one"),
        ([f"{sources[0]}:much"], {}, "strength 'much' is not a number"),
        ([f"{sources[0]}:nan"], {}, "a weight of nan"),
        ([write(tmp_path / "empty.safetensors", lora_of(LAYERS, rank=0), "diffusers")], {}, "has rank 0"),
    ]
    for given, options, message in cases:
        with pytest.raises(FinetuneError, match=message):
            merge(given, out, **options)
        assert not out.exists()
    for place, message in (("taken.safetensors", "something already"), ("out.bin", "ends in .safetensors")):
        with pytest.raises(ConfigError, match=message):
            merge(sources[0], tmp_path / place)
    assert merge([dora], out).files == (out,)  # alone and whole, it stays as it is


def test_what_is_not_the_sum_is_deleted(tmp_path, sources, monkeypatch):
    from finetune.conversion import lora_files

    def one_off(lora, layout):
        tensors = from_diffusers(lora, layout)
        return tensors | {name: tensor + 1e-6 for name, tensor in list(tensors.items())[:1]}

    from_diffusers = lora_files.from_diffusers
    monkeypatch.setattr(lora_files, "from_diffusers", one_off)
    with pytest.raises(ExportError, match="not what was given, and was deleted"):
        merge(list(sources), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
