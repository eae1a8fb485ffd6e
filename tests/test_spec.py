"""The spec: what is read off the published checkpoints' JSON, and what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from finetune.cogvideox.components import CONFIG_FILES, Scheduler, TextEncoder, Transformer, Vae
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model, resolve_pretrained
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.errors import ConfigError, ModelError
from finetune.core.types import Bucket

NATIVE = Bucket(49, 480, 720)
NATIVE_15 = Bucket(81, 768, 1360)


@pytest.fixture(params=KNOWN_MODELS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spec_of(variant: str) -> ModelSpec:
    return read_spec(str(known_model(variant)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the 5B model's JSON that a test may damage."""
    return Path(shutil.copytree(known_model("5b"), tmp_path / "model"))


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def edit(folder: Path, component: str, **changes: Any) -> None:
    path = folder / CONFIG_FILES[component]
    content = read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# What the models are


# Counted from the published weights; the token counts are those of the model cards' native clips.
@pytest.mark.parametrize(
    ("name", "parameters", "bucket", "tokens"),
    [
        ("2b", 1_693_783_872, NATIVE, 17_776),
        ("5b", 5_570_283_072, NATIVE, 17_776),
        ("5b-i2v", 5_570_479_680, NATIVE, 17_776),
        ("1.5-5b", 5_570_676_352, NATIVE_15, 45_104),
        ("1.5-5b-i2v", 5_571_594_880, NATIVE_15, 45_104),
    ],
)
def test_shipped_json_builds_the_published_models(name: str, parameters: int, bucket: Bucket, tokens: int) -> None:
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    folder = known_model(name)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(
            json.loads((folder / "transformer/config.json").read_text())
        )
        vae = AutoencoderKLCogVideoX.from_config(json.loads((folder / "vae/config.json").read_text()))
        text_encoder = T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder"))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
    assert sum(parameter.numel() for parameter in vae.parameters()) == 215_583_907
    assert sum(parameter.numel() for parameter in text_encoder.parameters()) == 4_762_310_656
    assert spec_of(name).tokens(bucket) == tokens
    assert spec_of(name).check_bucket(bucket) == []
    assert spec_of(name).advise_bucket(bucket) == []


def test_what_tells_the_published_models_apart() -> None:
    spec = {name: spec_of(name) for name in KNOWN_MODELS}
    assert [name for name in KNOWN_MODELS if spec[name].image_to_video] == ["5b-i2v", "1.5-5b-i2v"]
    assert [name for name in KNOWN_MODELS if not spec[name].use_rotary] == ["2b"]
    assert [name for name in KNOWN_MODELS if spec[name].use_learned_positions] == ["5b-i2v"]
    assert [name for name in KNOWN_MODELS if spec[name].ofs_embed_dim] == ["1.5-5b-i2v"]
    assert [spec[name].native_fps for name in KNOWN_MODELS] == [8, 8, 8, 16, 16]
    assert [spec[name].max_text_seq_length for name in KNOWN_MODELS] == [226, 226, 226, 224, 224]
    assert [spec[name].snr_shift_scale for name in KNOWN_MODELS] == [3.0, 1.0, 1.0, 1.0, 1.0]
    assert [spec[name].invert_scale_latents for name in KNOWN_MODELS] == [False, False, False, True, True]
    assert len(set(spec.values())) == len(KNOWN_MODELS) == 5


def test_latent_shapes_and_front_padding() -> None:
    first, second = spec_of("5b"), spec_of("1.5-5b")
    assert first.latent_shape(NATIVE) == (16, 13, 60, 90)
    assert second.latent_shape(NATIVE_15) == (16, 21, 96, 170)  # before padding
    assert [first.padded_latent_frames(frames) for frames in (1, 9, 49)] == [1, 3, 13]
    assert [second.padded_latent_frames(frames) for frames in (1, 5, 9, 81, 85)] == [2, 2, 4, 22, 22]
    assert (first.vae_spatial, first.vae_temporal, first.size_multiple) == (8, 4, 16)


# Where a value is left out


@pytest.mark.parametrize(("ours", "class_name"), [
    (Transformer, "CogVideoXTransformer3DModel"),
    (Vae, "AutoencoderKLCogVideoX"),
    (Scheduler, "CogVideoXDDIMScheduler"),
    (Scheduler, "CogVideoXDPMScheduler"),
])  # fmt: skip
def test_every_field_is_known_and_defaults_are_those_of_diffusers(ours: Any, class_name: str) -> None:
    import diffusers

    theirs = dict(inspect.signature(getattr(diffusers, class_name)).parameters)
    named = {name: field.default for name, field in ours.model_fields.items() if not field.is_required()}
    assert named.keys() == theirs.keys(), "a field that is not known is a field that is not checked"
    for name, default in named.items():
        stated = theirs[name].default
        assert default == (list(stated) if isinstance(stated, tuple) else stated), name


