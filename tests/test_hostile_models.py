"""Checkpoints from strangers: nothing runs, nothing else is read, one version is used; and cards that are only read."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file
from transformers import T5EncoderModel
from worlds import fabricate_cache, merged, run_values

from finetune.checkpoint.compare import require_same_run
from finetune.cogvideox.captions import _fault_in_a_process, load_tokenizer
from finetune.cogvideox.components import CONFIG_FILES, PARTS, TokenizerSettings, require_plain_index
from finetune.cogvideox.encode import encode_prompts, encode_video
from finetune.cogvideox.load import ModelConfig, load_scheduler, load_text, load_transformer, load_vae
from finetune.cogvideox.model_files import is_commit, known_model, pin_revision, resolve_pretrained
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import pin_model
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import CheckpointError, ConfigError, ModelError
from finetune.core.files import LORA_FILE, publish_dir
from finetune.inference.adapters import TRAINING_RECORD, TrainingRecord, read_record, read_sources
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt, read_prompts, request_faults
from finetune.trainers.loop import train

SHA_A, SHA_B = "a" * 40, "b" * 40


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_model("5b"), tmp_path / "model"))


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(pretrained=str(folder), dtype="fp32")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.folder),)


# ------------------------------------------------------------------------------------------------------ nothing is run

LOADERS = {
    "transformer": (load_transformer, "diffusion_pytorch_model"),
    "vae": (load_vae, "diffusion_pytorch_model"),
    "text_encoder": (load_text, "pytorch_model"),
}


@pytest.mark.parametrize("component", LOADERS)
@pytest.mark.parametrize("guarded", [True, False])
def test_a_pickle_is_never_opened(model, component, guarded, monkeypatch):
    load, stem = LOADERS[component]
    for path in (model / component).glob("*.safetensors"):
        path.unlink()
    bomb = model / component / f"{stem}.bin"
    owned = model / "owned"
    torch.save({"x": Bomb(owned)}, bomb)
    if not guarded:  # without our own look the libraries are still told to read safetensors alone
        monkeypatch.setattr("finetune.cogvideox.load.require_loadable", lambda folder, component: None)
    with pytest.raises(ModelError) as caught:
        load(config_of(model))
    assert not owned.exists()
    if guarded:
        assert f"{stem}.bin, a format that can run code" in str(caught.value) and "save_file" in caught.value.fix
    torch.load(bomb, weights_only=False)
    assert owned.exists(), "canary: the bomb is live"


def test_code_that_a_checkpoint_names_is_not_run(model):
    (model / "text_encoder" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(model / 'owned')!r}).mkdir()")
    (model / "transformer" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(model / 'owned')!r}).mkdir()")
    named = {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    for file in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "transformer/config.json"):
        edit(model / file, **named)
    load_text(config_of(model))
    load_transformer(config_of(model))
    assert not (model / "owned").exists()


@pytest.mark.parametrize(
    ("component", "changes", "said"),
    [
        ("text_encoder", {"attn_implementation": "evil/kernel"}, "fetch from the hub as code"),
        ("text_encoder", {"quantization_config": {"quant_method": "bitsandbytes"}}, "stored quantized"),
        ("transformer", {"quantization_config": {"quant_method": "torchao"}}, "stored quantized"),
        ("transformer", {"num_layers": 10**9}, "num_layers: Input should be less than or equal to 1000"),
        ("transformer", {"num_layers": 10**6}, "less than or equal to 1000"),
        ("transformer", {"time_embed_dim": 10**12}, "time_embed_dim"),
        ("transformer", {"num_layers": -(10**30)}, "num_layers: Input should be greater than 0"),
        ("vae", {"layers_per_block": 10**5}, "layers_per_block"),
        ("vae", {"block_out_channels": [8] * 20_000}, "block_out_channels: List should have at most 8 items"),
        ("vae", {"sample_height": "x" * 20_000}, "sample_height: Input should be a valid integer"),
        ("text_encoder", {"num_layers": 10**7}, "num_layers"),
        ("text_encoder", {"vocab_size": 10**10}, "vocab_size"),
        ("scheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("scheduler", {"trained_betas": [0.1] * 100_001}, "trained_betas"),
        ("vae", {"latents_mean": [0.0] * 100_001}, "latents_mean: List should have at most 100000 items"),
        ("vae", {"latents_std": [1e300]}, "latents_std.0"),
        ("vae", {"shift_factor": 1e300}, "shift_factor"),
    ],
)
def test_json_that_would_take_all_memory_or_act_is_refused_before_it_is_loaded(model, component, changes, said):
    file = "scheduler_config.json" if component == "scheduler" else "config.json"
    edit(model / component / file, **changes)
    loaders = {"scheduler": load_scheduler, **{name: load for name, (load, _) in LOADERS.items()}}
    for attempt in (lambda: read_spec(str(model)), lambda: loaders[component](config_of(model))):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert said in str(caught.value) and component in str(caught.value)


WRONG = ("x", [1], {}, None, True, -1, 0, 7, 10**9, 1e300, 0.5, [[1]])
"""Put in place of every value of every component's JSON."""


