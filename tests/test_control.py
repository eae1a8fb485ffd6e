"""Control videos: rows that name one, what the cache holds of it, a widened model, its training and its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXFunControlPipeline, CogVideoXTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from worlds import assert_same_run, merged, run_values, stop_after, tensors

from finetune import doctor, export, generate, inspect, invert, sharing
from finetune.caching.check import check_dataset
from finetune.caching.precompute import precompute
from finetune.cogvideox.config import MergedAdapter, ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import control_latents, encode_video
from finetune.cogvideox.load import load_scheduler, load_transformer, load_vae
from finetune.cogvideox.spec import ModelSpec, read_spec, spec_of
from finetune.config.rules import require_valid
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, DataError, FinetuneError
from finetune.core.types import Bucket
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker
from finetune.datasets.schedule import MicroBatch
from finetune.inference.adapters import TrainingRecord, base_faults, base_numbers
from finetune.inference.modes import FromControl, read_frames
from finetune.inference.videos import Frames, write_mp4
from finetune.methods.lora import LoraMethod, is_lora, merge
from finetune.methods.merged_base import require_readable
from finetune.methods.prior import without_adapter
from finetune.trainers.loop import train


def negative(frames: Frames) -> Frames:
    return 255 - frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory, demo_clips) -> Path:
    """The demo's clips, each with its negative as a control video in a column of the table."""
    folder = tmp_path_factory.mktemp("control") / "clips"
    shutil.copytree(demo_clips, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        video = folder / row["file_name"]
        row["control"] = f"controls/{video.name}"
        write_mp4(folder / row["control"], negative(read_frames(video)), 8)
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def home(tmp_path, clips, tiny_model) -> Callable[..., RunConfig]:
    """The configuration of a control run over a copy of the clips, in a folder of its own."""
    shutil.copytree(clips, tmp_path / "clips")

    def make(variant: str = "5b", **changes: Any) -> RunConfig:
        values = merged(run_values(tiny_model(variant), Path("clips"), Path("run")), {"model": {"control": True}})
        return RunConfig.from_dict(merged(values, changes), base=tmp_path)

    return make


# ------------------------------------------------------------------------------------------------------------ the data


def test_a_control_is_cut_as_its_clip_and_encoded_as_its_mode(home):
    config = home(data={"sources": [{"path": "clips", "random_flip": True}]})
    report = precompute(config, progress=False)
    item = next(item for item in report.manifest.items if item.flipped_key)
    frames = read_frames(config.base / "clips" / "controls" / Path(item.clip).name)[:9]
    vae, cache = load_vae(config.model), Cache(config.cache.dir)
    for key, pixels in ((item.latents_key, frames), (item.flipped_key, frames[:, :, ::-1])):
        control = cache.read(replace(item, latents_key=key)).control_latents
        expected, _ = encode_video(vae, torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2)[None])
        assert control is not None and torch.equal(control, expected[0].half())
    spec, none = spec_of(config.model), torch.zeros(226, 32)
    for probability in (0.0, 1.0):
        dropout = config.data.model_copy(update={"control_dropout": probability})
        maker = BatchMaker(spec, cache, report.manifest.items, none, dropout, 7, config.objective)
        shown = maker.training(0, MicroBatch(items=(0,), slots=(0,))).image_latents
        assert bool(shown.any()) == (probability == 0) and maker.fixed(0, [3]).image_latents.any()


def test_a_run_without_control_keeps_its_addresses(home, demo_clips, tmp_path):
    """Rows that name controls are as good as any others, for a model that takes none."""
    config, other = home(), home(model={"control": False})
    shutil.copytree(demo_clips, tmp_path / "plain")
    plain = home(model={"control": False}, data={"sources": [{"path": "plain"}]})
    controlled, ours, theirs = (
        [item.latents_key for item in precompute(one, progress=False).manifest.items] for one in (config, other, plain)
    )
    assert ours == theirs and not {*controlled} & {*ours}


