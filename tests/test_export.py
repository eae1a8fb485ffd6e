"""Export: what leaves is what was trained, in files that anybody's diffusers loads; anything else is deleted."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from other_programs import comfyui_updates, kijai_updates
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_pipeline import load_pipeline

from finetune import export, inspect
from finetune.checkpoint.save import CheckpointContent, save_checkpoint
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import encode_prompts
from finetune.cogvideox.load import load_scheduler, load_text, load_transformer, load_vae
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.conversion import export as exporting
from finetune.conversion import verify as verifying
from finetune.core import locks
from finetune.core.errors import CheckpointError, ConfigError, ExportError
from finetune.core.files import LORA_FILE
from finetune.core.types import Bucket, RunState
from finetune.inference.adapters import TRAINING_RECORD
from finetune.inference.generate import generate
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt
from finetune.inference.sample import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.videos import write_mp4
from finetune.methods import lora as merging
from finetune.methods.lora import adapted_layers
from tests.broken_disk import disk
from tests.worlds import merged, run_config, run_values

LORA = {"kind": "lora", "rank": 4, "alpha": 2}
FULL = {"kind": "full"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make_run(
    tmp_path: Path,
    model: Path,
    method: dict,
    /,
    *,
    step: int = 3,
    scale: float = 0.3,
    dtype: str = "auto",
    ema: bool = False,
    best_step: int | None = None,
    cache_digest: str = "",
    **changes,
) -> Path:
    """A run's folder with one checkpoint, whose weights moved at random as training would move them."""
    values = run_values(model, tmp_path / "clips", tmp_path / "run", method=method, **changes)
    config = RunConfig.from_dict(merged(values, {"model": {"dtype": dtype}}))
    transformer = load_transformer(config.model)
    config.method.apply(transformer, seed=7)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in config.method.trainable(transformer).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * (0.1 if method == FULL else 1))
    state = {name: tensor.clone() for name, tensor in config.method.state(transformer).items()}
    save_checkpoint(
        config.output_dir,
        CheckpointContent(
            RunState(step, cache_digest, step, None if best_step is None else 0.1, best_step),
            trainable=state,
            optimizer=({}, {}),
            ema={name: tensor.float() * 0.5 for name, tensor in state.items()} if ema else None,
            config=config.to_dict(),
        ),
        config.checkpoint,
    )
    return config.output_dir


def trained_tensors(run: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/trainable.safetensors")


def inputs(spec) -> tuple:
    generator = torch.Generator().manual_seed(9)
    frames = 2 * (spec.patch_size_t or 1)
    return (
        torch.randn(1, 4, frames, 8, 8, generator=generator),
        torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, generator=generator),
        torch.tensor([321]),
        torch.randn(1, 4, 1, 8, 8, generator=generator) if spec.image_to_video else None,
    )


@torch.no_grad()
def stock_velocity(model: Path, folder: Path | None = None, *, strength: float = 1.0) -> torch.Tensor:
    """What the published pipeline computes with the adapter in ``folder``: diffusers alone, none of our loading."""
    pipeline = load_pipeline(str(model), adapter=None if folder is None else str(folder))
    if folder is not None:
        pipeline.set_adapters("tuned", strength)
    spec = read_spec(str(model))
    return denoise(pipeline.transformer, spec, *inputs(spec))


def trained_transformer(run: Path, model: Path, method: dict) -> Any:
    """What training computes with: our loading alone."""
    config = run_config(model, run, run, method=method)
    transformer = load_transformer(config.model)
    config.method.apply(transformer, seed=0)
    config.method.load_state(transformer, trained_tensors(run))
    return transformer.eval()


@torch.no_grad()
def trained_velocity(run: Path, model: Path, method: dict) -> torch.Tensor:
    spec = read_spec(str(model))
    return denoise(trained_transformer(run, model, method), spec, *inputs(spec))


# ----------------------------------------------------------------------------------------------------- what is written


