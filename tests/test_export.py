"""Export: what leaves is what was trained, in files that anybody's diffusers loads; anything else is deleted."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.checkpoint.save import save_checkpoint
from finetune.checkpoint.validation_history import HISTORY
from finetune.cli.main import build_parser
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import encode_prompts
from finetune.cogvideox.load import load_scheduler, load_text, load_transformer, load_vae
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.convert import export as export_module
from finetune.convert import verify
from finetune.convert.export import export
from finetune.convert.model_card import _code
from finetune.core import locks
from finetune.core.errors import CheckpointError, ExportError
from finetune.core.files import LORA_FILE
from finetune.core.types import Bucket, RunState, SamplePrompt
from finetune.datasets.cache import Cache
from finetune.datasets.cache_entries import Manifest, ManifestItem
from finetune.inference.generate import SampleRequest, generate, sample_videos
from finetune.inference.inputs import TRAINING_RECORD, AdapterArgument, GenerateRequest
from tests.broken_disk import disk
from tests.worlds import run_config, run_values

LORA = {"kind": "lora", "rank": 4, "alpha": 2}
FULL = {"kind": "full"}
WIDTHS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_run(
    tmp_path: Path,
    model: Path,
    method: dict,
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
    config = RunConfig.from_dict({**values, "model": {"pretrained": str(model), "dtype": dtype}})
    transformer = load_transformer(config.model)
    config.method.apply(transformer, seed=7)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in config.method.trainable(transformer).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale * (0.1 if method == FULL else 1))
    state = {name: tensor.clone() for name, tensor in config.method.state(transformer).items()}
    save_checkpoint(
        config.output_dir,
        RunState(step, cache_digest, step, None if best_step is None else 0.1, best_step),
        trainable=state,
        optimizer=({}, {}),
        ema={name: tensor.float() * 0.5 for name, tensor in state.items()} if ema else None,
        config=config.to_dict(),
        policy=config.checkpoint,
    )
    return config.output_dir


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
def stock_velocity(model: Path, folder: Path | None, *, strength: float = 1.0, dtype=torch.float32) -> torch.Tensor:
    """What the published pipeline computes with the adapter in ``folder``: diffusers alone, none of our loading."""
    spec = read_spec(str(model))
    pipeline = export_module.pipeline_class(spec).from_pretrained(model, torch_dtype=dtype)
    if folder is not None:
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="tuned")
        pipeline.set_adapters("tuned", strength)
    return denoise(pipeline.transformer, spec, *inputs(spec))


@torch.no_grad()
def trained_velocity(run: Path, model: Path, method: dict, step: int = 3) -> torch.Tensor:
    """What training computes with the checkpoint: our loading alone."""
    config = run_config(model, run, run, method=method)
    transformer = load_transformer(config.model)
    config.method.apply(transformer, seed=0)
    config.method.load_state(transformer, load_file(run / f"checkpoints/step-{step:08d}/trainable.safetensors"))
    transformer.eval()
    spec = read_spec(str(model))
    return denoise(transformer, spec, *inputs(spec))


# ----------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "targets": "all-linear"},
        {"targets": "attention+ff", "alpha": 2.5, "dropout": 0.5},
    ],
    ids=["plain", "rslora", "dora", "dora-rslora-all", "fractional-alpha-dropout"],
)
def test_a_lora_means_the_same_to_the_stock_pipeline(tiny_model, tmp_path, options):
    model, method = tiny_model("5b"), LORA | options
    run = make_run(tmp_path, model, method)
    report = export(run)
    ours, theirs = trained_velocity(run, model, method), stock_velocity(model, report.folder)
    base = stock_velocity(model, None)
    assert (ours - base).abs().max() > 0.05  # the adapter does something, so that the next line says something
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert report.folder == run / "export" and report.max_abs_diff <= report.tolerance
    assert {LORA_FILE, "README.md", TRAINING_RECORD} <= set(report.files)
    assert str(report.folder) in str(report)


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_every_variant_exports(tiny_model, tmp_path, variant):
    model = tiny_model(variant)
    run = make_run(tmp_path, model, LORA)
    report = export(run, tmp_path / "out")
    torch.testing.assert_close(
        stock_velocity(model, report.folder), trained_velocity(run, model, LORA), rtol=0, atol=1e-5
    )


def test_strength_zero_is_the_base_to_the_bit(tiny_model, tmp_path):
    model = tiny_model("5b")
    folder = export(make_run(tmp_path, model, LORA)).folder
    assert torch.equal(stock_velocity(model, folder, strength=0.0), stock_velocity(model, None))
    assert not torch.equal(stock_velocity(model, folder, strength=0.5), stock_velocity(model, None))


def test_half_precision_stays_inside_the_stated_tolerance(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA | {"targets": "all-linear"}, dtype="bf16")
    report = export(run)
    assert 0 < report.max_abs_diff <= report.tolerance  # not zero: diffusers rounds the adapter to bfloat16
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


def test_dropout_in_the_header_would_act_when_sampling(tiny_model, tmp_path, monkeypatch):
    """Why it is left out: diffusers inserts adapters in training mode. And a canary: the forward pass notices."""
    theirs = CogVideoXPipeline.save_lora_weights.__func__

    def with_dropout(cls, *args, transformer_lora_adapter_metadata, **options):
        settings = transformer_lora_adapter_metadata | {"lora_dropout": 0.5}
        return theirs(cls, *args, transformer_lora_adapter_metadata=settings, **options)

    monkeypatch.setattr(CogVideoXPipeline, "save_lora_weights", classmethod(with_dropout))
    with pytest.raises(ExportError, match="predicted velocities differ"):
        export(make_run(tmp_path, tiny_model("5b"), LORA))


def test_the_starting_adapter_may_be_gone(tiny_model, tmp_path):
    model = tiny_model("5b")
    first = export(make_run(tmp_path / "a", model, LORA)).folder
    run = make_run(tmp_path / "b", model, LORA | {"init_from": str(first)})
    (first / LORA_FILE).unlink()
    assert export(run).max_abs_diff == 0


# ----------------------------------------------------------------------------------------------------------------- full


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_full_fine_tuning_becomes_a_transformer_folder(tiny_model, tmp_path, dtype):
    from diffusers import CogVideoXTransformer3DModel

    run = make_run(tmp_path, tiny_model("5b"), FULL, dtype=dtype)
    report = export(run)
    theirs = CogVideoXTransformer3DModel.from_pretrained(
        report.folder, subfolder="transformer", torch_dtype=WIDTHS[dtype]
    )
    trained = load_file(run / "checkpoints/step-00000003/trainable.safetensors")
    assert all(torch.equal(parameter, trained[name]) for name, parameter in theirs.named_parameters())
    stored = load_file(report.folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {theirs.dtype}
    assert report.max_abs_diff == 0


def test_a_full_pipeline_is_complete(tiny_model, tmp_path):
    model = tiny_model("1.5-5b-i2v")
    run = make_run(tmp_path, model, FULL)
    folder = export(run, tmp_path / "out", full_pipeline=True).folder
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }
    torch.testing.assert_close(stock_velocity(folder, None), trained_velocity(run, model, FULL), rtol=0, atol=1e-5)
    assert (model / "vae/config.json").read_bytes() == (folder / "vae/config.json").read_bytes()


def test_an_average_is_exported_where_one_was_kept(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), FULL, dtype="bf16", ema=True)
    averaged, raw = export(run, tmp_path / "averaged"), export(run, tmp_path / "raw", weights="raw")
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    name = "proj_out.weight"
    ours = load_file(averaged.folder / "transformer/diffusion_pytorch_model.safetensors")[name]
    theirs = load_file(raw.folder / "transformer/diffusion_pytorch_model.safetensors")[name]
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs * 0.5, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what must not get out


def nothing_left(run: Path) -> bool:
    return not (run / "export").exists() and not list(run.glob("*.partial"))


def test_a_lora_without_its_alpha_is_deleted(tiny_model, tmp_path, monkeypatch):
    theirs = CogVideoXPipeline.save_lora_weights.__func__

    def without(cls, *args, transformer_lora_adapter_metadata, **options):
        return theirs(cls, *args, **options)

    monkeypatch.setattr(CogVideoXPipeline, "save_lora_weights", classmethod(without))
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    with pytest.raises(ExportError, match=r"counts 1\.0 instead of 0\.5.*velocities differ"):
        export(run)
    assert nothing_left(run)


def test_a_missing_alpha_is_noticed_also_where_the_adapter_is_weak(tiny_model, tmp_path, monkeypatch):
    """In bfloat16 a barely trained adapter moves the output by less than rounding does: the forward pass is blind."""
    theirs = CogVideoXPipeline.save_lora_weights.__func__

    def without(cls, *args, transformer_lora_adapter_metadata, **options):
        return theirs(cls, *args, **options)

    monkeypatch.setattr(CogVideoXPipeline, "save_lora_weights", classmethod(without))
    run = make_run(tmp_path, tiny_model("5b"), LORA, scale=1e-3, dtype="bf16")
    with pytest.raises(ExportError) as caught:
        export(run)
    assert caught.value.what.endswith("counts 1.0 instead of 0.5 (alpha / rank)")


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("damage", ["one number", "one tensor less"])
def test_a_tampered_file_is_deleted(tiny_model, tmp_path, monkeypatch, method, damage):
    write = export_module._write_weights

    def tampering(found, spec, folder, device, merge_at):
        trained = write(found, spec, folder, device, merge_at)
        (path,) = folder.rglob("*.safetensors")
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        name = sorted(tensors)[0]
        if damage == "one number":
            tensors[name].view(-1)[0] += 1e-3
        else:
            del tensors[name]
        save_file(tensors, path, metadata=header)
        return trained

    monkeypatch.setattr(export_module, "_write_weights", tampering)
    run = make_run(tmp_path, tiny_model("5b"), method)
    with pytest.raises(ExportError, match=r"1 of \d+ tensors differ|tensors are on one side|cannot be loaded|missing"):
        export(run)
    assert nothing_left(run)


def test_a_pass_that_gives_no_number_fails(tiny_model, tmp_path, monkeypatch):
    real, calls = verify.forward, []

    def broken(*args):
        calls.append(1)
        return real(*args) * float("nan")

    monkeypatch.setattr(verify, "forward", broken)
    with pytest.raises(ExportError, match="differ by up to nan"):
        export(make_run(tmp_path, tiny_model("5b"), LORA))
    assert calls


def test_a_failed_export_leaves_the_earlier_one(tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    before = (export(run).folder / LORA_FILE).read_bytes()
    monkeypatch.setattr(verify, "tolerance_of", lambda *args: -1.0)
    with pytest.raises(ExportError):
        export(run)
    assert (run / "export" / LORA_FILE).read_bytes() == before
    assert not list(run.glob("*.partial"))


def test_never_two_transformers_at_once(tiny_model, tmp_path, monkeypatch):
    import gc
    import weakref

    alive = []

    def counted(module):
        load = module.load_transformer

        def spy(*args, **options):
            gc.collect()
            assert [reference() for reference in alive if reference() is not None] == []
            transformer = load(*args, **options)
            alive.append(weakref.ref(transformer))
            return transformer

        monkeypatch.setattr(module, "load_transformer", spy)

    counted(export_module)
    counted(verify)
    for name, method in (("lora", LORA), ("full", FULL)):
        export(make_run(tmp_path / name, tiny_model("5b"), method))
    assert len(alive) == 4


# ---------------------------------------------------------------------------------------------- which checkpoint, where


def test_latest_best_and_named_checkpoints(tiny_model, tmp_path):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LORA, step=2)
    make_run(tmp_path, model, LORA, step=4, best_step=2)
    assert export(run, tmp_path / "a").step == 4
    assert export(run, tmp_path / "b", checkpoint="best").step == 2
    named = export(run / "checkpoints" / "step-00000002", tmp_path / "c")
    assert named.step == 2
    last, best, second = (load_file(tmp_path / name / LORA_FILE) for name in "abc")
    assert all(torch.equal(best[name], second[name]) and not torch.equal(best[name], last[name]) for name in best)


def test_a_base_model_that_moved(tiny_model, tmp_path):
    model = tiny_model("5b")
    run = make_run(tmp_path, model, LORA)
    state = run / "checkpoints/step-00000003"
    moved = make_moved(state, tmp_path / "elsewhere/step-00000003")
    assert export(moved, pretrained=str(model)).folder == tmp_path / "elsewhere/step-00000003-export"


def make_moved(source: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, target))


def test_requests_that_cannot_be_met(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    with pytest.raises(ExportError, match="no moving average"):
        export(run, weights="ema")
    with pytest.raises(ExportError, match="no held-out loss was measured"):
        export(run, checkpoint="best")
    with pytest.raises(ExportError, match="no pipeline of its own"):
        export(run, full_pipeline=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export(tmp_path)
    with pytest.raises(CheckpointError):
        export(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="checkpoint is 'step-00000003'"):
        export(run, checkpoint="step-00000003")
    with pytest.raises(ExportError, match="weights is 'EMA'"):
        export(run, weights="EMA")
    with pytest.raises(ExportError, match="not a number"):
        export(run, merged=True, strength="half")


def test_a_place_that_cannot_be_written_is_found_before_the_checkpoint_is_read(tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        export(tmp_path / "nowhere", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(export_module, "find_source", lambda *_: pytest.fail("the checkpoint was read"))
    with pytest.raises(ExportError, match="cannot be written"):
        export(run, tmp_path / "file" / "out")
    with pytest.raises(ExportError, match="No space left"), disk(fail_at=0):
        export(run, tmp_path / "out")
    with pytest.raises(pytest.fail.Exception, match="the checkpoint was read"):
        export(run, tmp_path / "out")


def test_only_an_earlier_export_is_replaced(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    precious = tmp_path / "precious"
    precious.mkdir()
    export(run, precious)  # an empty folder will do
    export(run, precious)  # and so will an export
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for other in ("thesis", "file"):
        with pytest.raises(ExportError, match="not an earlier export"):
            export(run, tmp_path / other)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


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
    assert sorted(path.name for path in run.iterdir() if path.name != "checkpoints") == ["export", elsewhere.name]


def test_an_export_that_is_under_way_loses_nothing_to_another(tiny_model, tmp_path):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    theirs = run / "export.4711-00aa11bb.partial"
    theirs.mkdir()
    with locks.hold(run / ".export.exporting", {}):
        export(run)
        assert theirs.is_dir()
    export(run)
    assert not theirs.exists(), "it would not have survived without its lease"


def test_a_linked_place_stays_a_link_and_the_current_folder_is_refused(tiny_model, tmp_path, monkeypatch):
    run = make_run(tmp_path, tiny_model("5b"), LORA)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):
        export(run, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / LORA_FILE).is_file()
    monkeypatch.chdir(tmp_path / "disk")
    for here in (Path(), tmp_path / "link"):
        with pytest.raises(ExportError, match="the folder that this command runs in"):
            export(run, here)


# ----------------------------------------------------------------------------------------------------------- model card


def item(clip: str, caption: str, *, holdout: bool = False) -> ManifestItem:
    return ManifestItem(clip, "metadata.jsonl:1", caption, Bucket(9, 64, 64), 1.0, holdout, "k" + clip, "p", "m")


NASTY = "a `red`` ring | <img src=x onerror=alert(1)> [x](y)\n# heading"


def run_with_history(tmp_path: Path, model: Path, **changes) -> Path:
    items = (item("a", "a red ring"), item("b", NASTY), item("c", "a blue ring", holdout=True))
    manifest = Manifest(items=items, empty_prompt_key="e", request={"x": 1}, inputs={})
    Cache(tmp_path / "cache").save_manifest(manifest, tmp_path)
    run = make_run(
        tmp_path,
        model,
        LORA,
        cache_digest=manifest.digest,
        cache={"dir": str(tmp_path / "cache")},
        validation={"samples": [{"prompt": "a red ring", "seed": 4}], "num_inference_steps": 1},
        data={"trigger": "r1ng"},
        **changes,
    )
    losses = {0: 0.5, 3: 0.25, 4: 9.0}
    rows = [{"step": step, "heldout": loss, "trainsubset": loss, "by_band": {}} for step, loss in losses.items()]
    (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, content in ((0, b"old"), (3, b"new"), (4, b"later")):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "00-seed4.mp4").write_bytes(content)
    return run


def test_the_model_card_tells_what_was_done(tiny_model, tmp_path):
    folder = export(run_with_history(tmp_path, tiny_model("5b"))).folder
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "diffusers" and values["pipeline_tag"] == "text-to-video"
    assert "lora" in values["tags"] and values["instance_prompt"] == "r1ng"
    assert "base_model" not in values  # a folder on this machine is no id on the hub
    for words in (
        "2 clips",
        "2 of 9x64x64",
        "1 held out",
        "`a red ring`",
        "rank 4, alpha 2",
        "0.5000, at step 3 0.2500",
    ):
        assert words in body, words
    assert (folder / "samples/00-seed4.mp4").read_bytes() == b"new"
    assert "[00-seed4.mp4](samples/00-seed4.mp4): `a red ring`" in body


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "Sampled at step 3, with the averaged weights of this export."),
        ({"merged": True}, "Sampled at step 3, with the averaged weights that were then merged."),
        ({"merged": True, "strength": 0.5}, None),
        ({"weights": "raw"}, None),
        ({"checkpoint": "best"}, None),
    ],
    ids=["as trained", "merged", "half strength", "not the average", "a step without samples"],
)
def test_what_the_card_shows_was_sampled_with_the_exported_weights(tiny_model, tmp_path, options, shown):
    """The rounds of steps 0, 3 and 4 stand there in every case: a card of another step once showed one of them."""
    samples = {"samples": [{"prompt": "a red ring", "seed": 4}]}
    make_run(tmp_path, tiny_model("5b"), LORA, step=2, ema=True, validation=samples)
    run = run_with_history(tmp_path, tiny_model("5b"), ema=True, best_step=2)
    report = export(str(run), str(tmp_path / "out"), **options)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    videos = [path.read_bytes() for path in (tmp_path / "out").rglob("*.mp4")]
    assert (videos == [b"new"] and shown in card) if shown else (videos == [] and "## Samples" not in card)
    assert ("the card shows no video" in str(report)) == (shown is None)
    foreign = "Measured with the averaged weights at strength 1, not with this export's." in card
    assert foreign == (options.get("weights") == "raw" or options.get("strength") == 0.5)


def test_an_export_names_a_better_checkpoint_that_stands(tiny_model, tmp_path):
    make_run(tmp_path, tiny_model("5b"), LORA, step=2)
    run = run_with_history(tmp_path, tiny_model("5b"), best_step=2)
    rows = [{"step": step, "heldout": loss, "trainsubset": 0.1, "by_band": {}} for step, loss in ((2, 0.2), (3, 0.25))]
    (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    better = (
        f"note: step 2 has a lower held-out loss, 0.2000; step 3 has 0.2500: finetune export {run} --checkpoint best"
    )
    assert better in str(export(run))
    assert "lower held-out" not in str(export(run, checkpoint="best"))
    (run / HISTORY).write_text(json.dumps(rows[0] | {"heldout": 0.3}) + "\n" + json.dumps(rows[1]) + "\n")
    assert "lower held-out" not in str(export(run))
    (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert "lower held-out" not in str(export(run))


def test_captions_cannot_act_as_markup(tiny_model, tmp_path):
    folder = export(run_with_history(tmp_path, tiny_model("5b"))).folder
    (line,) = [line for line in (folder / "README.md").read_text().splitlines() if "onerror" in line]
    assert line == "- ```a `red`` ring | <img src=x onerror=alert(1)> [x](y) # heading```"
    assert _code("`x`") == "`` `x` ``"
    assert len(_code("x" * 1000)) < 300


def test_a_run_without_history_still_has_a_card(tiny_model, tmp_path):
    folder = export(make_run(tmp_path, tiny_model("1.5-5b-i2v"), FULL)).folder
    card = (folder / "README.md").read_text()
    assert "Not measured." in card and "was not at hand" in card and "pipeline_tag: image-to-video" in card


@pytest.mark.parametrize(
    ("variant", "method", "full_pipeline"),
    [("5b", LORA, False), ("1.5-5b-i2v", FULL, False), ("1.5-5b", FULL, True)],
)
def test_the_card_s_code_runs_as_it_stands(tiny_model, tmp_path, monkeypatch, variant, method, full_pipeline):
    from PIL import Image

    """Where ``finetune export`` was typed, with the folder named as it was there."""
    run = make_run(tmp_path, tiny_model(variant), method, validation={"num_inference_steps": 1})
    monkeypatch.chdir(tmp_path)
    folder = export(run.relative_to(tmp_path), full_pipeline=full_pipeline).folder
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"'{run.name}/export'" in code
    Image.new("RGB", (64, 64), (200, 0, 0)).save("first_frame.png")
    exec(code, {})
    assert Path("video.mp4").stat().st_size > 0


def test_the_card_s_command_is_one(tiny_model, tmp_path):
    for variant, method in (("5b", LORA), ("1.5-5b-i2v", FULL)):
        run = make_run(tmp_path / variant, tiny_model(variant), method, data={"trigger": "r1ng's"})
        report = export(run)
        line = (report.folder / "README.md").read_text().split("```bash\n")[1].split("\n")[0]
        program, *words = shlex.split(line)
        arguments = build_parser().parse_args(words)
        assert (program, arguments.verb, arguments.prompt) == ("finetune", "generate", ["r1ng's"])
        assert (arguments.adapter, arguments.transformer) in (([str(report.folder)], None), ([], report.folder))
        assert report.command == line


def test_what_training_sampled_is_what_the_export_samples(tiny_model, tmp_path):
    model, method = tiny_model("5b"), LORA
    run = make_run(tmp_path, model, method)
    config = run_config(model, run, run, method=method)
    transformer = load_transformer(config.model)
    config.method.apply(transformer, seed=1)
    config.method.load_state(transformer, load_file(run / "checkpoints/step-00000003/trainable.safetensors"))
    spec = read_spec(str(model))
    empty, prompt = encode_prompts(*load_text(config.model), ["", "a red ring"], spec)
    (ours,) = sample_videos(
        spec,
        transformer,
        load_scheduler(config.model),
        load_vae(config.model),
        [SampleRequest(prompt, empty, seed=5, bucket=Bucket(9, 32, 48))],
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    report = generate(
        GenerateRequest(
            base=str(model),
            prompts=(SamplePrompt(prompt="a red ring", seed=5),),
            out=tmp_path / "out",
            adapters=(AdapterArgument(export(run).folder),),
            bucket=Bucket(9, 32, 48),
            num_inference_steps=2,
            guidance_scale=3.0,
        )
    )
    assert np.array_equal(report.frames[0], ours)


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

    def frames(path: Path) -> np.ndarray:
        request = GenerateRequest(
            base=None,
            prompts=(SamplePrompt(prompt="a red ring", seed=5),),
            out=tmp_path / "out",
            adapters=(AdapterArgument(path),),
            bucket=Bucket(9, 32, 48),
            num_inference_steps=1,
            guidance_scale=1.0,
        )
        return generate(request).frames[0]

    exported = frames(export(run).folder)
    assert np.array_equal(frames(newest), exported) and "newest" not in caplog.text
    assert np.array_equal(frames(run), exported)
    assert f"--adapter {run}: the run's newest checkpoint is used, step 3" in caplog.text
    assert f"the lowest held-out loss is step 2's: --adapter {older}" in caplog.text
    assert not np.array_equal(frames(older), exported)


def test_published_names_hide_local_paths(tiny_model, tmp_path):
    folder = export(run_with_history(tmp_path, tiny_model("5b"))).folder
    assert str(tmp_path) not in (folder / TRAINING_RECORD).read_text()