def test_rows_whose_control_does_not_fit_are_faults(home, tmp_path):
    folder = tmp_path / "clips"
    rows = rows_of(folder)
    frames = read_frames(folder / rows[0]["control"])
    rows[0]["control"] = ""
    rows[1]["control"] = "controls/nowhere.mp4"
    write_rows(folder, rows)
    with pytest.raises(DataError) as caught:
        check_dataset(home(), spec_of(home().model), progress=False)
    message = str(caught.value)
    assert "metadata.jsonl:1" in message and "names no control" in message and "nowhere.mp4" in message
    for row, wrong in zip(rows, (frames[:-1], frames[:, :48], frames[:, ::2, ::2], frames), strict=True):
        row["control"] = f"controls/new-{Path(row['file_name']).name}"
        write_mp4(folder / row["control"], wrong, 5)  # whatever its rate
    rows[3]["control"] = "controls/still.png"
    Image.fromarray(frames[0]).save(folder / rows[3]["control"])
    write_rows(folder, rows)
    with pytest.raises(DataError) as caught:
        check_dataset(home(), spec_of(home().model), progress=False)
    message = str(caught.value)
    assert message.count("is not that of its video") == 3  # half the size is the same shape
    assert "its length is not" in message and f"{len(frames) - 1} frames" in message and "48x64" in message
    assert "controls/still.png" in message
    ours, plain = doctor(home()), doctor(home(model={"control": False}))
    faults = [[fault.name for fault in clip.faults if fault.level == "error"] for clip in ours.clips]
    assert sorted(faults) == [[], *[["control or mask"]] * 3]
    seconds = [sum(report.outlook.encode_s.values()) for report in (ours, plain)]
    assert seconds[0] == pytest.approx(seconds[1] / 2), "one clip and its control, of four clips"


def test_a_control_may_lie_beside_its_clip(home, tmp_path):
    folder = tmp_path / "beside"
    for row in rows_of(tmp_path / "clips"):
        name = Path(row["file_name"]).stem
        for file, to in ((row["file_name"], f"{name}.mp4"), (row["control"], f"{name}.control.mp4")):
            (folder / to).parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / "clips" / file, folder / to)
        (folder / f"{name}.txt").write_text(row["prompt"])
    config = home(data={"sources": [{"path": "beside"}]})
    clips = check_dataset(config, spec_of(config.model), progress=False).clips
    assert [clip.companions[0].path.name for clip in clips] == [
        f"{clip.sample.video.stem}.control.mp4" for clip in clips
    ]
    without = home(model={"control": False}, data={"sources": [{"path": "beside"}]})
    assert len(check_dataset(without, spec_of(without.model), progress=False).clips) == len(clips) == 4
    next(folder.glob("*.control.mp4")).with_suffix(".txt").write_text("its own caption")  # then it is a clip
    assert len(check_dataset(without, spec_of(without.model), progress=False).clips) == 5


# ----------------------------------------------------------------------------------------------------------- the model


def condition(spec: ModelSpec, seed: int, frames: int = 4) -> torch.Tensor:
    shape = (1, spec.latent_channels, frames, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predicted(transformer: Any, spec: ModelSpec, control: torch.Tensor | None) -> torch.Tensor:
    text = torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, generator=torch.Generator().manual_seed(1))
    return denoise(transformer, spec, condition(spec, 2), text, torch.tensor([500]), control)