def used(model: Path, component: str) -> None:
    """What training does with a component, as far as its JSON decides it."""
    spec = read_spec(str(model)) if component != "tokenizer" else None
    if component == "transformer":
        load_transformer(config_of(model))
    elif component == "vae":
        encode_video(load_vae(config_of(model)), torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    elif component == "scheduler":
        scheduler = load_scheduler(config_of(model))
        scheduler.set_timesteps(1)
        assert scheduler.alphas_cumprod.isfinite().all()
    elif component == "tokenizer":
        load_tokenizer(config_of(model)).encode("a red circle")
    else:
        tokenizer, encoder = load_text(config_of(model))
        assert encode_prompts(tokenizer, encoder, ["a red circle"], spec).isfinite().all()


@pytest.mark.parametrize("component", [*CONFIG_FILES, "tokenizer"])
def test_no_wrong_value_of_a_component_s_json_gets_past_a_named_error(model, component, monkeypatch):
    """Every value is replaced by every wrong one: it is refused by name, or does not matter to what is built."""
    path = model / CONFIG_FILES.get(component, "tokenizer/tokenizer_config.json")
    whole = json.loads(path.read_text())
    monkeypatch.setattr("finetune.cogvideox.captions._fault_in_a_process", lambda *_: "")
    refused, used_fields = 0, PARTS.get(component, TokenizerSettings).model_fields
    for key in [*used_fields, "output_attentions", "torch_dtype"]:
        name = f"_{key}" if key == "class_name" else key
        for wrong in WRONG:
            path.write_text(json.dumps(whole | {name: wrong}))
            try:
                used(model, component)
            except ModelError as error:
                refused += 1
                fits = any(told in str(error) for told in ("cannot be loaded: ", "do not fit together", "but the"))
                assert component in str(error).lower() and (key in str(error) or fits), (key, wrong)
    assert refused > 5 * len(used_fields), "canary"


def test_without_its_types_json_ends_as_a_traceback(model, monkeypatch):
    """Canary: what reaches a library unread is not an error of ours."""
    edit(model / "vae/config.json", norm_num_groups="2")
    monkeypatch.setattr("finetune.cogvideox.load.require_loadable", lambda folder, component: None)
    monkeypatch.setattr("finetune.cogvideox.load._class_of", lambda *_: AutoencoderKLCogVideoX)
    monkeypatch.setattr("finetune.cogvideox.load.loading", lambda component, folder: nullcontext())
    with pytest.raises(TypeError):
        load_vae(config_of(model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_height": 65_000, "sample_width": 65_000, "sample_frames": 9}, "table of positions would hold"),
        ({"num_attention_heads": 0}, "greater than 0"),
        ({"attention_head_dim": "64x"}, "valid integer"),
        ({"text_embed_dim": 100_000}, "less than or equal to 65536"),
    ],
)
def test_numbers_that_are_legal_one_by_one(tmp_path, changes, said):
    folder = Path(shutil.copytree(known_model("2b"), tmp_path / "model"))
    edit(folder / "transformer/config.json", **changes)
    with pytest.raises(ModelError, match=said):
        read_spec(str(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"num_layers": ' + b"9" * 10_000 + b"}", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        (b"[]", "JSON list"),
        (b" " * (1 << 26) + b"{}", "more than 67,108,864 bytes"),
        (b'{"_class_name": "\x1b[2J"}', "cannot be read"),
    ],
)
def test_files_that_are_no_json_of_a_model(tmp_path, content, said):
    folder = Path(shutil.copytree(known_model("5b"), tmp_path / "model"))
    for file in ("transformer/config.json", "model_index.json"):
        kept = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(ModelError, match=said) as caught:
            read_spec(str(folder))
        assert "\x1b" not in str(caught.value)
        (folder / file).write_bytes(kept)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x": "../../secret.safetensors"}, {"x": "/etc/secret.safetensors"}, {"x": "sub/y.safetensors"},
        {"x": "..\\y.safetensors"}, {"x": "weights.bin"}, {"x": 7}, ["x"], None, {"x": "C:\\y.safetensors"},
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it_only(model, weight_map):
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    (model / "secret.safetensors").write_bytes((model / "transformer/diffusion_pytorch_model.safetensors").read_bytes())
    (model / "transformer/diffusion_pytorch_model.safetensors").rename(model / "transformer/a.safetensors")
    index.write_text(json.dumps({"metadata": {"total_size": 10**18}, "weight_map": weight_map}))
    with pytest.raises(ModelError, match="weight_map") as caught:
        load_transformer(config_of(model))
    assert caught.value.where == str(index)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert require_plain_index(index) == ["a.safetensors", "b.safetensors"]


def test_without_our_look_at_it_an_index_would_be_obeyed(model):
    """Canary: left to itself transformers reads what the index names, wherever that is."""
    weights, secret = model / "text_encoder/model.safetensors", model / "secret.safetensors"
    weights.rename(secret)
    (weights.parent / "unused.safetensors").write_bytes(b"")
    stored = load_file(secret)
    index = weights.with_name(f"{weights.name}.index.json")
    weight_map = dict.fromkeys(stored, "../secret.safetensors")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"weight_map names '\.\./secret\.safetensors'"):
        load_text(config_of(model))
    read = T5EncoderModel.from_pretrained(weights.parent).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())


