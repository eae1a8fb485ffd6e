"""What other trainers and programs wrote, converted: names in both directions, scales, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sat_model
import torch
import yaml
from safetensors.torch import load_file, save_file
from stock_pipeline import latents_of, load_pipeline
from torch import nn

from finetune import convert
from finetune.cli.main import main
from finetune.cogvideox.denoise import OFS, denoise, rotary_table
from finetune.cogvideox.load import empty_component, sine_positions
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.cogvideox.spec import read_spec
from finetune.conversion import convert as convert_module
from finetune.conversion import pipelines
from finetune.conversion.checkpoint_files import named_tensors
from finetune.conversion.lora_layouts import LAYOUTS, Lora, detect, from_diffusers, is_lora, to_diffusers
from finetune.conversion.sat import POSITIONS, PREFIXES, from_sat, to_sat
from finetune.conversion.structure import model_of
from finetune.conversion.torch_files import write_torch_file
from finetune.core.errors import ConfigError, ExportError, ModelError
from finetune.core.files import is_complete
from finetune.core.tensor_files import Deferred, content_of
from finetune.methods.lora import LoraMethod
from finetune.testing.tiny import VARIANTS, tiny_transformer

# ------------------------------------------------------------------------------------------- names of a LoRA's tensors


def lora_of(modules, rank=4, alpha=2.0, width=16):
    """A random LoRA by our names, of square layers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
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


@pytest.mark.parametrize("layout", ["sat", "comfyui", "kohya", "videox-fun"])
def test_a_dora_is_written_only_where_it_is_read_as_peft_has_it(layout):
    module = "transformer_blocks.0.attn1.to_q"
    lora = lora_of([module])
    lora = Lora({**lora.tensors, f"{module}.lora_magnitude_vector": torch.arange(16.0)}, lora.alphas)
    with pytest.raises(ConfigError, match="cannot express a DoRA"):
        from_diffusers(lora, LAYOUTS[layout])


@pytest.mark.parametrize(
    ("scale", "fits"), [((16,), True), ((16, 1), True), ((1, 16), False), ((), False), ((8,), False)]
)
def test_magnitudes_of_outputs_are_read_and_those_of_inputs_refused(scale, fits):
    """The layer is square: nothing but their form tells whose they are."""
    module = "transformer_blocks.0.attn1.to_q"
    theirs = from_diffusers(lora_of([module]), LAYOUTS["comfyui"])
    theirs["diffusion_model.blocks.0.q.dora_scale"] = magnitudes = torch.rand(scale)
    if fits:
        read = to_diffusers(theirs, LAYOUTS["comfyui"]).tensors[f"{module}.lora_magnitude_vector"]
        assert torch.equal(read, magnitudes.flatten())
    else:
        with pytest.raises(ConfigError, match=r"not one for each of its 16 outputs"):
            to_diffusers(theirs, LAYOUTS["comfyui"])


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


# ---------------------------------------------------------------------------------------------- a LoRA of any trainer's

ATTENTION = [f"transformer_blocks.{i}.attn1.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v", "to_out.0")]


def update_of(model: Path, module: str, adapter: Path) -> torch.Tensor:
    """What the stock pipeline adds to a layer's weight with an adapter: its scale times B A."""
    pipeline = load_pipeline(str(model), adapter=str(adapter))
    layer = pipeline.transformer.get_submodule(module)
    with torch.no_grad():
        return layer.scaling["tuned"] * layer.lora_B["tuned"].weight @ layer.lora_A["tuned"].weight