@pytest.mark.parametrize(("variant", "dtype"), [("2b", "fp32"), ("5b", "bf16"), ("1.5-5b", "fp32"), ("1.5-5b", "bf16")])
def test_a_widened_model_begins_as_its_base_and_learns_from_the_control(tiny_model, variant, dtype):
    base = ModelConfig(pretrained=str(tiny_model(variant)), dtype=dtype)
    wide = base.model_copy(update={"control": True})
    spec, transformer = spec_of(wide), load_transformer(wide)
    before = predicted(load_transformer(base), spec_of(base), None)
    assert torch.equal(predicted(transformer, spec, condition(spec, 3)), before)
    method = LoraMethod(rank=2, alpha=2, targets="all-linear")
    method.apply(transformer, seed=0)
    control = condition(spec, 3)
    prediction = predicted(transformer, spec, control)
    assert torch.equal(prediction, before) and transformer.patch_embed.proj.weight.dtype == base.torch_dtype()
    prediction.square().mean().backward()
    trained = {name: p for name, p in method.trainable(transformer).items() if not is_lora(name)}
    assert {name: p.dtype for name, p in trained.items()} == {
        "patch_embed.proj.weight_update": torch.float32,
        "patch_embed.proj.bias_update": torch.float32,
    }
    gradient = trained["patch_embed.proj.weight_update"].grad
    assert gradient[:, gradient.shape[1] // 2 :].abs().max() > 0  # of what is new
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    with torch.no_grad():
        changed = predicted(transformer, spec, control)
        assert not torch.equal(changed, predicted(transformer, spec, condition(spec, 5)))
        with without_adapter(transformer):
            assert torch.equal(predicted(transformer, spec, control), before)
        merge(transformer, 1.0)
        torch.testing.assert_close(predicted(transformer, spec, control), changed, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"pretrained": "5b-i2v"}}, "this one is image-to-video"),
        ({"validation": {"samples": [{"prompt": "a ring"}]}}, "this prompt has none"),
        ({"validation": {"samples": [{"prompt": "a ring", "control": "nowhere.mp4"}]}}, "there is no video"),
        ({"validation": {"samples": [{"prompt": "a ring", "control": "still.png"}]}}, "a still image is no control"),
        ({"optimizer": {"kind": "custom", "name": "torch.optim.Muon"}}, "with model.control a projection trains"),
        (
            {"optimizer": {"kind": "custom", "name": "torch.optim.Muon"}, "method": {"kind": "full"}},
            "full fine-tuning trains biases",
        ),
        ({"data": {"sources": [{"kind": "hub", "path": "a/b", "stream_room": "1GB"}]}}, "names no control videos"),
        (
            {"model": {"control": False}, "validation": {"samples": [{"prompt": "a", "control": "a.mp4"}]}},
            "takes no control video",
        ),
    ],
)
def test_what_does_not_go_with_a_control_is_refused_first(home, tiny_model, changes, message):
    changes = deepcopy(changes)
    if "pretrained" in changes.get("model", {}):
        changes["model"]["pretrained"] = str(tiny_model(changes["model"]["pretrained"]))
    with pytest.raises(FinetuneError, match=message):
        config = home(**changes)
        Image.new("RGB", (64, 64)).save(config.base / "still.png")
        require_valid(config, spec_of(config.model))
        check_dataset(config, spec_of(config.model), progress=False)


# ----------------------------------------------------------------------------- training, and what comes out of it


LORA = {"method": {"kind": "lora", "rank": 4, "alpha": 4}, "optimizer": {"kind": "adamw", "lr": 1e-2}}
FULL = {"method": {"kind": "full"}, "optimizer": {"kind": "adamw", "lr": 1e-3}}
SAMPLES = {
    "samples": [{"prompt": "a red circle moving left", "control": "clips/controls/00_red_circle_left.mp4"}],
    "num_inference_steps": 2,
    "sample_every": 4,
}


def stock_frames(pipeline: Any, control: Frames) -> Frames:
    """What diffusers' control pipeline samples, called by hand as ``sampled`` calls ours."""
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        prompt="a red circle moving left",
        control_video=[[Image.fromarray(frame) for frame in control]],
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        output_type="np",
    )
    return (output.frames[0] * 255).round().astype(np.uint8)


def sampled(out: Path, control: Path, **options: Any) -> Frames:
    settings = {"seed": 0, "num_inference_steps": 2, "bucket": "9x64x64", "device": "cpu"}
    report = generate("a red circle moving left", out, controls=control, **settings, **options)
    return report.frames[0]