def test_a_tokenizer_reads_its_own_files_only(model):
    edit(model / "tokenizer/tokenizer_config.json", vocab_file="/etc/passwd")
    with pytest.raises(ModelError, match=r"vocab_file: it is not a file beside it \(it is '/etc/passwd'"):
        load_text(config_of(model))


def broken_tokenizer(place: Path, **changes: Any) -> None:
    edit(place / ("tokenizer.json" if {"normalizer", "model"} & set(changes) else "tokenizer_config.json"), **changes)


def charsmap(content: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": charsmap(b"\x04\0\0\0abcd")}, "PanicException"),
        ({"normalizer": charsmap(b"\xff" * 40)}, "the tokenizer cannot be read"),
        ({"normalizer": charsmap(struct.pack("<I", 1024) + bytes(range(256)) * 4 + b"x\0")}, "PanicException"),
        ({"model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}, "it is a WordLevel"),
        ({"model": {"type": "Future"}}, "did not match any variant"),
        ({"model": {"type": "Unigram", "unk_id": 10**9, "vocab": [["x", 0.0]]}}, "UnkIdNotInVocabulary"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"{n}", 0.0] for n in range(99)]}}, "has 102"),
        ({"extra_ids": 100_000_000}, "extra_ids: Input should be less than or equal to 1000"),
        ({"extra_ids": 10_000}, "extra_ids: Input should be less"),
        ({"extra_ids": "x"}, "extra_ids: Input should be a valid integer"),
        ({"pad_token": None}, "pad_token"),
        ({"pad_token": 3}, "pad_token"),
        # transformers gives other tokens for these than we do
        ({"padding_side": "left"}, "padding_side: Input should be 'right'"),
        ({"truncation_side": "left"}, "truncation_side: Input should be 'right'"),
        ({"split_special_tokens": True}, "split_special_tokens: Input should be False"),
    ],
)
def test_a_damaged_tokenizer_is_an_error_about_its_file(model, changes, said):
    broken_tokenizer(model / "tokenizer", **changes)
    with pytest.raises(ModelError) as caught:
        load_text(config_of(model))
    assert said in str(caught.value) and str(model) in str(caught.value)


def test_an_old_list_of_added_tokens_is_not_passed_over(model):
    """Where the settings hold no ``added_tokens_decoder``, transformers adds what ``added_tokens.json`` lists."""
    listed = model / "tokenizer/added_tokens.json"
    listed.write_text(json.dumps({"</s>": 1}))
    load_tokenizer(config_of(model))
    listed.write_text(json.dumps({"</s>": 1, "<bar>": 400}))
    with pytest.raises(ModelError, match=r"it adds '<bar>', which tokenizer_config\.json does not list"):
        load_tokenizer(config_of(model))


