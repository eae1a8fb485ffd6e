"""A LoRA on top of others: these are merged into the base, and whoever uses what was trained is told of them."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_pipeline import load_pipeline
from test_export import LORA, exported_file, inputs, make_run
from worlds import fabricate_cache, run_values

from finetune import check, export, inspect
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.errors import CheckpointError, ConfigError
from finetune.core.files import LORA_FILE
from finetune.core.types import Bucket
from finetune.inference.adapters import (
    TRAINING_RECORD,
    AdapterSource,
    BaseAdapter,
    TrainingRecord,
    lacking_adapters,
)
from finetune.inference.generate import generate
from finetune.inference.record import read_video_record
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt
from finetune.memory.quantized_linear import placement
from finetune.methods.merged_base import load_base
from finetune.trainers import loop

STRENGTH = 0.5


@pytest.fixture(scope="module")
def style(tiny_model, tmp_path_factory) -> Path:
    """The file of a LoRA that changes the model much."""
    run = make_run(tmp_path_factory.mktemp("style"), tiny_model("5b"), LORA | {"ranks": {"to_q": 2}})
    return export(run).folder / LORA_FILE


def config_of(model: Path, run: Path, adapter: Path, *, steps: int = 4) -> RunConfig:
    values = run_values(
        model,
        run.parent / "no-videos-here",
        run,
        cache={"mode": "require"},
        method=LORA,
        optimizer={"lr": 3e-2},
        train={"steps": steps},
    )
    values["model"] |= {"adapters": [{"path": str(adapter), "strength": STRENGTH}]}
    return RunConfig.from_dict(values)


def fused(model: Path, adapter: Path):
    """The stock pipeline with an adapter in its weights."""
    pipeline = load_pipeline(str(model))
    pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name, adapter_name="before")
    pipeline.fuse_lora(components=["transformer"], lora_scale=STRENGTH, adapter_names=["before"])
    pipeline.unload_lora_weights()
    return pipeline


@torch.no_grad()
def velocity(transformer, model: Path) -> torch.Tensor:
    spec = read_spec(str(model))
    return denoise(transformer.eval(), spec, *inputs(spec))


@pytest.mark.parametrize("options", [{"ranks": {"to_q": 2}}, {"use_dora": True, "targets": "attention+ff"}], ids=str)
def test_a_merged_adapter_is_what_the_stock_pipeline_fuses(tiny_model, tmp_path, options):
    model = tiny_model("5b")
    file = export(make_run(tmp_path, model, LORA | options)).folder / LORA_FILE
    adapters = {"adapters": [{"path": str(file.parent), "strength": STRENGTH}]}
    on_top = export(make_run(tmp_path / "on-top", model, LORA | options, model={"pretrained": str(model), **adapters}))
    assert bool(on_top.command) is not options.get("use_dora", False)  # which generate refuses
    with_it = ModelConfig(pretrained=str(model), **adapters)
    ours, base = load_base(with_it), load_base(ModelConfig(pretrained=str(model)))
    theirs = velocity(fused(model, file).transformer, model)
    torch.testing.assert_close(velocity(ours, model), theirs, rtol=0, atol=1e-5)
    assert (theirs - velocity(base, model)).abs().max() > 0.01
    name = "transformer_blocks.1.attn1.to_v"
    quantised = load_base(with_it, placement=placement("fp8")).get_submodule(name).dequantised()
    weight = ours.get_submodule(name).weight
    assert (quantised - weight).norm() < 0.05 * weight.norm() < (weight - base.get_submodule(name).weight).norm()


def test_a_run_on_top_of_an_adapter_goes_on_and_is_exported_with_it(tiny_model, style, tmp_path):
    model, adapter = tiny_model("5b"), tmp_path / "style.safetensors"
    shutil.copyfile(style, adapter)
    whole = config_of(model, tmp_path / "whole", adapter)
    fabricate_cache(whole)
    loop.train(whole)
    loop.train(config_of(model, tmp_path / "parts", adapter, steps=2))
    moved = adapter.rename(tmp_path / "moved.safetensors")
    rest = config_of(model, tmp_path / "parts", moved)
    loop.train(rest)
    ends = [load_file(run.output_dir / "checkpoints/step-00000004/trainable.safetensors") for run in (whole, rest)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())

    folder = export(rest.output_dir).folder
    (needed,) = json.loads((folder / TRAINING_RECORD).read_text())["base_adapters"]
    assert (needed["name"], needed["strength"]) == (moved.name, STRENGTH)
    assert f"with {moved.name} at 0.5 merged in" in str(inspect(folder))
    card = (folder / "README.md").read_text()
    assert "on top of another LoRA" in card and needed["sha256"] in card and "lora_scale=0.5" in card
    pipeline = fused(model, moved)
    pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name="tuned")
    complete = export(rest.output_dir, layout="merged").folder  # needs no adapter: it is all in there
    theirs = velocity(load_base(ModelConfig(pretrained=str(complete))), model)
    torch.testing.assert_close(velocity(pipeline.transformer, model), theirs, rtol=0, atol=1e-5)
    assert json.loads((complete / TRAINING_RECORD).read_text())["base_adapters"] == []

    def sampled(name: str, *adapters: AdapterArgument, **options: Any):
        prompts = (VideoPrompt(prompt="a red ring", seed=5),)
        options = {"adapters": adapters, "num_inference_steps": 2, "guidance_scale": 3.0, **options}
        request = GenerateRequest(prompts, tmp_path / name, base=str(model), bucket=Bucket(9, 32, 48), **options)
        return generate(request).frames[0].astype(int)

    beside = sampled("beside", AdapterArgument(folder), AdapterArgument(moved, STRENGTH))
    assert abs(beside - sampled("whole", transformer=complete)).max() <= 1
    for name, others in (("none", ()), ("weak", (AdapterArgument(moved, 0.4),))):
        with pytest.raises(ConfigError, match=r"with moved.safetensors merged into it at strength 0.5"):
            sampled(name, AdapterArgument(rest.output_dir), *others)
    with pytest.raises(ConfigError, match=r"merged into it at strength 0.5"):
        sampled("steps", compare=rest.output_dir)
    sampled("columns", AdapterArgument(folder), AdapterArgument(moved, STRENGTH), compare=(0.0, 0.5))
    acting = {path.parent.name: read_video_record(path) for path in (tmp_path / "columns").glob("*/*.mp4")}
    of_base = AdapterArgument(moved.resolve(), STRENGTH)
    assert acting["base"].request.adapters == (of_base,)
    assert acting["strength-0-5"].request.adapters == (AdapterArgument(folder.resolve(), 0.5), of_base)

    shutil.copyfile(export(make_run(tmp_path / "c", model, LORA, step=5)).folder / LORA_FILE, moved)
    with pytest.raises(CheckpointError, match=r"model\.adapters: .*a part of the base model"):
        loop.train(rest)
    with pytest.raises(ConfigError, match="another than the one that this run began with"):
        export(rest.output_dir, tmp_path / "late")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "cannot be read|no such file"),
        (lambda file: file.write_bytes(b"no tensors"), "the adapter file cannot be read"),
        (lambda file: save_deeper(file, file), r"transformer_blocks\.9\..* have no place"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_encoded(
    tiny_model, style, tmp_path, spoil, message
):
    adapter = tmp_path / "style.safetensors"
    shutil.copyfile(style, adapter)
    config = config_of(tiny_model("5b"), tmp_path / "run", adapter)
    spoil(adapter)
    for verb in (check, loop.train):
        with pytest.raises(ConfigError, match=message):
            verb(config)
    assert not config.cache.dir.exists()


@pytest.mark.parametrize(
    ("merged", "beside", "is_enough"),
    [([0.5], [0.5], True), ([0.5], [0.4], False), ([1, 1], [1], False), ([1, 1], [1, 1], True), ([0], [], True)],
)
def test_a_file_named_twice_counts_by_its_sum(tmp_path, merged, beside, is_enough):
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"style")
    (tmp_path / "tuned").write_bytes(b"tuned")
    digest = sha256(b"style").hexdigest()
    record = TrainingRecord(base_adapters=[BaseAdapter(name="a", strength=one, sha256=digest) for one in merged])
    tuned, style = AdapterArgument(tmp_path / "tuned"), [AdapterArgument(file, strength) for strength in beside]
    sources = {one.path: AdapterSource(one, {}, record if one is tuned else None) for one in (tuned, *style)}
    assert is_enough is not any(lacking_adapters([tuned, *style], sources))


def save_deeper(file: Path, target: Path) -> None:
    """A LoRA of a model with more blocks."""
    save_file({name.replace("blocks.1.", "blocks.9."): tensor for name, tensor in load_file(file).items()}, target)


def test_another_layout_and_another_model_are_refused(tiny_model, style, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    file, _ = exported_file(run, "kohya")
    save_deeper(style, tmp_path / "deeper.safetensors")
    for path, message in (
        (file, "kohya's layout"),
        (tmp_path / "deeper.safetensors", r"transformer_blocks\.9\..* have no place"),
        (run / "checkpoints/step-00000003", "no file to share"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_base(ModelConfig(pretrained=str(tiny_model("5b")), adapters=[{"path": path}]))


@torch.no_grad()
def test_a_dora_is_merged_before_others_and_not_at_strength_0(tiny_model, style, tmp_path):
    """Then the sum is that of both files in one pipeline, which `generate` samples with."""
    model = tiny_model("5b")
    dora = export(make_run(tmp_path, model, LORA | {"use_dora": True, "targets": "attention"})).folder / LORA_FILE

    def merged(*adapters: tuple[Path, float]) -> torch.Tensor:
        named = [{"path": path, "strength": strength} for path, strength in adapters]
        return velocity(load_base(ModelConfig(pretrained=str(model), adapters=named)), model)

    pipeline = load_pipeline(str(model))
    for name, file in (("dora", dora), ("style", style)):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters(["dora", "style"], [1.0, STRENGTH])
    together = velocity(pipeline.transformer, model)
    torch.testing.assert_close(merged((dora, 1.0), (style, STRENGTH)), together, rtol=0, atol=1e-5)
    assert torch.equal(merged((dora, 0.0)), merged()) and torch.equal(
        merged((style, 1.0), (dora, 0.0)), merged((style, 1.0))
    )
    with pytest.raises(ConfigError, match="name it first"):
        merged((style, STRENGTH), (dora, 1.0))


def test_a_check_reads_what_a_run_begins_with(tiny_model, tmp_path):
    method = LORA | {"init_from": str(tmp_path / "away")}
    with pytest.raises(ConfigError, match="no such file or folder"):
        check(run_values(tiny_model("5b"), tmp_path / "no-videos-here", tmp_path / "run", method=method))