@pytest.mark.arithmetic
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("5b", {}),
        ("5b", {"use_dora": True, "use_rslora": True, "targets": "all-linear"}),
        ("5b", {"targets": "attention+ff", "alpha": 2.5, "dropout": 0.5}),
        ("2b", {}),
        ("5b-i2v", {}),
        ("1.5-5b", {}),
        ("1.5-5b-i2v", {}),
    ],
)
def test_a_lora_means_the_same_to_the_stock_pipeline(tiny_model, tmp_path, variant, options):
    model, method = tiny_model(variant), LORA | options
    run = make_run(tmp_path, model, method)
    report = export(run)
    ours, theirs, base = trained_velocity(run, model, method), stock_velocity(model, run / "export"), None
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert report.folder == run / "export" and report.max_abs_diff <= report.tolerance
    assert {LORA_FILE, "README.md", TRAINING_RECORD} <= set(report.files) and str(report.folder) in str(report)
    if variant == "5b":
        base = stock_velocity(model)
        assert (ours - base).abs().max() > 0.05  # the adapter does something, so that the lines above say something
    if not options and base is not None:
        assert torch.equal(stock_velocity(model, report.folder, strength=0.0), base)
        assert not torch.equal(stock_velocity(model, report.folder, strength=0.5), base)


@pytest.mark.arithmetic
@pytest.mark.parametrize("compute", ["model", "float32"])
def test_half_precision_stays_inside_the_stated_tolerance(tiny_model, tmp_path, compute):
    """diffusers rounds an adapter to bfloat16 when it loads it, as training does for its products."""
    run = make_run(tmp_path, tiny_model("5b"), LORA | {"targets": "all-linear", "compute": compute}, dtype="bf16")
    report = export(run)
    assert report.max_abs_diff <= report.tolerance and (report.max_abs_diff == 0) == (compute == "model")
    assert {tensor.dtype for tensor in load_file(report.folder / LORA_FILE).values()} == {torch.float32}


def test_the_header_states_what_decides_and_nothing_newer(tiny_model, tmp_path):
    folder = export(make_run(tmp_path, tiny_model("5b"), LORA | {"dropout": 0.25})).folder
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    settings = {name.removeprefix("transformer."): value for name, value in header.items()}
    assert (settings["r"], settings["lora_alpha"]) == (4, 2)
    # Every reader hands all of them to its own peft, and refuses the file for one that it does not know.
    patterns = {"rank_pattern", "alpha_pattern"}  # empty; diffusers 0.36 does not load a file without them
    assert settings.keys() == {"r", "lora_alpha", "target_modules", "use_rslora", "use_dora"} | patterns
    record = json.loads((folder / TRAINING_RECORD).read_text())
    assert record["method"]["dropout"] == 0.25 and record["buckets"] == ["9x64x64"] and record["fps"] == 8


def test_the_starting_adapter_may_be_gone(tiny_model, tmp_path):
    model = tiny_model("5b")
    first = export(make_run(tmp_path / "a", model, LORA)).folder
    run = make_run(tmp_path / "b", model, LORA | {"init_from": str(first)})
    (first / LORA_FILE).unlink()
    assert export(run).max_abs_diff == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_full_fine_tuning_becomes_a_transformer_folder(tiny_model, tmp_path, dtype):
    run = make_run(tmp_path, tiny_model("5b"), FULL, dtype="fp32" if dtype == torch.float32 else "bf16")
    report = export(run)
    theirs = CogVideoXTransformer3DModel.from_pretrained(report.folder, subfolder="transformer", torch_dtype=dtype)
    trained = trained_tensors(run)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in theirs.named_parameters())
    assert {tensor.dtype for tensor in load_file(report.folder / WEIGHTS).values()} == {dtype}
    assert report.max_abs_diff == 0