def test_a_panic_of_the_tokenizers_library_is_past_what_python_catches():
    """Canary: why a tokenizer is first read by a process of its own."""
    from tokenizers import normalizers

    with pytest.raises(BaseException, match="index out of bounds") as caught:
        normalizers.Precompiled(b"\x04\0\0\0abcd").normalize_str("a caption")
    assert not isinstance(caught.value, Exception)


def test_a_tokenizer_s_reader_that_dies_or_hangs_is_an_error_about_the_file(model, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    monkeypatch.setattr("finetune.cogvideox.captions.__file__", str(child))
    for line, said in (("import os; os.abort()", "ended with signal 6"), ("import time; time.sleep(60)", "not read")):
        child.write_text(line)
        monkeypatch.setattr("finetune.cogvideox.captions._PATIENCE_S", 30 if "abort" in line else 0.2)
        _fault_in_a_process.cache_clear()
        with pytest.raises(ModelError, match=said):
            load_tokenizer(config_of(model))
    _fault_in_a_process.cache_clear()


def test_a_tokenizer_is_fault_in_a_process_once(model, monkeypatch):
    ours = load_tokenizer(config_of(model)).to_str()
    monkeypatch.setattr("finetune.cogvideox.captions.subprocess.run", lambda *words, **options: pytest.fail("again"))
    assert load_tokenizer(config_of(model)).to_str() == ours


def test_a_sentencepiece_model_is_fault_in_a_process_too(model):
    """What the published models have."""
    from sentencepiece import sentencepiece_model_pb2

    stored = sentencepiece_model_pb2.ModelProto()
    for piece in ("<pad>", "</s>", "<unk>", "\u2581a", "\u2581caption", "\u2581", *"abcdefghijklmnopqrstuvwxyz"):
        stored.pieces.add(piece=piece, score=-1.0, type=2 if piece == "<unk>" else 1)
    stored.trainer_spec.unk_id = 2
    (model / "tokenizer/tokenizer.json").unlink()
    (model / "tokenizer/spiece.model").write_bytes(stored.SerializeToString())
    assert load_tokenizer(config_of(model)).encode("a caption").ids == [3, 4, 1]
    stored.normalizer_spec.precompiled_charsmap = b"\x04\0\0\0abcd"
    for content in (stored.SerializeToString(), b"\xff" * 50):
        (model / "tokenizer/spiece.model").write_bytes(content)
        with pytest.raises(ModelError, match="the tokenizer cannot be read") as caught:
            load_tokenizer(config_of(model))
        assert caught.value.where.endswith("spiece.model")


@pytest.mark.parametrize(
    "file",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/special_tokens_map.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_only_files_are_opened(model, file, kind):
    path = model / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    loaders = {"scheduler": load_scheduler, "vae": load_vae, "transformer": load_transformer}
    load = loaders.get(path.parent.name, load_text)
    for look in (lambda: read_spec(str(model)), lambda: load(config_of(model))):
        with pytest.raises(ModelError) as caught:
            look()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_pickles_are_refused_before_anything_is_encoded(model, component):
    """By ``check`` and at a run's first look at its model, and not when their component's turn has come."""
    for path in (model / component).glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"a format that can run code.*\n.*\n.*convert it"):
        read_spec(str(model))


def test_shards_that_are_missing_are_named(model):
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"transformer cannot be loaded: .*gone\.safetensors"):
        load_transformer(config_of(model))


def test_a_header_that_lies_about_its_length_takes_no_memory(model):
    path = model / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    config = ModelConfig(pretrained=str(model))
    for look in (lambda: read_spec(str(model)), config.torch_dtype, lambda: load_transformer(config_of(model))):
        with pytest.raises(ModelError, match=r"cannot be loaded: .*header"):
            look()


# ------------------------------------------------------------------------------------------------- adapters and records


