"""What other trainers and programs wrote, converted: names in both directions, scales, hostile files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.convert.lora_layouts import LAYOUTS, Lora, detect, from_diffusers, is_lora, to_diffusers
from finetune.core.errors import ConfigError
from finetune.testing.tiny import VARIANTS, tiny_transformer

# ------------------------------------------------------------------------------------------- names of a LoRA's tensors


def lora_of(modules, rank=4, alpha=2.0, **sizes):
    """A random LoRA by our names; ``sizes`` are (out, in) of modules that have others than (16, 16)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 16, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(16, rank, generator=generator)
    return Lora(tensors, dict.fromkeys(modules, alpha))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_layer_has_a_name_in_every_layout_but_sats(variant):
    modules = [name for name, module in tiny_transformer(variant).named_modules() if isinstance(module, nn.Linear)]
    lora = lora_of(modules)
    read = [layout for layout in LAYOUTS.values() if not layout.name.startswith("sat")]
    assert len(read) >= 9 and len(modules) >= 20
    for layout in read:
        theirs = from_diffusers(lora, layout)
        assert detect(theirs) is layout
        ours = to_diffusers(theirs, layout)
        assert ours.tensors.keys() == lora.tensors.keys()
        assert all(ours.tensors[name] is lora.tensors[name] for name in lora.tensors)
        assert ours.alphas == (lora.alphas if layout.states_alpha else {})


@pytest.mark.parametrize(
    ("name", "layout", "ours"),
    [
        ("diffusion_model.blocks.7.attn_out.lora_up.weight", "comfyui", "transformer_blocks.7.attn1.to_out.0"),
        ("lora_unet_blocks_41_ff_proj.lora_down.weight", "kohya-comfyui", "transformer_blocks.41.ff.net.0.proj"),
        ("lora_unet_transformer_blocks_3_ff_net_2.lora_down.weight", "kohya", "transformer_blocks.3.ff.net.2"),
        ("lora_unet__transformer_blocks_3_attn1_to_k.lora_up.weight", "videox-fun", "transformer_blocks.3.attn1.to_k"),
        ("transformer_blocks.0.attn1.to_q.lora_A.default.weight", "bare", "transformer_blocks.0.attn1.to_q"),
        (
            "model.diffusion_model.transformer.layers.29.attention.query_key_value.matrix_B.2",
            "sat",
            "transformer_blocks.29.attn1.to_v",
        ),
        ("base_model.model.time_embedding.linear_1.lora_A.weight", "peft", "time_embedding.linear_1"),
        ("transformer.transformer_blocks.0.attn1.processor.to_q_lora.down.weight", None, None),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", None, None),
    ],
)
def test_a_name_is_known_and_belongs_to_one_layout(name, layout, ours):
    found = detect([name])
    assert (found and found.name) == layout
    if found:
        half = "A" if ("down" in name or "_A" in name) else "B"
        stem = {f"{ours}.lora_{half}.weight"}
        other = name.translate(str.maketrans("AB", "BA")).replace("lora_down", "lora_?").replace("lora_up", "lora_down")
        pair = {name: torch.ones(2, 2), other.replace("lora_?", "lora_up"): torch.ones(2, 2)}
        assert stem < to_diffusers(pair, found).tensors.keys() and is_lora(name)


@pytest.mark.parametrize("layers", [30, 42])
def test_sats_loras_have_eight_tensors_per_layer_and_count_one_over_rank(layers):
    names = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
    lora = lora_of([f"transformer_blocks.{i}.{name}" for i in range(layers) for name in names])
    theirs = from_diffusers(lora, LAYOUTS["sat"])
    assert len(theirs) == {30: 240, 42: 336}[layers]
    back = to_diffusers(theirs, LAYOUTS["sat"])
    assert set(back.alphas.values()) == {1.0}
    module = "transformer_blocks.1.attn1.to_v"
    torch.testing.assert_close(
        back.tensors[f"{module}.lora_B.weight"], 2.0 * lora.tensors[f"{module}.lora_B.weight"], rtol=0, atol=0
    )


def test_doras_magnitude_is_a_column_where_comfyui_reads_it():
    module = "transformer_blocks.0.attn1.to_q"
    lora = lora_of([module])
    lora = Lora({**lora.tensors, f"{module}.lora_magnitude_vector": torch.arange(16.0)}, lora.alphas)
    theirs = from_diffusers(lora, LAYOUTS["comfyui"])
    assert theirs["diffusion_model.blocks.0.q.dora_scale"].shape == (16, 1)
    back = to_diffusers(theirs, LAYOUTS["comfyui"])
    assert torch.equal(back.tensors[f"{module}.lora_magnitude_vector"], torch.arange(16.0))
    with pytest.raises(ConfigError, match="cannot express DoRA"):
        from_diffusers(lora, LAYOUTS["sat"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lora_unet_proj_out.lora_up.weight"), "proj_out lacks lora_B.weight"),
        (lambda t: t.update({"lora_te_encoder_block_0.lora_up.weight": torch.ones(2, 2)}), "1 of 4 tensors have no"),
        (lambda t: t.update({"lora_unet_proj_out.lora_up.weight": torch.ones(16, 3)}), r"\[4, 16\] and \[16, 3\]"),
        (lambda t: t.update({"lora_unet_proj_out.alpha": torch.ones(2)}), "alpha of proj_out is no single number"),
    ],
)
def test_a_lora_that_is_not_whole_is_refused(change, message):
    tensors = from_diffusers(lora_of(["proj_out"]), LAYOUTS["kohya"])
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        to_diffusers(tensors, LAYOUTS["kohya"])
