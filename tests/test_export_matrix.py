"""Every method in every layout, in a fresh process, through the stock pipeline: what comes out is what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stock_pipeline import latents_of, load_pipeline
from test_export import FULL, LORA, WEIGHTS, inputs, make_run, nothing_left, one_number, tamper
from waiting import HANG_S
from worlds import fabricate_cache, run_config

from finetune import export
from finetune.cli import main
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import ModelConfig, load_transformer
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ExportError
from finetune.core.types import Bucket
from finetune.inference.adapters import TRAINING_RECORD
from finetune.inference.generate import generate
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt
from finetune.methods import lora as merging
from finetune.methods.lora import ADAPTER, LoraMethod, merge, set_strength
from finetune.testing.tiny import VARIANTS
from finetune.trainers import loop
from finetune.trainers.run import Run

METHODS = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 2, "targets": "attention+ff", "ranks": {"ff.net.2": 6}},
    "dora": {"kind": "lora", "rank": 4, "alpha": 2, "use_dora": True},
    "rslora": {"kind": "lora", "rank": 8, "alpha": 4, "use_rslora": True, "targets": "all-linear"},
    "full": {"kind": "full"},
}
FAST = [("5b", "dora"), ("5b", "rslora"), ("1.5-5b-i2v", "lora"), ("5b-i2v", "full")]
REST = [(variant, method) for variant in VARIANTS for method in METHODS if (variant, method) not in FAST]
ROUND_OFF = 1e-5
"""Of the largest output, float32: 4e-7 is what the models here show."""


def trained(model: Path, root: Path, method: str) -> tuple[Path, torch.Tensor]:
    """A finished run, and what the stock pipeline samples with the very model that was trained, in this process."""
    config = run_config(
        model,
        root / "no-videos-here",
        root / "run",
        cache={"mode": "require"},
        method=METHODS[method],
        optimizer={"lr": 3e-2 if method != "full" else 3e-3},
        train={"steps": 4},
    )
    fabricate_cache(config)
    outputs: list[torch.Tensor] = []
    save = Run.save

    def saving(run: Run, state):
        run.model.module.eval()
        outputs.append(latents_of(load_pipeline(str(model), transformer=run.model.module)))
        return save(run, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", saving)
        loop.train(config)
    return config.output_dir, outputs[-1]


def in_a_fresh_process(jobs: list[dict], folder: Path) -> dict[str, torch.Tensor]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("stock_pipeline.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "out.safetensors")],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return load_file(folder / "out.safetensors")


def matrix(tiny_model, root: Path, cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Outputs by case: ``live`` of the model in training, the rest of a fresh process."""
    jobs = [{"name": f"{variant} base", "model": str(tiny_model(variant))} for variant in {case[0] for case in cases}]
    live = {}
    for variant, method in cases:
        model, here = tiny_model(variant), root / variant / method
        run, live[variant, method] = trained(model, here, method)

        def job(name: str, *, case: str = f"{variant} {method}", model: Path = model, **options) -> None:
            jobs.append({"name": f"{case} {name}", "model": str(model), **options})

        job("merged", transformer=str(export(run, layout="merged").folder))
        if method == "full":
            job("diffusers", transformer=str(export(run).folder))
            continue
        job("diffusers", adapter=str(export(run).folder), scales=[0.5, 0.0])
        job("merged 0.5", transformer=str(export(run, here / "half", layout="merged", strength=0.5).folder))
    outputs = in_a_fresh_process(jobs, root)
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for variant, method in cases:
        prefix = f"{variant} {method} "
        found[variant, method] = {
            name.removeprefix(prefix): tensor for name, tensor in outputs.items() if name.startswith(prefix)
        } | {"live": live[variant, method], "base": outputs[f"{variant} base"]}
    return found


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(variant: str, method: str, outputs: dict[str, torch.Tensor]) -> None:
    live, base = outputs["live"], outputs["base"]
    assert relative(base, live) > 0.01, "the training changed nothing, so that nothing is shown"
    figures = {name: relative(outputs[name], live) for name in ("diffusers", "merged")}
    print(f"{variant} {method}: " + ", ".join(f"{name} {figure:.1e}" for name, figure in figures.items()))
    assert max(figures.values()) <= ROUND_OFF
    if method == "full":
        assert torch.equal(outputs["merged"], outputs["diffusers"])
        return
    assert torch.equal(outputs["diffusers disabled"], base)
    assert relative(outputs["merged 0.5"], outputs["diffusers 0.5"]) <= ROUND_OFF
    assert relative(outputs["diffusers 0.5"], live) > 10 * ROUND_OFF  # a canary: a wrong strength shows
    if method == "dora":
        # Through the stock loader a DoRA's magnitudes act at any scale, so that 0 is not the base there.
        assert not torch.equal(outputs["diffusers 0.0"], base)
    else:
        assert torch.equal(outputs["diffusers 0.0"], base)