def adapter_file(folder: Path, settings: str) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors = {f"transformer.x.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(tensors, folder / LORA_FILE, metadata={"lora_adapter_metadata": settings})
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{"transformer.r": 1000000000}', "claims a rank of 1000000000, and its tensors have [4]"),
        ('{"transformer.r": 4, "transformer.rank_pattern": {"x": 100000000}}', "claims a rank of 100000000"),
        ('{"transformer.r": [4]}', "claims a rank"),
        ('{"transformer.rank_pattern": [1]}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "cannot be read"),
        ('{"transformer.r": 4}', None),
        ('{"transformer.r": 4, "transformer.rank_pattern": {}}', None),
    ],
)
def test_an_adapter_s_header_cannot_ask_for_more_than_its_tensors(tmp_path, settings, said):
    _, faults = read_sources([AdapterArgument(adapter_file(tmp_path / "lora", settings))])
    assert [said in str(fault) for fault in faults] == ([] if said is None else [True])


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    spec = read_spec(str(known_model("5b")))
    request = GenerateRequest((VideoPrompt(prompt="a\x1b[2Jb"),), tmp_path / "out", "x/y")
    (fault,) = request_faults(request, spec, spec.training_bucket, 8.0)
    assert "the prompt is damaged: it holds U+001B" in str(fault)
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", '{"fps": "x"}', '{"fps": 1e300}', '{"fps": NaN}', '{"fps": -1}', '{"fps": true}']
)
def test_a_record_beside_an_adapter_is_only_advice(tmp_path, content):
    (tmp_path / TRAINING_RECORD).write_text(content)
    record = read_record(tmp_path)
    assert record is None or record == TrainingRecord()
    (tmp_path / TRAINING_RECORD).write_text('{"fps": 8, "buckets": 3, "trigger": ["x"], "base_model": "a/b", "x": 1}')
    assert read_record(tmp_path) == TrainingRecord(fps=8, base_model="a/b")
    (tmp_path / TRAINING_RECORD).unlink()
    (tmp_path / TRAINING_RECORD).symlink_to("/dev/zero")
    assert read_record(tmp_path) is None


# ------------------------------------------------------------------------------------------------------- one version


class Hub:
    """A hub with one model of two commits, in the hub client's own folder layout, whose branch can be moved."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root / "models--org--model"
        for sha in (SHA_A, SHA_B):
            shutil.copytree(model, self.root / "snapshots" / sha)
        self.asked: list[str | None] = []
        self.move(SHA_A)

    def move(self, sha: str) -> None:
        (self.root / "refs").mkdir(exist_ok=True)
        (self.root / "refs" / "main").write_text(sha)

    def __call__(self, repo: str, *, revision: str | None = None, **options: Any) -> str:
        assert repo == "org/model"
        self.asked.append(revision)
        sha = revision if is_commit(revision) else (self.root / "refs" / "main").read_text()
        return str(self.root / "snapshots" / str(sha))


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub", tiny_model("5b"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def hub_run(tmp_path: Path, clips: Path, **changes: Any) -> RunConfig:
    values = merged(run_values(Path("org/model"), clips, tmp_path / "run"), changes)
    config = RunConfig.from_dict(values)
    assert config.model.pretrained == "org/model"
    return config


def test_the_client_s_own_cache_answers_without_a_network(tmp_path, tiny_model, monkeypatch):
    """huggingface_hub itself, offline: a branch is the commit that the cache holds, a folder none at all."""
    fake = Hub(tmp_path, tiny_model("5b"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pin_revision("org/model") == pin_revision("org/model", "main") == SHA_A
    fake.move(SHA_B)
    assert pin_revision("org/model") == SHA_B
    assert resolve_pretrained("org/model", SHA_A, components=["vae"]).name == SHA_A
    assert pin_revision(str(tiny_model("5b"))) is None
    for repo, revision in (("org/other", None), ("org/model", "v9")):
        with pytest.raises(ModelError, match="not in the local cache"):
            pin_revision(repo, revision)


def test_what_came_from_a_model_s_former_home_is_not_downloaded_again(tmp_path, tiny_model, monkeypatch):
    fake = Hub(tmp_path, tiny_model("5b"))
    fake.root.rename(tmp_path / "models--THUDM--CogVideoX-5b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("5b", "THUDM/CogVideoX-5b", "zai-org/cogvideox-5b"):
        assert pin_revision(name) == SHA_A
        assert resolve_pretrained(name, components=["vae"]).parent.parent == tmp_path / "models--THUDM--CogVideoX-5b"
    with pytest.raises(ModelError, match="not in the local cache"):
        pin_revision("2b")


def test_a_commit_is_not_asked_for(hub):
    assert pin_revision("org/model", SHA_B) == SHA_B and hub.asked == []
    for revision in ("main", "a" * 39, "A" * 40, "g" * 40, None):
        assert not is_commit(revision)
    with pytest.raises(ModelError, match="only the hub has revisions"):
        pin_revision(str(hub.root), SHA_A)


def test_a_download_that_is_no_commit_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(tmp_path))
    with pytest.raises(ModelError, match="which commit was downloaded"):
        pin_revision("org/model")


def test_a_branch_that_moves_in_the_middle_mixes_nothing(hub, tmp_path, demo_clips):
    config = hub_run(tmp_path, demo_clips)
    pinned = pin_model(config)
    assert pinned.model.revision == SHA_A and config.model.revision is None
    hub.move(SHA_B)
    later = [
        resolve_pretrained(model.pretrained, model.revision, components=["vae"]).name
        for model in (pinned.model, config.model)
    ]
    assert later == [SHA_A, SHA_B], "the second is the canary: unpinned, a run would go on with another model"
    assert pin_model(pinned) is pinned


def record(config: RunConfig, step: int = 3) -> None:
    """A checkpoint's folder with its configuration, as a run leaves it."""

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config.to_dict()))

    publish_dir(config.output_dir / "checkpoints" / f"step-{step:08d}", fill)