def test_a_full_pipeline_is_complete(tiny_model, tmp_path):
    model = tiny_model("1.5-5b-i2v")
    run = make_run(tmp_path, model, FULL)
    folder = export(run, tmp_path / "out", full_pipeline=True).folder
    components = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == components
    torch.testing.assert_close(stock_velocity(folder), trained_velocity(run, model, FULL), rtol=0, atol=1e-5)
    assert (model / "vae/config.json").read_bytes() == (folder / "vae/config.json").read_bytes()


def test_an_average_is_exported_where_one_was_kept(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), FULL, dtype="bf16", ema=True)
    averaged, raw = export(run, tmp_path / "averaged"), export(run, tmp_path / "raw", weights="raw")
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    ours, theirs = (load_file(report.folder / WEIGHTS)["proj_out.weight"] for report in (averaged, raw))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs * 0.5, rtol=0, atol=0)


def frames_of(base: Path | None, adapter: Path, out: Path) -> np.ndarray:
    request = GenerateRequest(
        base=None if base is None else str(base),
        prompts=(VideoPrompt(prompt="a red ring", seed=5),),
        out=out / f"{len(list(out.glob('*')))}",  # what is there already would be kept, not sampled
        adapters=(AdapterArgument(adapter),),
        bucket=Bucket(9, 32, 48),
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    return generate(request).frames[0]


def test_what_training_sampled_is_what_the_export_samples(tiny_model, tmp_path):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LORA)
    config, spec = run_config(model, run, run, method=LORA).model, read_spec(str(model))
    empty, prompt = encode_prompts(*load_text(config), ["", "a red ring"], spec)
    transformer = trained_transformer(run, model, LORA)
    modules = SampleModules(spec, transformer, load_scheduler(config), load_vae(config))
    request = SampleRequest(prompt, empty, seed=5, bucket=Bucket(9, 32, 48))
    (ours,) = sample_videos(modules, [request], SampleSettings(2, 3.0))
    assert np.array_equal(frames_of(model, export(run).folder, tmp_path / "out"), ours)


@pytest.mark.parametrize(
    "method", [LORA | {"alpha": 2.5, "use_rslora": True}, LORA | {"use_dora": True}], ids=["ema", "dora"]
)
def test_a_run_or_a_checkpoint_samples_what_its_export_samples(tiny_model, tmp_path, caplog, method):
    """And neither needs to be told its base, also where that is a folder of this machine."""
    caplog.set_level("INFO", "finetune")
    ema = "use_dora" not in method
    make_run(tmp_path, tiny_model("5b"), method, step=2, ema=ema)
    run = make_run(tmp_path, tiny_model("5b"), method, step=3, ema=ema, best_step=2)
    older, newest = (run / "checkpoints" / f"step-{step:08d}" for step in (2, 3))
    exported = frames_of(None, export(run).folder, tmp_path / "out")
    assert np.array_equal(frames_of(None, newest, tmp_path / "out"), exported) and "newest" not in caplog.text
    assert np.array_equal(frames_of(None, run, tmp_path / "out"), exported)
    assert f"--adapter {run}: the run's newest checkpoint is used, step 3" in caplog.text
    assert f"the lowest held-out loss is step 2's: --adapter {older}" in caplog.text


# ------------------------------------------------------------------------------------------------------- other layouts

ALL_LINEAR = LORA | {"targets": "all-linear", "alpha": 2.5, "use_rslora": True}


def exported_file(run: Path, layout: str, **options) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = export(run, layout=layout, **options).folder
    assert folder.name == layout and not (folder / LORA_FILE).exists()
    (file,) = folder.glob("*.safetensors")
    return file, load_file(file)


def merged_weights(model: Path, run: Path, method: dict) -> dict[str, torch.Tensor]:
    """What training's model multiplies by, by module."""
    transformer = trained_transformer(run, model, method)
    with torch.no_grad():
        return {name: merging._merged_weight(layer) for name, layer in adapted_layers(transformer)}