def test_defaults_are_those_of_t5() -> None:
    from transformers import T5Config

    theirs = T5Config()
    for name, field in TextEncoder.model_fields.items():
        assert field.is_required() or field.default == getattr(theirs, name), name


def test_a_value_left_out_takes_the_default(folder: Path) -> None:
    edit(folder, "transformer", patch_size=..., max_text_seq_length=..., ofs_embed_dim=...)
    edit(folder, "vae", invert_scale_latents=..., latent_channels=...)
    assert read_spec(str(folder)) == spec_of("5b")
    edit(folder, "vae", scaling_factor=...)
    assert read_spec(str(folder)).scaling_factor == 1.15258426  # canary: the default is not the 5B model's 0.7


def test_unknown_keys_do_not_matter(folder: Path) -> None:
    edit(folder, "transformer", a_future_option=3)
    assert read_spec(str(folder)) == spec_of("5b")


# What is refused


@pytest.mark.parametrize(
    ("component", "changes", "said"),
    [
        ("transformer", {"out_channels": 8}, "out_channels is 8"),
        ("transformer", {"in_channels": 33}, "in_channels is 33"),
        ("transformer", {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8"),
        ("transformer", {"num_layers": "many"}, "num_layers: "),
        ("transformer", {"_class_name": "WanTransformer3DModel"}, "_class_name: .*CogVideoXTransformer3DModel"),
        (
            "transformer",
            {"use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": True},
            "needs use_rotary_positional_embeddings",
        ),
        ("vae", {"scaling_factor": 0.0}, "scaling_factor: "),
        ("vae", {"_class_name": ...}, "_class_name: Field required"),
        ("scheduler", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        ("scheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ("scheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas is set"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "_class_name: .*CogVideoXDDIMScheduler"),
        ("text_encoder", {"d_model": 768}, "d_model is 768"),
    ],
)
def test_a_part_that_does_not_fit_is_named(folder: Path, component: str, changes: dict[str, Any], said: str) -> None:
    edit(folder, component, **changes)
    with pytest.raises(ModelError, match=said) as raised:
        read_spec(str(folder))
    assert raised.value.where == str(folder / CONFIG_FILES[component])


def test_all_faults_are_told_at_once(folder: Path) -> None:
    edit(folder, "transformer", in_channels=33)
    edit(folder, "scheduler", prediction_type="epsilon", beta_schedule="linear")
    with pytest.raises(ModelError) as raised:
        read_spec(str(folder))
    assert all(
        said in str(raised.value) for said in ("(3 problems)", "in_channels", "prediction_type", "beta_schedule")
    )


@pytest.mark.parametrize("file", ["model_index.json", CONFIG_FILES["transformer"], CONFIG_FILES["vae"]])
@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff\xfe"])
def test_a_file_missing_or_unreadable_is_named(folder: Path, file: str, content: str | bytes | None) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as raised:
        read_spec(str(folder))
    assert raised.value.where == str(folder / file)


def test_several_missing_files_are_told_at_once(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ModelError, match=r"(?s)vae.config\.json.*scheduler_config\.json"):
        read_spec(str(folder))


def test_another_pipeline_is_refused(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ModelError, match="not a CogVideoX pipeline: _class_name is 'StableDiffusionPipeline'"):
        read_spec(str(folder))


def test_the_text_encoder_may_be_absent(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    assert read_spec(str(folder)) == spec_of("5b")


# Buckets


@pytest.mark.parametrize(
    ("name", "bucket", "said"),
    [
        ("5b", Bucket(50, 480, 720), ["8N+1 frames, at most 49; nearest: 49"]),
        ("5b", Bucket(45, 480, 720), ["nearest: 41 or 49"]),
        ("5b", Bucket(81, 480, 720), ["at most 49; nearest: 49"]),
        ("5b", Bucket(2, 480, 720), ["nearest: 1 or 9"]),
        ("2b", Bucket(49, 488, 725), ["height 488", "480 or 496", "width 725", "720 or 736"]),
        ("2b", Bucket(49, 8, 720), ["height 8", "nearest: 16"]),
        ("5b-i2v", Bucket(49, 480, 704), ["its learned positions fix it to 49x480x720"]),
        ("5b-i2v", Bucket(41, 480, 720), ["its learned positions fix it to 49x480x720"]),
        ("1.5-5b", Bucket(80, 768, 1360), ["4N+1 frames; nearest: 77 or 81"]),
        ("1.5-5b", Bucket(81, 768, 2416), ["a multiple of 16, at most 2400; nearest: 2400"]),
    ],
)
def test_impossible_buckets_are_told_with_the_nearest_possible(name: str, bucket: Bucket, said: list[str]) -> None:
    problems = " ".join(spec_of(name).check_bucket(bucket))
    assert all(words in problems for words in said), problems


def test_every_named_neighbour_is_possible() -> None:
    # The fix that a message proposes must itself pass.
    spec = spec_of("5b")
    for frames in range(1, 70):
        for problem in spec.check_bucket(Bucket(frames, 480, 720)):
            for neighbour in problem.split("nearest: ")[1].split(" or "):
                assert spec.check_bucket(Bucket(int(neighbour), 480, 720)) == []


@pytest.mark.parametrize(
    ("name", "bucket"),
    [
        ("2b", Bucket(9, 320, 512)),
        ("5b", Bucket(1, 720, 480)),
        ("5b", Bucket(49, 16, 4096)),
        ("1.5-5b", Bucket(5, 768, 768)),
        ("1.5-5b", Bucket(161, 1360, 768)),
    ],
)
def test_possible_buckets_pass(name: str, bucket: Bucket) -> None:
    assert spec_of(name).check_bucket(bucket) == []


@pytest.mark.parametrize(
    ("name", "bucket", "said"),
    [
        ("5b", Bucket(49, 320, 512), "320x512: the model was made for 480x720"),
        ("1.5-5b", Bucket(9, 768, 1360), "made for 16N+1 frames, at most 161; nearest: 1 or 17"),
        ("1.5-5b", Bucket(177, 768, 1360), "at most 161; nearest: 161"),
    ],
)
def test_advice_on_what_the_model_was_not_made_for(name: str, bucket: Bucket, said: str) -> None:
    assert spec_of(name).check_bucket(bucket) == []
    assert said in " ".join(spec_of(name).advise_bucket(bucket))


def test_tiny_look_alikes_take_nine_frames(tiny_model: Callable[..., Path], variant: str) -> None:
    assert read_spec(str(tiny_model(variant))).check_bucket(Bucket(9, 64, 64)) == []


# Finding a checkpoint


def test_known_model_names_what_there_is() -> None:
    with pytest.raises(ModelError, match="'9b'") as raised:
        known_model("9b")
    assert "1.5-5b-i2v" in raised.value.fix


@pytest.mark.parametrize("pretrained", ["./nowhere", "/no/where", "nowhere", "a/b/c", "~/nowhere-at-all"])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="no such model folder"):
        read_spec(pretrained)


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="only the hub has revisions"):
        read_spec(str(folder), "main")


def test_the_hub_is_asked_for_json_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert read_spec("some/model", "v1") == spec_of("5b")
    assert (asked["repo"], asked["revision"]) == ("some/model", "v1")
    assert asked["allow_patterns"] and all(pattern.endswith(".json") for pattern in asked["allow_patterns"])

    resolve_pretrained("some/model", components=["vae"])
    assert {pattern.split("/")[0] for pattern in asked["allow_patterns"]} == {"model_index.json", "vae"}


def test_offline_is_an_error_a_person_can_act_on() -> None:
    with pytest.raises(ModelError, match="the hub cannot be reached") as raised:
        read_spec("some/model", "v1")
    assert "some/model" in raised.value.where and "v1" in raised.value.where
    assert "local folder" in raised.value.fix


# What the hub's errors read off an HTTP answer, whichever HTTP library its version uses.
_ANSWER: Any = SimpleNamespace(headers={}, request=None, status_code=500)


@pytest.mark.parametrize(
    ("raised_there", "said"),
    [
        (lambda: hub_errors.RepositoryNotFoundError("404", response=_ANSWER), "no such model"),
        (lambda: hub_errors.GatedRepoError("403", response=_ANSWER), "licence"),
        (lambda: hub_errors.RevisionNotFoundError("404", response=_ANSWER), "no such revision"),
        (lambda: hub_errors.HFValidationError("bad"), "not a hub id"),
        (lambda: hub_errors.HfHubHTTPError("500", response=_ANSWER), "did not answer"),
        (lambda: hub_errors.HfHubHTTPError.__bases__[0]("connection reset"), "did not answer"),
        (lambda: OSError("no space left"), "did not answer"),
    ],
)
def test_hub_errors_become_model_errors(
    raised_there: Callable[[], Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise raised_there()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=said) as raised:
        resolve_pretrained("some/model", components=["vae"])
    assert raised.value.fix and not isinstance(raised.value, ConfigError)


def test_a_component_that_is_absent_is_named(folder: Path) -> None:
    assert resolve_pretrained(str(folder), components=["vae", "transformer"]) == folder
    with pytest.raises(ModelError, match="no tokenizer"):
        resolve_pretrained(str(folder), components=["vae", "tokenizer"])
