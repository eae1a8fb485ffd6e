"""One chain of digests: the base that a run was trained on is the one it resumes, exports and samples with."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from worlds import run_config

from finetune import export
from finetune.checkpoint.load import load_checkpoint
from finetune.cogvideox.config import MergedAdapter
from finetune.cogvideox.load import ModelConfig, base_digest, load_transformer, require_as_sent
from finetune.cogvideox.model_files import hub_sha256
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.conversion import export as export_module
from finetune.core.checksums import digest_file, folder_checksums
from finetune.core.errors import CheckpointError, ConfigError, DataError, ExportError, FinetuneError, ModelError
from finetune.core.files import COMPLETE
from finetune.datasets.cache import Cache
from finetune.inference.adapters import TRAINING_RECORD
from finetune.inference.generate import generate
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt
from finetune.memory.quantized_linear import placement
from finetune.trainers.loop import train
from finetune.trainers.setup import _same_base

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
SETTINGS = Path("transformer", "config.json")
QUERY = "transformer_blocks.{}.attn1.to_q.weight"


def digest_of(model: Path, **options: object) -> str:
    return base_digest(load_transformer(ModelConfig(pretrained=str(model)), **options))


# ------------------------------------------------------------------------------------------------------------- changes


def flip(model: Path) -> None:
    content = bytearray((model / WEIGHTS).read_bytes())
    content[-1000] ^= 1
    (model / WEIGHTS).write_bytes(content)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})


def noise(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.update({name: torch.randn_like(t) for name, t in tensors.items()}))


def swap(model: Path) -> None:
    first, second = QUERY.format(0), QUERY.format(1)
    rewrite(model, lambda tensors: tensors.update({first: tensors[second], second: tensors[first]}))


def other_settings(model: Path) -> None:
    content = json.loads((model / SETTINGS).read_text())
    (model / SETTINGS).write_text(json.dumps(content | {"norm_eps": 1e-3}))


CHANGES = [flip, noise, swap, other_settings]


# ------------------------------------------------------------------------------------------------------------ the rule


def test_the_digest_is_of_tensors_and_settings_not_of_files(tiny_model, tmp_path):
    model = tiny_model()
    known = digest_of(model)
    sharded = tmp_path / "sharded"
    shutil.copytree(model, sharded)
    (sharded / WEIGHTS).unlink()
    load_transformer(ModelConfig(pretrained=str(model))).save_pretrained(sharded / "transformer", max_shard_size="50KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    content = json.loads((sharded / SETTINGS).read_text())
    del content["norm_eps"]  # a default; what follows is who wrote it, and where it was loaded from
    (sharded / SETTINGS).write_text(json.dumps(content | {"_diffusers_version": "0.1", "_name_or_path": "elsewhere"}))
    assert digest_of(sharded) == known
    # In whatever form and dtype the weights are held.
    assert digest_of(model, dtype=torch.float16) == digest_of(model, placement=placement("int8")) == known


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_another_digest(tiny_model, tmp_path, change):
    shutil.copytree(tiny_model(), tmp_path / "model")
    known = digest_of(tmp_path / "model")
    change(tmp_path / "model")
    assert digest_of(tmp_path / "model") != known


# ----------------------------------------------------------------------------------------------------------- the chain


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, tiny_model, demo_clips, tmp_path_factory) -> RunConfig:
    """A run of two of four steps, with a base of its own and an export."""
    root = tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny_model(), root / "model")
    method = {} if request.param == "lora" else {"method": {"kind": "full"}}
    config = run_config(root / "model", demo_clips, root / "run", train={"steps": 2}, **method)
    train(config)
    export(config.output_dir)
    return config


def longer(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})


def sampled(config: RunConfig, out: Path) -> GenerateRequest:
    whole = config.method.kind == "full"
    return GenerateRequest(
        base=config.model.pretrained,
        prompts=(VideoPrompt(prompt="a red circle"),),
        out=out,
        adapters=() if whole else (AdapterArgument(config.output_dir / "export"),),
        transformer=config.output_dir / "export" if whole else None,
        bucket=read_spec(config.model.pretrained).training_bucket,
        num_inference_steps=1,
        guidance_scale=1,
    )


@pytest.fixture
def changed(trained, tmp_path):
    """``changed(change)``: the base changed until the test ends."""
    model = Path(trained.model.pretrained)
    shutil.copytree(model, tmp_path / "before")
    yield lambda change: change(model)
    shutil.rmtree(model)
    shutil.copytree(tmp_path / "before", model)


def test_the_digest_stands_in_checkpoint_and_export(trained):
    known = digest_of(Path(trained.model.pretrained))
    assert load_checkpoint(trained.output_dir / "checkpoints" / "step-00000002").state.base == known
    assert json.loads((trained.output_dir / "export" / TRAINING_RECORD).read_text())["base_digest"] == known


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_is_refused_at_resume_export_and_generate(trained, changed, change, tmp_path):
    changed(change)
    steps: list[tuple[type[FinetuneError], Callable[[], object]]] = [
        (CheckpointError, lambda: train(longer(trained))),
        (ExportError, lambda: export(trained.output_dir, tmp_path / "export")),
    ]
    if trained.method.kind == "lora":
        steps.append((ConfigError, lambda: generate(sampled(trained, tmp_path / "out"))))
    for kind, act in steps:
        with pytest.raises(kind, match=r"not the base transformer that .* was trained on") as caught:
            act()
        known = load_checkpoint(trained.output_dir / "checkpoints" / "step-00000002").state.base
        assert known in str(caught.value) and trained.model.pretrained in str(caught.value)
    assert not (tmp_path / "export").exists() and not list(tmp_path.rglob("*.mp4"))
    assert [path.name for path in (trained.output_dir / "checkpoints").iterdir()] == ["step-00000002"]


def test_without_the_comparison_noise_would_be_trained_on(trained, changed, tmp_path, monkeypatch):
    """Canary: what the issue saw, exit code 0 on a base of noise."""
    changed(noise)
    shutil.copytree(trained.output_dir, tmp_path / "run")
    monkeypatch.setattr("finetune.trainers.setup.require_base", lambda *_, **__: None)
    monkeypatch.setattr(export_module, "require_base", lambda *_, **__: None)
    config = longer(trained).model_copy(update={"output_dir": tmp_path / "run"})
    assert train(config).step == 4
    assert export(tmp_path / "run", tmp_path / "export").step == 4


def test_what_was_saved_before_digests_is_taken_with_a_word(trained, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained.output_dir, run)
    checkpoint = run / "checkpoints" / "step-00000002"
    content = json.loads((checkpoint / "state.json").read_text())
    del content["state"]["base"]
    (checkpoint / "state.json").write_text(json.dumps(content))
    (checkpoint / COMPLETE).unlink()
    (checkpoint / COMPLETE).write_text(folder_checksums(checkpoint))
    report = export(run)
    assert "does not record which base" in str(report)
    assert json.loads((run / "export" / TRAINING_RECORD).read_text())["base_digest"] is None
    config = longer(trained).model_copy(update={"output_dir": run})
    assert train(config).step == 4
    assert "step-00000002 does not record which base" in capsys.readouterr().out
    assert load_checkpoint(run / "checkpoints" / "step-00000004").state.base
    if trained.method.kind == "lora":
        with caplog.at_level(logging.WARNING):
            generate(sampled(config, tmp_path / "out"))
        assert "does not say which weights of the base" in caplog.text


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
@pytest.mark.parametrize(
    ("source", "merged"), [("export", False), ("checkpoints/step-00000002", False), ("export", True)]
)
def test_an_adapter_that_is_carried_over_to_another_base_is_told_of(trained, changed, source, merged, tmp_path, capsys):
    path = trained.output_dir / source
    changes = {"method": trained.method.model_copy(update={"init_from": path})}
    if merged:
        changes = {"model": trained.model.model_copy(update={"adapters": (MergedAdapter(path=path),)})}
    config = trained.model_copy(update={**changes, "output_dir": tmp_path / "same"})
    train(config)
    assert "another base transformer" not in capsys.readouterr().out
    changed(flip)
    assert train(config.model_copy(update={"output_dir": tmp_path / "other"})).step == 2
    assert "was trained on another base transformer than this one" in capsys.readouterr().out


def test_a_base_that_moved_is_known_by_its_digest(trained, tmp_path):
    shutil.copytree(trained.model.pretrained, tmp_path / "moved")
    shutil.copytree(trained.output_dir, tmp_path / "run")
    model = trained.model.model_copy(update={"pretrained": str(tmp_path / "moved")})
    config = longer(trained).model_copy(update={"model": model, "output_dir": tmp_path / "run"})
    flip(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="not the base transformer that this run was trained on"):
        train(config)
    shutil.copy(Path(trained.model.pretrained) / WEIGHTS, tmp_path / "moved" / WEIGHTS)
    assert train(config).step == 4


@pytest.mark.parametrize("trained", ["full"], indirect=True)
def test_a_damaged_export_is_refused_as_a_model(trained, tmp_path):
    config = trained.model_copy(update={"output_dir": tmp_path})
    shutil.copytree(trained.output_dir / "export", tmp_path / "export")
    generate(sampled(config, tmp_path / "out"))
    flip(tmp_path / "export")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.safetensors is not as it was written"):
        generate(sampled(config, tmp_path / "out"))
    (tmp_path / "export" / COMPLETE).unlink()  # on purpose
    generate(sampled(config, tmp_path / "out"))


def test_processes_that_read_different_bases_are_told_apart(tiny_model):
    config = run_config(tiny_model(), Path("clips"), Path("run"))
    module = load_transformer(config.model)
    for others, told in ((lambda work: [work(), work()], False), (lambda work: [work(), "0" * 32], True)):
        ranks = SimpleNamespace(run_on_all=others)
        with pytest.raises(ModelError, match="different base") if told else nullcontext():
            assert _same_base(module, config, None, ranks) == base_digest(module)


# --------------------------------------------------------------------------------------------------- the hub's own hash


def from_hub(model: Path, place: Path, kind: str) -> Path:
    """A copy of ``model`` as the hub's client leaves it: in its cache, or in a folder of one's own."""
    sha256 = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    folder = place / ("snapshots/" + "0" * 40 if kind == "cache" else "model")
    shutil.copytree(model, folder)
    if kind == "cache":
        (place / "blobs").mkdir()
        (folder / WEIGHTS).rename(place / "blobs" / sha256)
        (folder / WEIGHTS).symlink_to(place / "blobs" / sha256)
    else:
        note = folder / ".cache" / "huggingface" / "download" / f"{WEIGHTS}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{sha256}\n1700000000.0\n")
    return folder


@pytest.mark.parametrize("kind", ["cache", "folder"])
def test_a_base_that_is_not_what_the_hub_sent_is_refused_before_training(kind, tiny_model, demo_clips, tmp_path):
    folder = from_hub(tiny_model(), tmp_path / "hub", kind)
    config = run_config(folder, demo_clips, tmp_path / "run", train={"steps": 1})
    assert train(config).step == 1
    flip(folder)
    again = config.model_copy(update={"output_dir": tmp_path / "again"})
    with pytest.raises(ModelError, match="damaged: its SHA-256") as caught:
        train(again)
    assert str(folder / WEIGHTS) in str(caught.value) and not (tmp_path / "again" / "checkpoints").exists()


def test_a_hash_is_taken_once_and_only_of_what_the_hub_sent(tiny_model, tmp_path, monkeypatch):
    folder = from_hub(tiny_model(), tmp_path / "hub", "cache")
    monkeypatch.setattr("finetune.datasets.cache.YOUNG_S", 0)
    read = []
    monkeypatch.setattr(
        "finetune.datasets.cache.digest_file",
        lambda path, *others: read.append(path) or digest_file(path, *others),
    )
    cache = Cache(tmp_path / "cache")
    cache.root.mkdir()  # without one nothing is remembered
    for _ in range(2):
        require_as_sent(folder, "transformer", cache.digest_file)
    assert read == [folder / WEIGHTS] and hub_sha256(folder / SETTINGS) is None
    require_as_sent(tiny_model(), "transformer", cache.digest_file)
    assert len(read) == 1


def test_a_damaged_clip_from_the_hub_is_named(tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / hashlib.sha256(b"a clip").hexdigest()
    blob.write_bytes(b"a clap")
    with pytest.raises(DataError, match="damaged"):
        Cache(tmp_path / "cache").stamp(blob)