@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_comfyui_reads_every_tensor_and_computes_what_was_trained(tiny_model, tmp_path, variant):
    """ComfyUI's own rules, written down in ``other_programs``: each key is consumed, with its alpha."""
    model, method = tiny_model(variant), ALL_LINEAR | {"ranks": {"to_v": 7}}
    run = make_run(tmp_path, model, method)
    file, tensors = exported_file(run, "comfyui")
    base = load_transformer(ModelConfig(pretrained=str(model)))
    theirs, unread = comfyui_updates(base, tensors)
    ours = merged_weights(model, run, method)
    assert not unread and theirs.keys() == ours.keys() and file.name == "run.safetensors"
    assert all(name.startswith("diffusion_model.") for name in tensors) and inspect(file).loadings[1].loads
    for module, weight in ours.items():
        torch.testing.assert_close(theirs[module], weight, rtol=1e-5, atol=1e-5)
    tensors.pop(next(name for name in tensors if name.endswith("ff_out.alpha")))  # a canary: alpha counts
    wrong, _ = comfyui_updates(base, tensors)
    assert any(not torch.allclose(wrong[module], weight, atol=1e-4) for module, weight in ours.items())


def test_kijai_s_wrapper_reads_both_of_its_layouts(tiny_model, tmp_path):
    """Diffusers' through diffusers' loader, as every export is verified; kohya's merged by its own rules."""
    model = tiny_model("5b")
    run = make_run(tmp_path, model, ALL_LINEAR)
    _, tensors = exported_file(run, "kohya")
    ours = merged_weights(model, run, ALL_LINEAR)
    theirs = kijai_updates(load_transformer(ModelConfig(pretrained=str(model))), tensors)
    assert theirs.keys() == ours.keys() and all(name.startswith("lora_unet_") for name in tensors)
    for module, weight in ours.items():
        torch.testing.assert_close(theirs[module], weight, rtol=1e-5, atol=1e-5)
    diffusers = load_file(export(run).folder / LORA_FILE)
    assert any("lora_B" in name for name in diffusers)  # for which the wrapper calls load_lora_weights
    trained = trained_velocity(run, model, ALL_LINEAR)
    torch.testing.assert_close(stock_velocity(model, run / "export"), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_peft_reads_its_folder(tiny_model, tmp_path, options):
    from peft import PeftModel

    model, method = tiny_model("5b"), ALL_LINEAR | options
    run = make_run(tmp_path, model, method)
    folder = export(run, layout="peft").folder
    transformer = PeftModel.from_pretrained(load_transformer(ModelConfig(pretrained=str(model))), folder)
    spec = read_spec(str(model))
    with torch.no_grad():
        theirs = denoise(transformer.base_model.model.eval(), spec, *inputs(spec))
    torch.testing.assert_close(theirs, trained_velocity(run, model, method), rtol=0, atol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == model.name and settings["lora_alpha"] == pytest.approx(5.0)


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_an_export_s_header_is_read_by_sites_and_the_same_each_time(tiny_model, tmp_path, layout):
    words = {"data": {"trigger": "zwx"}, "validation": {"samples": [{"prompt": "a", "seed": 4}]}}
    run = make_run(tmp_path, tiny_model("5b"), ALL_LINEAR, **words)
    video = run / "samples" / "step-00000003" / "00-seed4.mp4"
    video.parent.mkdir(parents=True)
    write_mp4(video, np.random.default_rng(1).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8), fps=8)
    first, second = (export(run, tmp_path / name, layout=layout).folder for name in "ab")
    (file,) = first.glob("*.safetensors")
    for name in (file.name, "finetune.json", *(["adapter_config.json"] if layout == "peft" else [])):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    with safe_open(file, framework="pt") as source:
        metadata = source.metadata()
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}" and metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.architecture"] == "cogvideox/lora"  # of no published model
    # rsLoRA counts alpha / sqrt(rank): 2.5 / 2 here, which sites take for alpha / rank.
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "5")
    assert metadata["modelspec.trigger_phrase"] == "zwx" and metadata["modelspec.resolution"] == "64x64"
    head, _, picture = metadata["modelspec.thumbnail"].partition(",")
    strip = Image.open(BytesIO(base64.b64decode(picture)))
    assert head == "data:image/jpeg;base64" and strip.format == "JPEG" and max(strip.size) == 256
    os.utime(run / "checkpoints" / "step-00000003" / "COMPLETE", (0, 0))
    (file,) = export(run, tmp_path / "c", layout=layout).folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as source:
        assert source.metadata()["modelspec.date"] == "1970-01-01"  # of the checkpoint, not of the clock