def test_a_control_lora_resumes_and_leaves_for_the_stock_pipeline(home, tmp_path):
    config = home(**LORA, validation=SAMPLES, output_dir="whole")
    train(config)
    interrupted = home(**LORA, validation=SAMPLES, output_dir="parts")
    stop_after(2, interrupted)
    assert_same_run(train(interrupted), config.output_dir)
    assert list((config.output_dir / "samples").rglob("*.mp4"))
    base, folder = config.model.pretrained, config.output_dir / "export"
    report = export(config.output_dir)
    assert {"control_projection.safetensors", "pytorch_lora_weights.safetensors"} <= {*report.files}
    # As the card says.
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        base, subfolder="transformer", in_channels=8, low_cpu_mem_usage=False, ignore_mismatched_sizes=True
    )
    assert "in_channels=8" in (folder / "README.md").read_text()
    transformer.load_state_dict(load_file(folder / "control_projection.safetensors"), strict=False)
    pipeline = CogVideoXFunControlPipeline.from_pretrained(base, transformer=transformer)
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    control = config.base / "clips" / "controls" / "00_red_circle_left.mp4"
    theirs = stock_frames(pipeline, read_frames(control)[:9])
    ours = sampled(tmp_path / "a", control, adapters=folder)
    assert np.array_equal(ours, theirs)
    checkpoint = sampled(tmp_path / "b", control, adapters=config.output_dir)
    assert np.abs(checkpoint.astype(int) - theirs).max() <= 1
    assert not np.array_equal(sampled(tmp_path / "c", control, adapters=f"{folder}:0.5"), theirs)
    inspection = inspect(folder)
    assert "control video" in " ".join(inspection.notes) and "finetune merge" not in str(inspection)
    with pytest.raises(ConfigError, match="a projection trained beside it"):
        require_readable(ModelConfig(pretrained=base, adapters=(MergedAdapter(path=folder),)))
    for adapter in (folder, config.output_dir):
        with pytest.raises(ConfigError, match="a projection trained beside it"):
            sharing.merge(adapter, tmp_path / "merged.safetensors")
        with pytest.raises(ConfigError, match="a video is inverted without one"):
            invert(control, tmp_path / "inverted", model=base, adapters=adapter)
    plain = home(**merged(LORA, {"method": {"init_from": str(folder)}}), model={"control": False})
    with pytest.raises(ConfigError, match="it follows a control video"):
        plain.method.apply(load_transformer(plain.model), seed=0)
    # And further, from the export and from the checkpoint: the same beginning.
    for number, start in enumerate((folder, config.output_dir / "checkpoints" / "step-00000004")):
        again = home(**merged(LORA, {"method": {"init_from": str(start)}}), output_dir=f"again{number}")
        module = load_transformer(again.model)
        again.method.apply(module, seed=0)
        tensors_now = again.method.state(module)
        for name, tensor in tensors(config.output_dir).items():
            torch.testing.assert_close(tensors_now[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("variant", "faults"), [("5b", 0), ("5b-i2v", 1)])
def test_a_lora_without_control_goes_beside_one_with_it(tiny_model, variant, faults):
    base = str(tiny_model("5b"))
    record = TrainingRecord(base_facts=base_numbers(read_spec(str(tiny_model(variant)))))
    assert len(list(base_faults(record, "--adapter a", base, read_spec(base, control=True)))) == faults


def test_a_full_control_model_leaves_as_a_pipeline_that_trains_again(home, tmp_path):
    config = home(**FULL, train={"steps": 1}, output_dir="full")
    train(config)
    export(config.output_dir, tmp_path / "pipeline", full_pipeline=True)
    pipeline = CogVideoXFunControlPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.transformer.config.in_channels == 8
    control = config.base / "clips" / "controls" / "01_blue_square_up.mp4"
    theirs = stock_frames(pipeline, read_frames(control)[:9])
    assert np.array_equal(sampled(tmp_path / "a", control, model=tmp_path / "pipeline"), theirs)
    again = home(**LORA, train={"steps": 1}, model={"pretrained": str(tmp_path / "pipeline"), "control": False})
    assert spec_of(again.model).control
    train(again)
    assert all(map(is_lora, tensors(again.output_dir)))  # there is nothing to widen
    report = export(again.output_dir)
    assert "control_projection.safetensors" not in report.files
    assert sampled(tmp_path / "b", control, adapters=report.folder).shape == (9, 64, 64, 3)


@pytest.mark.parametrize("frames", [5, 9])
def test_the_second_generation_pads_a_control_as_its_video(tiny_model, frames):
    """The stock pipeline takes whole temporal patches alone; for others ours pads as training does."""
    model = ModelConfig(pretrained=str(tiny_model("1.5-5b")), control=True)
    spec, bucket = spec_of(model), Bucket(frames, 64, 64)
    vae, transformer = load_vae(model), load_transformer(model)
    pixels = np.random.default_rng(0).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    mode = FromControl(pixels)
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": transformer}
    pipeline = mode.pipeline(bucket, scheduler=load_scheduler(model), **parts)
    given = pipeline.video_processor.preprocess_video(mode.arguments(spec, bucket)["control_video"], 64, 64)
    _, latents = pipeline.prepare_control_latents(None, given)
    mean, _ = encode_video(vae, torch.from_numpy(pixels).permute(3, 0, 1, 2)[None])
    torch.testing.assert_close(latents, control_latents(spec, mean), rtol=0, atol=1e-5)
    assert latents.shape[2] % 2 == 0