@pytest.fixture(scope="module")
def outputs(tiny_model, tmp_path_factory):
    return matrix(tiny_model, tmp_path_factory.mktemp("matrix"), FAST)


@pytest.mark.parametrize("variant,method", FAST)
def test_an_export_is_the_trained_model_in_a_fresh_process(outputs, variant, method):
    check(variant, method, outputs[variant, method])


@pytest.mark.slow
def test_every_other_variant_and_method_too(tiny_model, tmp_path):
    for (variant, method), found in matrix(tiny_model, tmp_path, REST).items():
        check(variant, method, found)


# ---------------------------------------------------------------------------------------------------------- the sum


def adapted(model: Path, method: dict, dtype: str = "auto"):
    """A transformer with an adapter that does something."""
    lora = LoraMethod.model_validate(method)
    transformer = load_transformer(ModelConfig(pretrained=str(model), dtype=dtype))
    lora.apply(transformer, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.trainable(transformer).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return transformer.eval()


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_merging_is_peft_s_own_sum(tiny_model, method):
    """Against peft's merge, where both compute in float32."""
    ours, theirs = (adapted(tiny_model("5b"), METHODS[method]) for _ in range(2))
    merge(ours, 1.0)
    for module in list(theirs.modules()):
        if ADAPTER in getattr(module, "scaling", {}):
            module.merge()
    theirs.unload_lora()
    reference = theirs.state_dict()
    assert ours.state_dict().keys() == reference.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_narrow_base_is_rounded_once(tiny_model, method):
    """Off by at most half a unit in the last place, 2^-8; adding in bfloat16 would round twice."""
    wide = adapted(tiny_model("5b"), METHODS[method])
    narrow = adapted(tiny_model("5b"), METHODS[method], "bf16")
    base = load_transformer(ModelConfig(pretrained=str(tiny_model("5b")), dtype="bf16")).state_dict()
    name = "transformer_blocks.0.attn1.to_q"
    wide.load_state_dict(narrow.state_dict())  # the same starting point, so that the sums are the same
    with torch.no_grad():
        naive = base[f"{name}.weight"] + wide.get_submodule(name).get_delta_weight(ADAPTER).bfloat16()
    merge(wide, 1.0)
    report = merge(narrow, 1.0)
    exact, stored = wide.state_dict()[f"{name}.weight"], narrow.state_dict()[f"{name}.weight"]
    assert stored.dtype == torch.bfloat16
    assert bool(((stored.float() - exact).abs() <= 2**-8 * exact.abs()).all())
    assert torch.equal(stored, exact.bfloat16())
    assert 0 < report.rounding < 0.1 and "% of its update" in str(report)
    if method == "lora":  # a canary: rounding twice is seen
        assert not torch.equal(naive, exact.bfloat16())


def test_a_weak_adapter_drowns_in_a_narrow_base_and_the_report_says_so(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA, scale=1e-3, dtype="bf16")
    report = export(run, layout="merged")
    assert report.merged is not None and report.merged.rounding > 0.5
    assert f"{report.merged.rounding:.1%} of its update" in str(report)
    assert f"{report.merged.rounding:.1%} of its update" in (report.folder / "README.md").read_text()


def test_half_precision_merges_stay_inside_the_stated_tolerance(tiny_model, tmp_path):
    report = export(make_run(tmp_path, tiny_model("5b"), LORA | {"use_dora": True}, dtype="bf16"), layout="merged")
    assert 0 < report.max_abs_diff <= report.tolerance
    assert {tensor.dtype for tensor in load_file(report.folder / WEIGHTS).values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_at_strength_zero_the_merged_weights_are_the_base_s_bit_for_bit(tiny_model, tmp_path, method):
    model = tiny_model("5b-i2v")
    run = make_run(tmp_path, model, METHODS[method])
    folder = export(run, layout="merged", strength=0.0).folder
    base, merged = (load_file(root / WEIGHTS) for root in (model, folder))
    assert merged.keys() == base.keys()
    # In the model's dtype: the tiny model's table of positions is stored in float64, which nobody loads.
    base = {name: tensor.float() for name, tensor in base.items()}
    assert all(torch.equal(merged[name], base[name]) for name in base)
    weak = load_file(export(run, tmp_path / "weak", layout="merged", strength=1e-3).folder / WEIGHTS)
    assert any(not torch.equal(weak[name], base[name]) for name in base)  # a canary


def test_the_pipeline_s_strength_is_ours(tiny_model):
    """``set_strength`` is what ``pipeline.set_adapters`` does, so that a merge at it is what people hear."""
    spec = read_spec(str(tiny_model("5b")))
    ours, theirs = (adapted(tiny_model("5b"), METHODS["rslora"]) for _ in range(2))
    set_strength(ours, 0.37)
    theirs.set_adapters([ADAPTER], [0.37])
    with torch.no_grad():
        assert torch.equal(denoise(ours, spec, *inputs(spec)), denoise(theirs, spec, *inputs(spec)))


# ----------------------------------------------------------------------------------------------------- around the sum


def test_a_merge_that_forgets_alpha_is_deleted(tiny_model, tmp_path, monkeypatch):
    def forgetful(layer):
        return layer.base_layer.weight + layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight

    monkeypatch.setattr(merging, "_merged_weight", forgetful)
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    with pytest.raises(ExportError, match="predicted velocities differ"):
        export(run, layout="merged")
    assert nothing_left(run)


def test_a_merged_file_that_was_tampered_with_is_deleted(tiny_model, tmp_path, monkeypatch):
    tamper(one_number)(monkeypatch)
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    with pytest.raises(ExportError, match=r"1 of \d+ tensors differ, such as proj_out.bias"):
        export(run, layout="merged")
    assert nothing_left(run)


def test_a_merged_export_says_what_it_is(tiny_model, tmp_path):
    model = tiny_model("5b")
    report = export(make_run(tmp_path, model, LORA), layout="merged", strength=0.8, full_pipeline=True)
    card = (report.folder / "README.md").read_text()
    assert f"LoRA of `{model.name}`" in card
    assert "the adapter is merged into the base at strength 0.8" in card and "strength 0.8" in str(report)
    assert "load_lora_weights" not in card and "--adapter" not in card and f"--transformer {report.folder}" in card
    assert "\n- lora\n" not in card and "\n- lora-merged\n" in card
    record = json.loads((report.folder / TRAINING_RECORD).read_text())
    assert record["merged"] == {"strength": 0.8, "rounding": 0.0} and record["kind"] == "lora"
    assert latents_of(load_pipeline(str(report.folder))).isfinite().all()
    assert report.folder == tmp_path / "run" / "merged"


def test_a_full_fine_tuning_is_merged_already(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), FULL)
    merged, plain = export(run, layout="merged"), export(run)
    assert "whole: merged or not" in str(merged) and merged.merged is None
    assert (merged.folder / WEIGHTS).read_bytes() == (plain.folder / WEIGHTS).read_bytes()
    assert json.loads((merged.folder / TRAINING_RECORD).read_text())["merged"] is None


def test_the_command_line_merges_and_generate_samples_the_merged_folder(tiny_model, tmp_path, capsys):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LORA)
    assert main.main(["export", str(run), "--to", "merged", "--strength", "0.5"]) == 0
    assert "merged into the base at strength 0.5" in capsys.readouterr().out
    adapter = export(run).folder

    def frames(**options) -> np.ndarray:
        prompts = (VideoPrompt(prompt="a red ring", seed=5),)
        sizes = {"bucket": Bucket(9, 32, 48), "num_inference_steps": 1}
        request = GenerateRequest(base=str(model), prompts=prompts, out=tmp_path / "out", **sizes, **options)
        return generate(request).frames[0].astype(int)

    merged, loaded = frames(transformer=run / "merged"), frames(adapters=(AdapterArgument(adapter, 0.5),))
    assert np.abs(merged - loaded).max() <= 1  # one grey level, where round-off falls across a boundary
    assert np.abs(loaded - frames()).max() > 1