def test_a_run_goes_on_with_the_commit_it_began_with(hub, tmp_path, demo_clips):
    began = pin_model(hub_run(tmp_path, demo_clips))
    record(began)
    hub.move(SHA_B)
    for revision in (None, "main"):
        again = pin_model(hub_run(tmp_path, demo_clips, model={"revision": revision}))
        assert again.model.revision == SHA_A
        assert require_same_run(began.to_dict(), again.to_dict(), where="here") == []
    named = pin_model(hub_run(tmp_path, demo_clips, model={"revision": SHA_B}))
    assert named.model.revision == SHA_B
    with pytest.raises(CheckpointError, match=r"model\.revision"):
        require_same_run(began.to_dict(), named.to_dict(), where="here")
    anew = hub_run(tmp_path, demo_clips, checkpoint={"resume": "none"})
    assert pin_model(anew).model.revision == SHA_B, "a new run asks anew"
    by_path = {"resume": str(began.output_dir / "checkpoints" / "step-00000003")}
    assert pin_model(hub_run(tmp_path, demo_clips, checkpoint=by_path)).model.revision == SHA_A


def test_a_run_from_before_commits_were_recorded_goes_on(hub, tmp_path, demo_clips):
    before = hub_run(tmp_path, demo_clips)
    record(before)
    now = pin_model(before)
    (change,) = require_same_run(before.to_dict(), now.to_dict(), where="here")
    assert change.field == "model.revision" and change.allowed and "did not record" in change.reason


def test_what_is_recorded_badly_is_no_record(hub, tmp_path, demo_clips):
    config = pin_model(hub_run(tmp_path, demo_clips))
    for step, content in enumerate(["{", "[]", '{"model": 7}', '{"model": {"pretrained": "x/y", "revision": "m"}}'], 1):
        publish_dir(
            config.output_dir / "checkpoints" / f"step-{step:08d}",
            lambda folder, content=content: (folder / "config.json").write_text(content) and None,
        )
    hub.move(SHA_B)
    assert pin_model(hub_run(tmp_path, demo_clips)).model.revision == SHA_B


def test_training_asks_once_and_records_the_commit(hub, tmp_path, monkeypatch):
    clips = tmp_path / "elsewhere"  # only the cache is here
    config = hub_run(tmp_path, clips, train={"steps": 1}, cache={"mode": "require"})
    fabricate_cache(config.model_copy(update={"model": config.model.model_copy(update={"revision": SHA_A})}))
    hub.asked.clear()
    first = hub.__call__

    def moving(repo: str, **options: Any) -> str:
        found = first(repo, **options)
        hub.move(SHA_B)  # right after the first answer
        return found

    monkeypatch.setattr(huggingface_hub, "snapshot_download", moving)
    report = train(config)
    assert hub.asked[0] is None and set(hub.asked[1:]) == {SHA_A} and len(hub.asked) > 3
    assert load_config(report.run_dir / "config.yaml").model.revision == SHA_A
    assert report.checkpoint is not None
    assert json.loads((report.checkpoint / "config.json").read_text())["model"]["revision"] == SHA_A
    again = train(hub_run(tmp_path, clips, train={"steps": 2}, cache={"mode": "require"}))
    assert again.step == 2 and load_config(again.run_dir / "config.yaml").model.revision == SHA_A


def test_the_bomb_of_these_tests_is_no_safetensors_file(tmp_path):
    """Optimizer state and weights are safetensors everywhere: the one reader of ours refuses a pickle by its bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    with pytest.raises(SafetensorError):
        load_file(path)
    assert not (tmp_path / "owned").exists()