def theirs(layout: str, path: Path, alpha: float, **metadata: str) -> Path:
    """A LoRA of rank 4 as another program writes it; ``metadata`` is its header's."""
    tensors = {
        name: t.contiguous()
        for name, t in from_diffusers(lora_of(ATTENTION, width=64, alpha=alpha), LAYOUTS[layout]).items()
    }
    if layout.startswith("sat"):
        torch.save(
            {"module": {**tensors, "model.diffusion_model.transformer.layers.0.mlp.dense_4h_to_h.bias": torch.ones(3)}},
            path,
        )
    else:
        save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("layout", "name", "beside", "options"),
    [
        ("kohya", "a.safetensors", {}, {}),
        ("comfyui", "a.safetensors", {}, {}),
        ("kohya-comfyui", "a.safetensors", {}, {}),
        ("sat", "mp_rank_00_model_states.pt", {}, {}),
        ("diffusers", "a.safetensors", {"lora_config": json.dumps({"r": 4, "lora_alpha": 2})}, {}),
        ("peft", "adapter_model.safetensors", {}, {}),
        ("bare", "adapter_model.safetensors", {}, {"alpha": 2}),
        ("videox-fun", "a.safetensors", {}, {"alpha": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_trainers_loras_count_as_they_were_trained(layout, name, beside, options, tiny_model, tmp_path):
    model = tiny_model("5b")
    source = theirs(layout, tmp_path / name, 2.0, **beside)
    if layout == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    report = convert(source, tmp_path / "out", model=model, **options)
    lora = lora_of(ATTENTION, width=64)
    for module in (ATTENTION[1], ATTENTION[-1]):
        expected = 2 / 4 * lora.tensors[f"{module}.lora_B.weight"] @ lora.tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(update_of(model, module, tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    assert "8 layers, largest difference of an update" in str(report)
    settings = re.search(r"to train it further: method: (.*)", str(report))[1]
    method = LoraMethod.model_validate(
        yaml.safe_load(settings)["method"] if "method" in settings else yaml.safe_load(settings)
    )
    transformer = tiny_transformer("5b")
    method.apply(transformer, seed=0)  # refuses what does not fit
    assert method.targets == "attention" and method.scaling == (1 / 4 if layout == "sat" else 2 / 4)


def test_a_scale_that_stands_nowhere_is_asked_for_and_never_guessed(tiny_model, tmp_path):
    model = tiny_model("5b")
    for layout in ("diffusers", "bare", "videox-fun", "diffusion-model"):
        with pytest.raises(ConfigError, match=r"its scale stands nowhere: .*rank is 4") as caught:
            convert(theirs(layout, tmp_path / "a.safetensors", 2.0), tmp_path / "out", model=model)
        assert "--alpha NUMBER" in caught.value.fix and "64" in caught.value.fix
    with pytest.raises(ConfigError, match=r"the file's alpha is 2 \(in its tensors\)"):
        convert(theirs("kohya", tmp_path / "a.safetensors", 2.0), tmp_path / "out", model=model, alpha=64)


def test_layers_of_several_alphas_and_ranks_keep_their_scales(tiny_model, tmp_path):
    model = tiny_model("5b")
    lora = lora_of(ATTENTION, width=64)
    alphas = {**lora.alphas, ATTENTION[0]: 3.0}
    save_file(from_diffusers(Lora(lora.tensors, alphas), LAYOUTS["kohya"]), tmp_path / "alphas.safetensors")
    report = convert(tmp_path / "alphas.safetensors", tmp_path / "one", model=model)
    assert "1 layers had another alpha" in str(report) and "to train it further" in str(report)
    wide = lora_of([ATTENTION[0]], rank=6, width=64).tensors
    save_file(from_diffusers(Lora({**lora.tensors, **wide}, alphas), LAYOUTS["kohya"]), tmp_path / "ranks.safetensors")
    report = convert(tmp_path / "ranks.safetensors", tmp_path / "two", model=model)
    method = LoraMethod.model_validate(yaml.safe_load(re.search(r"further: method: (.*)", str(report))[1]))
    assert (method.rank, method.alpha, method.ranks) == (4, 2, {ATTENTION[0]: 6})
    method.apply(tiny_transformer("5b"), seed=0)  # refuses what does not fit
    for folder, tensors, rank in (("one", lora.tensors, 4), ("two", wide, 6)):
        expected = 3 / rank * tensors[f"{ATTENTION[0]}.lora_B.weight"] @ tensors[f"{ATTENTION[0]}.lora_A.weight"]
        torch.testing.assert_close(update_of(model, ATTENTION[0], tmp_path / folder), expected, rtol=1e-5, atol=1e-5)


def test_a_lora_goes_to_sat_with_its_scale_in_its_tensors(tiny_model, tmp_path):
    model = tiny_model("5b")
    convert(theirs("kohya", tmp_path / "a.safetensors", 2.0), tmp_path / "sat", model=model, to="sat")
    again = convert(tmp_path / "sat", tmp_path / "out", model=model)
    assert "SAT's layout" in again.kind
    lora = lora_of(ATTENTION, width=64)
    expected = 2 / 4 * lora.tensors[f"{ATTENTION[2]}.lora_B.weight"] @ lora.tensors[f"{ATTENTION[2]}.lora_A.weight"]
    torch.testing.assert_close(update_of(model, ATTENTION[2], tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def test_what_a_lora_fits_is_told_by_its_layers(tiny_model, tmp_path):
    modules = [f"transformer_blocks.{i}.attn1.to_q" for i in range(42)]
    save_file(from_diffusers(lora_of(modules, width=3072), LAYOUTS["kohya"]), tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "out", dtype="bf16")
    assert "its layers are those of CogVideoX 5b or 5b-i2v or 1.5-5b" in str(report)
    assert {t.dtype for t in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors").values()} == {
        torch.bfloat16
    }
    with pytest.raises(ConfigError, match=r"of another model than 2b: .*\[3072, 3072\]"):
        convert(tmp_path / "a.safetensors", tmp_path / "other", model="2b")
    with pytest.raises(ConfigError, match="no published CogVideoX has such layers") as caught:
        convert(theirs("kohya", tmp_path / "tiny.safetensors", 2.0), tmp_path / "other")
    assert "--model FOLDER" in caught.value.fix
    save_file(
        {"lycoris_blocks_0.lokr_w1": torch.ones(2, 2), "a.lora_A.weight": torch.ones(2, 2)},
        tmp_path / "lokr.safetensors",
    )
    with pytest.raises(ConfigError, match="LyCORIS"):
        convert(tmp_path / "lokr.safetensors", tmp_path / "other")


def test_a_lora_that_is_written_wrongly_is_not_published(tiny_model, tmp_path, monkeypatch):
    """Canary of the comparison: a writer that loses the scale."""
    right = convert_module.write_own

    def without_scale(folder: Path, lora: Lora, *arguments: Any) -> None:
        right(folder, replace(lora, alphas={module: float(rank) for module, rank in lora.ranks.items()}), *arguments)

    monkeypatch.setattr(convert_module, "write_own", without_scale)
    with pytest.raises(ExportError, match=r"the update of .* differs by 1 of its size"):
        convert(theirs("kohya", tmp_path / "a.safetensors", 2.0), tmp_path / "out", model=tiny_model("5b"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- SAT


def state_of(folder: Path, component: str = "transformer") -> dict[str, torch.Tensor]:
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    return load_file(folder / component / f"{stem}.safetensors")


def sat_of(folder: Path) -> dict[str, torch.Tensor]:
    """The transformer of a diffusers folder as a SAT file holds it, with the sines of a model that computes them."""
    tensors = state_of(folder)
    module = empty_component(folder, "transformer", torch.float32)
    if module.patch_embed.use_positional_embeddings:
        tensors[POSITIONS] = sine_positions(module)
    named = to_sat("transformer", tensors)
    # diffusers stores learned positions as float64, which it made them in.
    return {PREFIXES["transformer"] + name: content_of(tensor).float() for name, tensor in named.items()}


@pytest.fixture
def training_checkpoint(tiny_model, tmp_path):
    """``training_checkpoint("5b")``: what a training in SAT saves, all three components in a file, and more."""

    def build(variant: str = "5b", change: Any = None) -> Path:
        base = tiny_model(variant)
        tensors = sat_of(base)
        for component in ("vae", "text_encoder"):
            own = state_of(base, component)
            theirs = (
                to_sat(component, own)
                if component == "vae"
                else {**own, "encoder.embed_tokens.weight": own["shared.weight"]}
            )
            tensors |= {PREFIXES[component] + name: content_of(tensor).clone() for name, tensor in theirs.items()}
        tensors |= {"denoiser.sigmas": torch.ones(1000), "first_stage_model.loss.logvar": torch.ones(1)}
        tensors[f"{PREFIXES['transformer']}mixins.pos_embed.freqs_sin"] = torch.ones(4, 4)
        if change is not None:
            change(tensors)
        folder = tmp_path / "sat" / "1000"
        folder.mkdir(parents=True)
        torch.save({"iteration": 1000, "module": tensors}, folder / "mp_rank_00_model_states.pt")
        (folder.parent / "latest").write_text("1000")
        return folder.parent

    return build


@pytest.mark.parametrize("variant", VARIANTS)
def test_sats_own_arithmetic_on_its_names_is_what_diffusers_computes(variant, tiny_model):
    spec = read_spec(str(tiny_model(variant)))
    module = load_pipeline(str(tiny_model(variant))).transformer
    generator = torch.Generator().manual_seed(1)
    frames, height, width = (3 if spec.patch_size_t is None else 4), 8, 8
    latents = torch.randn(2, spec.latent_channels, frames, height, width, generator=generator)
    text = torch.randn(2, spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
    image = torch.randn(2, spec.latent_channels, 1, height, width, generator=generator) if spec.image_to_video else None
    timesteps = torch.tensor([17, 801])
    with torch.no_grad():
        theirs = denoise(module, spec, latents, text, timesteps, image)
        seen = latents.transpose(1, 2)
        if image is not None:
            condition = torch.zeros_like(latents)
            condition[:, :, :1] = image
            seen = torch.cat([seen, condition.transpose(1, 2)], dim=2)
        ours = sat_model.velocity(
            sat_of(tiny_model(variant)),
            seen,
            text,
            timesteps,
            heads=spec.num_attention_heads,
            rotary=rotary_table(spec, frames, height, width, device=torch.device("cpu")) if spec.use_rotary else None,
            ofs=torch.full((2,), OFS) if spec.ofs_embed_dim else None,
        )
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_to_sat_and_back_is_the_same_pipeline(variant, tiny_model, tmp_path):
    base = tiny_model(variant)
    there = convert(base, tmp_path / "sat", to="sat")
    assert {"transformer/1/mp_rank_00_model_states.pt", "vae/3d-vae.pt", "t5-v1_1-xxl/config.json"} < {*there.files}
    back = convert(tmp_path / "sat", tmp_path / "back", model=base)
    assert [line.split(":")[0] for line in back.comparisons] == ["transformer", "vae"]
    for component in ("transformer", "vae"):
        ours, theirs = state_of(tmp_path / "back", component), state_of(base, component)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        settings = [
            json.loads((folder / component / "config.json").read_text()) for folder in (base, tmp_path / "back")
        ]
        settings[0].pop("_name_or_path", None)
        assert settings[0] == settings[1]
    if variant == "5b-i2v":  # samples as the model that it was
        outputs = [latents_of(load_pipeline(str(folder))) for folder in (base, tmp_path / "back")]
        assert torch.equal(*outputs)


def test_a_transformer_alone_goes_to_sat_under_any_name(tiny_model, tmp_path):
    shutil.copytree(tiny_model("2b") / "transformer", tmp_path / "mine")
    report = convert(tmp_path / "mine", tmp_path / "sat", to="sat", model=tiny_model("2b"))
    assert [line.split(":")[0] for line in report.comparisons] == ["transformer"]
    stored = named_tensors(tmp_path / "sat" / "transformer" / "1" / "mp_rank_00_model_states.pt")
    ours = sat_of(tiny_model("2b"))
    assert stored.keys() == ours.keys() and all(torch.equal(content_of(stored[name]), ours[name]) for name in ours)


@pytest.mark.parametrize("variant", KNOWN_MODELS)
def test_which_published_model_it_is_follows_from_full_size_shapes_alone(variant):
    components = {}
    for component in ("transformer", "vae"):
        own = empty_component(known_model(variant), component, torch.bfloat16).state_dict()
        theirs = {PREFIXES[component] + name: tensor for name, tensor in to_sat(component, own).items()}
        components |= from_sat(theirs, "").components
        assert {n: tuple(t.shape) for n, t in components[component].items()} == {
            n: tuple(t.shape) for n, t in own.items()
        }
    shapes = {name: {key: tuple(t.shape) for key, t in part.items()} for name, part in components.items()}
    found = model_of(shapes, None, "")
    assert found == known_model(variant)
    config = json.loads((found / "transformer" / "config.json").read_text())
    if variant.startswith("1.5"):
        assert (config["sample_height"], config["sample_width"], config["max_text_seq_length"]) == (300, 300, 224)
    with pytest.raises(ModelError, match=r"of another model than .*: .*num_layers|in_channels|ofs_embed_dim"):
        model_of(shapes, "2b" if variant != "2b" else "5b", "")


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_the_checkpoint_of_a_training_gives_all_three_components(dtype, training_checkpoint, tiny_model, tmp_path):
    base = tiny_model("2b")
    report = convert(training_checkpoint("2b"), tmp_path / "out", model=base, dtype=dtype)
    assert [line.split(":")[0] for line in report.comparisons] == ["transformer", "vae", "text_encoder"]
    assert "denoiser.sigmas" in str(report) and "finetune generate --model" in report.command
    for component in ("transformer", "vae", "text_encoder"):
        source, written = state_of(base, component), state_of(tmp_path / "out", component)
        assert {tensor.dtype for tensor in written.values()} == {torch.float16 if dtype else torch.float32}
        assert all(torch.equal(tensor, source[name].to(tensor.dtype)) for name, tensor in written.items())
    if dtype is None:
        assert torch.equal(*(latents_of(load_pipeline(str(folder))) for folder in (base, tmp_path / "out")))


def test_a_dtype_can_be_asked_for_and_what_lacks_is_said(training_checkpoint, tiny_model, tmp_path):
    def transformer_alone(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith(PREFIXES["transformer"])]:
            del tensors[name]

    # JSON without weights: nothing stands in for what the source lacks.
    shutil.copytree(
        tiny_model("1.5-5b-i2v"), tmp_path / "json", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*")
    )
    report = convert(
        training_checkpoint("1.5-5b-i2v", transformer_alone), tmp_path / "out", model=tmp_path / "json", dtype="bf16"
    )
    assert {tensor.dtype for tensor in state_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert "the source has no" in str(report) and "--transformer" in report.command
    assert not (tmp_path / "out" / "model_index.json").exists()


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_tensor_at_a_time_is_in_memory(tiny_model, tmp_path, monkeypatch):
    """Both directions of a transformer of 200 MB, measured whenever a tensor is made."""
    monkeypatch.setattr(pipelines, "_SHARD_BYTES", 80_000_000)
    shutil.copytree(tiny_model("5b"), tmp_path / "json", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tmp_path / "json" / "transformer" / "config.json").read_text())
    config |= {"num_layers": 4, "num_attention_heads": 64}
    (tmp_path / "json" / "transformer" / "config.json").write_text(json.dumps(config))
    measured: list[int] = []

    def watched(tensor: torch.Tensor | Deferred) -> Deferred:
        def make() -> torch.Tensor:
            measured.append(anonymous_memory())
            return content_of(tensor) if tensor.dtype == torch.bfloat16 else torch.ones(tensor.shape)

        return Deferred(tensor.dtype, tuple(tensor.shape), make)

    def written(write: Any, folder: str, tensors: dict[str, Any]) -> int:
        (tmp_path / folder).mkdir()
        before = anonymous_memory()
        measured.clear()
        model = pipelines.Model({"transformer": tensors}, tmp_path / "json", read_spec(str(tmp_path / "json")), "")
        write(tmp_path / folder, model)
        return max(measured) - before

    own = empty_component(tmp_path / "json", "transformer", torch.float32).state_dict()
    peaks = [written(pipelines.write_sat, "sat", {name: watched(tensor) for name, tensor in own.items()})]
    stored = from_sat(named_tensors(tmp_path / "sat" / "transformer" / "1" / "mp_rank_00_model_states.pt"), "")
    halves = pipelines.cast(stored.components["transformer"], torch.bfloat16)
    peaks.append(written(pipelines.write_diffusers, "out", {name: watched(tensor) for name, tensor in halves.items()}))
    largest = max(tensor.numel() * 4 for tensor in own.values())
    whole = sum(tensor.numel() * 4 for tensor in own.values())
    assert all(peak < 4 * largest < whole / 3 for peak in peaks), (peaks, largest, whole)
    index = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert named_tensors(index).keys() == own.keys() and len(list(index.parent.glob("*-of-0000*.safetensors"))) == 2


# --------------------------------------------------------------------------------------- shares of several processes


class ZeroStageEnum:
    """Stands for DeepSpeed's, which is not installed where the file is read."""

    def __reduce__(self):
        return ZeroStageEnum, ()


def saved_by_deepspeed(value: Any, path: Path) -> None:
    """``torch.save`` where ``ZeroStageEnum`` is DeepSpeed's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZeroStageEnum, "__module__", "deepspeed")
        patch.setitem(sys.modules, "deepspeed", SimpleNamespace(ZeroStageEnum=ZeroStageEnum))
        torch.save(value, path)


def zero_checkpoint(model: Path, folder: Path, stage: int, processes: int = 3, prefix: str = "", **extra: Any) -> Path:
    """What DeepSpeed saves of a transformer of which the first layer is frozen, by the rules of zero_to_fp32.py."""
    tensors = {prefix + name: tensor.float() for name, tensor in (state_of(model) | extra).items()}
    frozen = {name: t for name, t in tensors.items() if "patch_embed.proj" in name}
    buffers = {name: t for name, t in tensors.items() if "pos_embedding" in name}
    names = [name for name in tensors if name not in frozen and name not in buffers]
    groups = [names[::2], names[1::2]]
    share = folder / "pytorch_model"
    share.mkdir(parents=True)
    (folder / "latest").write_text("pytorch_model")

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        flat = tensor.flatten()
        padded = torch.cat([flat, torch.full((-len(flat) % processes,), torch.nan)])
        return list(padded.chunk(processes))

    for rank in range(processes):
        if stage == 3:
            key, flat = (
                "fp32_flat_groups",
                [torch.cat([parts(tensors[name])[rank] for name in each]) for each in groups],
            )
            fragments = {name: parts(t)[rank] for name, t in frozen.items()}
        else:
            whole = [torch.cat([tensors[name].flatten() for name in each]) for each in groups]
            padding = [torch.full((-len(each) % (2 * processes),), torch.nan) for each in whole]
            key = "single_partition_of_fp32_groups"
            flat = [
                torch.cat([each, fill]).chunk(processes)[rank].clone()
                for each, fill in zip(whole, padding, strict=True)
            ]
            fragments = frozen
        states = {"zero_stage": ZeroStageEnum(), "partition_count": processes, key: flat, "ds_version": "0.17"}
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        saved_by_deepspeed({"optimizer_state_dict": states}, share / f"bf16_{name}_optim_states.pt")
        content = {
            "module": {name: t.bfloat16() for name, t in buffers.items()}
            if stage == 3
            else {n: t.bfloat16() for n, t in tensors.items()},
            "buffer_names": [*buffers],
            "param_shapes": [{name: tensors[name].shape for name in each} for each in groups],
            "frozen_param_shapes": {name: t.shape for name, t in frozen.items()},
            "frozen_param_fragments": fragments,
            "shared_params": {},
            "ds_config": {"zero_optimization": {"stage": stage}},
        }
        if stage == 3 or rank == 0:
            torch.save(content, share / (f"{name}_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"))
    return folder


@pytest.mark.parametrize(("stage", "variant"), [(2, "5b"), (3, "5b-i2v"), (3, "1.5-5b")])
def test_deepspeeds_shares_are_the_float32_weights_of_the_optimizer(stage, variant, tiny_model, tmp_path):
    model = tiny_model(variant)
    source = zero_checkpoint(model, tmp_path / "checkpoint-3", stage, prefix="module.")
    for folder, path in (("out", source), ("inner", source / "pytorch_model")):
        report = convert(path, tmp_path / folder, model=model, dtype="fp32")
        assert "(ZeRO)" in report.kind
    for name, tensor in state_of(model).items():
        if "pos_embedding" not in name:  # a buffer, which DeepSpeed holds in the model's dtype
            assert torch.equal(state_of(tmp_path / "out")[name], tensor), name
    (source / "pytorch_model" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ModelError, match="3 processes wrote the checkpoint, and files of 2 are here"):
        convert(source, tmp_path / "other", model=model)


def test_a_lora_in_deepspeeds_shares_is_one(tiny_model, tmp_path):
    lora = lora_of(ATTENTION, width=64)
    extra = {name.replace(".weight", ".default.weight"): tensor for name, tensor in lora.tensors.items()}
    source = zero_checkpoint(tiny_model("5b"), tmp_path / "zero", 2, prefix="module.", **extra)
    with pytest.raises(ConfigError, match="its scale stands nowhere"):
        convert(source, tmp_path / "out", model=tiny_model("5b"))
    convert(source, tmp_path / "out", model=tiny_model("5b"), alpha=2)
    expected = 2 / 4 * lora.tensors[f"{ATTENTION[2]}.lora_B.weight"] @ lora.tensors[f"{ATTENTION[2]}.lora_A.weight"]
    torch.testing.assert_close(
        update_of(tiny_model("5b"), ATTENTION[2], tmp_path / "out"), expected, rtol=1e-5, atol=1e-5
    )


def test_shares_of_torchs_own_checkpoints_become_one_folder(launcher, tiny_model, tmp_path):
    model = tiny_model("1.5-5b-i2v")
    ends = launcher.run("launcher_cases:shares_of_dcp", str(model), str(tmp_path / "dcp"))
    assert [end.code for end in ends] == [0, 0], ends[0].log
    report = convert(tmp_path / "dcp", tmp_path / "out", model=model)
    assert "(DCP)" in report.kind and "exp_avg" in str(report)
    assert all(torch.equal(state_of(tmp_path / "out")[name], tensor) for name, tensor in state_of(model).items())
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "dcp").rename(tmp_path / "accelerate" / "pytorch_model_fsdp_0")
    share = tmp_path / "accelerate" / "pytorch_model_fsdp_0"
    (share / "__1_0.distcp").rename(share / "elsewhere")
    with pytest.raises(ModelError, match=r"1 of its 2 files are missing: __1_0\.distcp"):
        convert(tmp_path / "accelerate", tmp_path / "other", model=model)
    for content, message in (
        (pickle.dumps(Trap()), r"would run code when it is unpickled, and is not read: it names posix\.system"),
        (pickle.dumps({"a": 1}), r"the table of contents \(\.metadata\) cannot be read"),
        ((share / ".metadata").read_bytes()[:200], r"cannot be read"),
    ):
        (share / ".metadata").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            convert(tmp_path / "accelerate", tmp_path / "other", model=model)
    assert not Path("sprung").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model_fsdp.bin", "pytorch_model.bin.index.json"])
def test_weights_without_their_json_become_a_transformer(file, tiny_model, tmp_path):
    """What CogVideo's finetune/ leaves of a full fine-tuning, accelerate of FSDP, and zero_to_fp32.py of ZeRO."""
    model = tiny_model("2b")
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in state_of(model).items()}
    folder = tmp_path / "checkpoint-200"
    folder.mkdir()
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    elif file.endswith(".json"):
        halves = [dict([*tensors.items()][:30]), dict([*tensors.items()][30:])]
        for index, half in enumerate(halves):
            torch.save(half, folder / f"{index}.bin")
        weight_map = {name: f"{index}.bin" for index, half in enumerate(halves) for name in half}
        (folder / file).write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / file)
    report = convert(folder, tmp_path / "out", model=model)
    assert all(torch.equal(state_of(tmp_path / "out")[name], tensor) for name, tensor in state_of(model).items())
    assert "--model" in report.command


# ------------------------------------------------------------------------------------------------------------ the page


def test_every_command_of_the_page_runs(tiny_model, training_checkpoint, tmp_path, monkeypatch, capsys):
    base = tiny_model("5b")
    training_checkpoint("5b").rename(tmp_path / "CogVideoX-5b-sat")
    zero_checkpoint(base, tmp_path / "checkpoint-200", 2)
    save_file(state_of(base), tmp_path / "checkpoint-200" / "model.safetensors")
    theirs("kohya", tmp_path / "their-lora.safetensors", 2.0)
    theirs("diffusers", tmp_path / "pytorch_lora_weights.safetensors", 2.0)
    page = (Path(__file__).parents[1] / "docs" / "convert.md").read_text(encoding="utf-8")
    lines = [shlex.split(line) for line in re.findall(r"`(finetune convert (?!SOURCE)[^`]+)`", page)]
    assert len(lines) >= 8
    monkeypatch.chdir(tmp_path)
    for words in lines:
        out = Path(words[words.index("--out") + 1])
        if out.exists():
            shutil.rmtree(out)
        if words[2] == "CogVideoX-5b":
            shutil.rmtree(words[2], ignore_errors=True)
            shutil.copytree(base, words[2])
        elif "--model" in words:
            words[words.index("--model") + 1] = str(base)
        else:  # no published model has a tiny one's shapes
            words += ["--model", str(base)]
        assert main(words[1:]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert "loaded again and compared:" in printed and is_complete(out), printed


# ------------------------------------------------------------------------------------------------------ hostile sources


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def _without(name: str):
    return lambda tensors: tensors.pop(PREFIXES["transformer"] + name)


def _with(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({PREFIXES["transformer"] + name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("transformer.layers.1.attention.dense.bias"),
            r"1 weights are missing, such as .*1\.attn1\.to_out\.0\.bias",
        ),
        (_without("transformer.final_layernorm.weight"), r"norm_final\.weight is missing"),
        (_with("mixins.control.0.weight", torch.ones(2)), r"1 tensors of the transformer are none .*mixins\.control"),
        (_with("time_embed.2.weight", torch.ones(3, 3)), r"1 weights are of another shape, such as time_embedding"),
        (_with("transformer.layers.0.attention.query_key_value.bias", torch.ones(10)), "cannot be cut into 3"),
        (_with("mixins.pos_embed.pos_embedding", torch.ones(1, 64, 64)), "has a table of positions, and a model of"),
        (lambda tensors: tensors.clear() or tensors.update({"a.weight": torch.ones(2)}), "no tensors of a CogVideoX"),
    ],
)
def test_a_checkpoint_that_is_no_cogvideox_is_refused_before_anything_is_written(
    change, message, training_checkpoint, tiny_model, tmp_path
):
    with pytest.raises(ModelError, match=message):
        convert(training_checkpoint("5b", change), tmp_path / "out", model=tiny_model("5b"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_positions_that_are_not_diffusers_sines_are_refused(training_checkpoint, tiny_model, tmp_path):
    def stretched(tensors: dict[str, torch.Tensor]) -> None:
        tensors[PREFIXES["transformer"] + "mixins.pos_embed.pos_embedding"] *= 1.1

    with pytest.raises(ModelError, match="not the sines that diffusers computes"):
        convert(training_checkpoint("2b", stretched), tmp_path / "out", model=tiny_model("2b"))


def test_a_model_of_other_widths_has_to_be_named(training_checkpoint, tmp_path):
    with pytest.raises(ModelError, match=r"no published CogVideoX has these shapes: 2 layers, 4 heads of 16") as caught:
        convert(training_checkpoint("5b"), tmp_path / "out")
    assert "--model FOLDER" in caught.value.fix


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unpickled_code(path: Path) -> None:
    torch.save({"module": {"a": torch.ones(2)}, "more": Trap()}, path)


def old_form(path: Path) -> None:
    torch.save({"module": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)


def nothing(path: Path) -> None:
    torch.save({"step": 3}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "cannot be read as one of torch.save"),
        (unpickled_code, r"would run code when it is unpickled, and is not read: it names posix\.system"),
        (old_form, "cannot be read as one of torch.save"),
        (nothing, "holds no named tensors"),
    ],
)
def test_a_file_that_is_damaged_or_hostile_is_refused(damage, message, training_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = training_checkpoint("5b")
    damage(source / "1000" / "mp_rank_00_model_states.pt")
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


def test_what_is_no_source_or_has_no_place_is_said_at_once(tiny_model, training_checkpoint, tmp_path, monkeypatch):
    base, source = tiny_model("5b"), training_checkpoint("5b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    save_file({"a.lora_A.weight": torch.ones(4, 4)}, tmp_path / "cut.safetensors")
    truncated(tmp_path / "cut.safetensors")
    (source / "1000" / "mp_rank_01_model_states.pt").touch()
    for arguments, kind, message in (
        ((base, "out"), ConfigError, "in diffusers' format already"),
        ((tmp_path / "nowhere", "out"), ConfigError, "no such file or folder"),
        ((tmp_path / "empty", "out"), ConfigError, "holds no checkpoint that is known"),
        ((tmp_path / "notes.txt", "out"), ConfigError, "no file of weights"),
        ((tmp_path / "run", "out"), ConfigError, "a run of this package's"),
        ((tmp_path / "cut.safetensors", "out"), ModelError, "the file cannot be read"),
        ((source, "out"), ModelError, "split over 2 files by model parallelism"),
        ((base / "transformer", "full", "sat"), ExportError, "is not empty"),
    ):
        with pytest.raises(kind, match=message):
            convert(arguments[0], tmp_path / arguments[1], to=arguments[2] if arguments[2:] else "diffusers")
    (tmp_path / "one").mkdir()  # a folder is its only file of weights, whatever that is called
    shutil.copy(tmp_path / "cut.safetensors", tmp_path / "one" / "kohya-style.safetensors")
    with pytest.raises(ModelError, match="the file cannot be read"):
        convert(tmp_path / "one", tmp_path / "out")
    monkeypatch.setattr("finetune.core.files.free_space", lambda _: 1000)
    with pytest.raises(ExportError, match=r"the conversion needs .* MiB and the disk has 0\.001 MiB free"):
        convert(base, tmp_path / "out", to="sat")
    assert not (tmp_path / "out").exists()


def test_what_is_written_wrongly_is_not_published(tiny_model, tmp_path, monkeypatch):
    """Canary of the comparison: a writer that loses a tensor's content."""

    def wrong(path: Path, tensors: dict[str, Any], *within: str) -> None:
        name = "model.diffusion_model.transformer.layers.0.attention.dense.weight"
        if name in tensors:
            tensors = {**tensors, name: torch.zeros(tensors[name].shape)}
        write_torch_file(path, tensors, *within)

    monkeypatch.setattr(pipelines, "write_torch_file", wrong)
    with pytest.raises(
        ExportError, match=r"not the source's, and was deleted: 1 of 64 tensors differ, such as .*to_out"
    ):
        convert(tiny_model("5b"), tmp_path / "out", to="sat")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))