def test_a_layout_that_loses_something_is_deleted(tiny_model, tmp_path, monkeypatch):
    from finetune.conversion import lora_files

    def one_off(lora, layout):
        tensors = from_diffusers(lora, layout)
        return tensors | {name: t + 1e-6 for name, t in list(tensors.items())[:1]}

    from_diffusers = lora_files.from_diffusers
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    monkeypatch.setattr(lora_files, "from_diffusers", one_off)
    with pytest.raises(ExportError, match="not what was given"):
        export(run, layout="comfyui")
    assert not (run / "comfyui").exists() and not list(run.glob("*.partial"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_whole_transformer_in_another_dtype_and_in_shards(tiny_model, tmp_path, dtype):
    model = tiny_model("5b")
    for name, method in (("lora", LORA), ("full", FULL)):
        run = make_run(tmp_path / name, model, method, dtype="fp32")
        report = export(run, layout="merged", dtype=dtype, max_shard_size="0.2MB")
        shards = sorted((report.folder / "transformer").glob("diffusion_pytorch_model-*.safetensors"))
        assert len(shards) > 1
        stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        merged = {} if method == FULL else merged_weights(model, run, LORA)
        exact = {f"{module}.weight": weight for module, weight in merged.items()} or trained_tensors(run)
        wanted, rtol = (torch.bfloat16, 2**-6) if dtype == "bf16" else (torch.float16, 2**-9)
        assert {tensor.dtype for tensor in stored.values()} == {wanted} and exact
        for name, tensor in exact.items():
            # Merged in the base's dtype, so the base is rounded before and the sum after.
            torch.testing.assert_close(stored[name].float(), tensor, rtol=rtol, atol=1e-3)


# ------------------------------------------------------------------------------------------------ what must not get out


def nothing_left(run: Path) -> bool:
    return not {path.name for path in run.iterdir()} - {"checkpoints", ".export.lock", ".merged.lock"}


def save_with(change: Callable[[dict], dict]) -> Callable[[pytest.MonkeyPatch], None]:
    """Adapters are written with other settings in their header."""
    save = CogVideoXPipeline.save_lora_weights.__func__

    def changed(cls, *args, transformer_lora_adapter_metadata, **options):
        settings = change(transformer_lora_adapter_metadata)
        return save(cls, *args, **options, **({"transformer_lora_adapter_metadata": settings} if settings else {}))

    return lambda patch: patch.setattr(CogVideoXPipeline, "save_lora_weights", classmethod(changed))


def tamper(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """What was written is changed before it is verified."""
    verify = exporting.verify

    def changed(folder, *args, **options):
        (path,) = folder.rglob("*.safetensors")
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=header)
        return verify(folder, *args, **options)

    return lambda patch: patch.setattr(exporting, "verify", changed)


def one_number(tensors: dict[str, torch.Tensor]) -> None:
    """So little that no velocity shows it in a bias of the output."""
    name = "proj_out.bias" if "proj_out.bias" in tensors else min(tensors)
    tensors[name].view(-1)[0] += 1e-6


def no_number(patch: pytest.MonkeyPatch) -> None:
    real = verifying.seeded_velocity
    patch.setattr(verifying, "seeded_velocity", lambda *args: real(*args) * float("nan"))


NO_ALPHA = save_with(lambda settings: {})
FAULTS = {
    "alpha lost": (LORA, {}, NO_ALPHA, r"counts 1\.0 instead of 0\.5.*velocities differ"),
    # In bfloat16 a barely trained adapter moves the output by less than rounding does: the forward pass is blind.
    "alpha lost, weak": (LORA, {"scale": 1e-3, "dtype": "bf16"}, NO_ALPHA, r"counts 1\.0 instead of 0\.5 \(alpha / r"),
    # Why dropout is left out of the header: diffusers inserts adapters in training mode.
    "dropout": (LORA, {}, save_with(lambda settings: settings | {"lora_dropout": 0.5}), "predicted velocities differ"),
    "tampered lora": (LORA, {}, tamper(one_number), r"1 of \d+ tensors differ"),
    "tampered full": (FULL, {}, tamper(one_number), r"1 of \d+ tensors differ, such as proj_out\.bias"),
    "tensor less lora": (LORA, {}, tamper(lambda tensors: tensors.pop(min(tensors))), "tensors differ|cannot be load"),
    "tensor less full": (FULL, {}, tamper(lambda tensors: tensors.pop(min(tensors))), "cannot be loaded: .*missing"),
    "no number": (LORA, {}, no_number, "differ by up to nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_trained_model_is_deleted(tiny_model, tmp_path, monkeypatch, fault):
    method, options, break_it, message = FAULTS[fault]
    run = make_run(tmp_path, tiny_model("5b"), method, **options)
    break_it(monkeypatch)
    with pytest.raises(ExportError, match=message) as caught:
        export(run)
    assert nothing_left(run) and "step-00000003" in caught.value.where


def test_a_failed_export_leaves_the_earlier_one(tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    before = (export(run).folder / LORA_FILE).read_bytes()
    monkeypatch.setattr(verifying, "tolerance_of", lambda *args: -1.0)
    with pytest.raises(ExportError):
        export(run)
    assert (run / "export" / LORA_FILE).read_bytes() == before
    assert not list(run.glob("*.partial"))


def test_never_two_transformers_at_once(tiny_model, tmp_path, monkeypatch):
    alive = []

    def counted(module, name):
        load = getattr(module, name)

        def spy(*args, **options):
            gc.collect()
            assert [reference() for reference in alive if reference() is not None] == []
            transformer = load(*args, **options)
            alive.append(weakref.ref(transformer))
            return transformer

        monkeypatch.setattr(module, name, spy)

    runs = {name: make_run(tmp_path / name, tiny_model("5b"), m) for name, m in (("lora", LORA), ("full", FULL))}
    counted(exporting, "load_base")
    counted(verifying, "load_base")
    counted(verifying, "load_transformer")
    for name, whole in (("lora", False), ("full", False), ("lora", True)):
        export(runs[name], layout="merged" if whole else "diffusers")
    assert len(alive) == 6


# ---------------------------------------------------------------------------------------------- which checkpoint, where


def test_latest_best_named_and_moved_checkpoints(tiny_model, tmp_path):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LORA, step=2)
    make_run(tmp_path, model, LORA, step=4, best_step=2)
    second = run / "checkpoints" / "step-00000002"
    moved = Path(shutil.copytree(second, tmp_path / "elsewhere" / second.name))
    reports = [export(run, tmp_path / "a"), export(run, tmp_path / "b", checkpoint="best"), export(second)]
    reports.append(export(moved, pretrained=str(model)))
    assert [report.step for report in reports] == [4, 2, 2, 2]
    assert [report.folder for report in reports[2:]] == [run / "export", moved.with_name("step-00000002-export")]
    last, *others = (load_file(report.folder / LORA_FILE) for report in reports)
    for other in others:
        assert all(torch.equal(other[n], others[0][n]) and not torch.equal(other[n], last[n]) for n in last)


def test_the_best_checkpoint_is_found_beside_a_damaged_newest(tiny_model, tmp_path):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LORA, step=2)
    newest = (
        make_run(tmp_path, model, LORA, step=4, best_step=2) / "checkpoints" / "step-00000004" / "trainable.safetensors"
    )
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        export(run)
    assert export(run, checkpoint="best").step == 2


def test_requests_that_cannot_be_met(tiny_model, tmp_path):
    lora = make_run(tmp_path / "lora", tiny_model("5b"), LORA)
    full = make_run(tmp_path / "full", tiny_model("5b"), FULL)
    dora = make_run(tmp_path / "dora", tiny_model("5b"), LORA | {"use_dora": True})
    cases: list[tuple[Path, dict, type[Exception], str | None]] = [
        (lora, {"weights": "ema"}, ExportError, "no moving average"),
        (lora, {"checkpoint": "best"}, ExportError, "no held-out loss was measured"),
        (lora, {"full_pipeline": True}, ExportError, "no pipeline of its own"),
        (tmp_path, {}, CheckpointError, "no complete checkpoint"),
        (tmp_path / "nowhere", {"to": tmp_path / "made"}, CheckpointError, None),
        (lora, {"layout": "merged", "strength": float("nan")}, ConfigError, "'strength' is nan"),
        (lora, {"strength": 0.5}, ExportError, "chosen where it is loaded"),
        (full, {"layout": "merged", "strength": 0.5}, ExportError, "has no strength"),
        (full, {"layout": "comfyui"}, ExportError, "is no adapter, and this is a layout of adapters"),
        (lora, {"dtype": "bf16"}, ExportError, "keeps its float32"),
        (full, {"max_shard_size": "big"}, ConfigError, "no amount"),
        (dora, {"layout": "kohya"}, ExportError, "pass over its magnitudes"),
        (dora, {"layout": "comfyui"}, ExportError, "divides by the norms of the base's weights"),
    ]
    for source, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            export(source, **options)
    assert nothing_left(lora) and nothing_left(full) and not (tmp_path / "made").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_checkpoint_is_read(tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(exporting, "read_source", lambda *_: pytest.fail("the checkpoint was read"))
    with pytest.raises(ExportError, match="cannot be written"):
        export(run, tmp_path / "file" / "out")
    with pytest.raises(ExportError, match="No space left"), disk(fail_at=0):
        export(run, tmp_path / "out")
    with pytest.raises(pytest.fail.Exception, match="the checkpoint was read"):
        export(run, tmp_path / "out")


def test_only_an_earlier_export_is_replaced(tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):  # an empty folder will do, and so will an export; a link keeps pointing to it
        export(run, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / LORA_FILE).is_file()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for other in ("thesis", "file"):
        with pytest.raises(ExportError, match="not an earlier export"):
            export(run, tmp_path / other)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    monkeypatch.chdir(tmp_path / "disk")
    for here in (Path(), tmp_path / "link"):
        with pytest.raises(ExportError, match="the folder that this command runs in"):
            export(run, here)


def test_what_a_killed_export_left_is_made_good_by_the_next(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    first = export(run).folder
    half, elsewhere = run / "export.4711-00aa11bb.partial", run / "exported.4711-00aa11bb.partial"
    for folder in (half, elsewhere):
        folder.mkdir()
        (folder / "half").write_text("")
    old = first.rename(run / "export.0011aabb.old.partial")  # killed between the two renames
    with pytest.raises(ExportError, match="cannot be written"), disk(fail_at=2):
        export(run)
    assert first.is_dir() and not old.exists() and not half.exists(), "the earlier export stands again"
    first.rename(old)
    shutil.copytree(old, first)  # killed after them
    export(run)
    names = sorted(path.name for path in run.iterdir() if path.name != "checkpoints")
    assert names == [".export.lock", "export", elsewhere.name]


def test_two_exports_to_one_folder_are_refused(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    theirs = run / "export.4711-00aa11bb.partial"
    theirs.mkdir()
    with locks.hold(run / ".export.lock", "export"):
        with pytest.raises(ExportError, match=r"another export to this folder is under way: export on"):
            export(run)
        assert theirs.is_dir() and export(run, tmp_path / "elsewhere")
    export(run)
    assert not theirs.exists()
