"""What is beside training and sampling: files of latents and their quality."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from endpoint import said
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from tiny_upscaler import save_upscaler
from tiny_vlm import save_image_model, save_painter, save_text_model

import finetune
from finetune.captioning import captioners
from finetune.cli.main import main
from finetune.cogvideox.encode import enable_tiling
from finetune.cogvideox.load import ModelConfig, load_vae
from finetune.core.errors import ConfigError, DataError, FinetuneError, ModelError
from finetune.core.types import Bucket
from finetune.inference import story
from finetune.inference.preview import TinyDecoder
from finetune.inference.request import read_prompts
from finetune.inference.source_video import Cut, read_video
from finetune.inference.vae_files import frame_psnr, frame_ssim, read_latents
from finetune.inference.videos import write_mp4

ROOT = Path(finetune.__file__).parent.parent


@pytest.fixture(scope="module")
def clip(demo_clips):
    return sorted(demo_clips.glob("*.mp4"))[0]


# ------------------------------------------------------------------------------------------------------------------ vae


@pytest.mark.parametrize("variant", ["2b", "1.5-5b"])
def test_latents_are_those_of_pixels_in_the_range_that_the_vae_was_trained_in(tiny_model, clip, tmp_path, variant):
    """[-1, 1]: feeding [0, 1] is the fault of the older demonstration."""
    report = finetune.vae(
        "encode", clip, tmp_path / "a.safetensors", model=tiny_model(variant), dtype="fp32", device="cpu"
    )
    metadata, ours = read_latents(report.files[0])
    from diffusers.video_processor import VideoProcessor

    decoded = read_video(clip, lambda probe: Cut(report.bucket, 8.0))
    images = [Image.fromarray(frame) for frame in decoded.pixels.permute(1, 2, 3, 0).numpy()]
    pixels = VideoProcessor(vae_scale_factor=8).preprocess_video(images)
    assert pixels.min() < -0.5
    vae = load_vae(ModelConfig(pretrained=str(tiny_model(variant)), dtype="fp32"))
    theirs = vae.encode(pixels).latent_dist
    torch.testing.assert_close(ours[None], theirs.mean)
    assert (metadata.scaling_factor, metadata.fps, metadata.bucket) == (vae.config.scaling_factor, 8.0, report.bucket)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        torch.testing.assert_close(file.get_tensor("std")[None], theirs.std)
    # Decoding needs no word about any of it, and gives what the VAE gives, at the clip's own length.
    back = finetune.vae("decode", tmp_path / "a.safetensors", tmp_path / "a.mp4", dtype="fp32", device="cpu")
    expected = (vae.decode(theirs.mean).sample[0, :, -9:] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0) * 255
    assert back.frames.shape == (9, 64, 64, 3) and back.fps == 8 and not back.notes
    assert np.abs(back.frames - expected.detach().numpy()).max() <= 0.51


def test_a_round_trip_measures_every_frame_and_shows_the_worst(tiny_model, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 255, (7, 50, 70, 3), dtype=np.uint8)
    frames[4:] //= 3
    source = write_mp4(tmp_path / "odd.mp4", frames, 6)
    words = ["vae", "roundtrip", str(source), "--model", str(tiny_model("5b")), "--device", "cpu"]
    assert main([*words, "--worst", "2", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "5x48x64 (frames x height x width) at 6 fps" in printed and "the worst" in printed
    rows = json.loads((tmp_path / "out/frames.json").read_text())
    assert [row["frame"] for row in rows] == [0, 1, 2, 3, 4] and all(0 < row["psnr"] < 30 for row in rows)
    sheet = np.asarray(Image.open(tmp_path / "out/worst.png").convert("RGB"))
    assert sheet.shape[1] > 3 * 96 and 2 * 96 < sheet.shape[0] < 3 * 96 and sheet.std() > 10
    assert (tmp_path / "out/decoded.mp4").is_file()


def test_tiles_meet_where_a_sixth_of_one_is_no_whole_number_of_latents(tiny_model):
    """diffusers gives 778 x 538 pixels for 720 x 480 by itself."""
    vae = load_vae(ModelConfig(pretrained=str(tiny_model("5b")), dtype="fp32"))
    enable_tiling(vae)
    pixels = torch.rand(1, 3, 1, 64, 120)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        assert latents.shape[-2:] == (8, 15) and vae.decode(latents).sample.shape == pixels.shape
    published = AutoencoderKLCogVideoX()
    overlaps = published.tile_overlap_factor_height, published.tile_overlap_factor_width
    enable_tiling(published)
    assert (published.tile_overlap_factor_height, published.tile_overlap_factor_width) == overlaps == (1 / 6, 1 / 5)


def test_quality_is_what_others_compute():
    draws = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (3, 2, 24, 30), generator=draws, dtype=torch.uint8)
    result = (source.float() * 0.8 + torch.randint(0, 40, source.shape, generator=draws)).clamp(0, 255).to(torch.uint8)
    result[:, 1] = source[:, 1]
    x, y = source[:, 0].double().numpy(), result[:, 0].double().numpy()

    def blurred(values):  # 11 taps
        return gaussian_filter(values, (0, 1.5, 1.5), truncate=5 / 1.5)[:, 5:-5, 5:-5]

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y, both = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2, blurred(x * y) - mean_x * mean_y
    c1, c2 = 2.55**2, 7.65**2
    similar = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert frame_ssim(source, result) == pytest.approx([similar.mean(), 1.0])
    assert frame_psnr(source, result) == pytest.approx([10 * np.log10(255**2 / ((x - y) ** 2).mean()), 99.0], abs=1e-4)


def test_another_vae_is_noted_and_another_shape_refused(tiny_model, clip, tmp_path):
    latents = tmp_path / "a.safetensors"
    finetune.vae("encode", clip, latents, model=tiny_model("5b"), bucket="5x32x48", device="cpu")
    other = finetune.vae("decode", latents, tmp_path / "a.mp4", model=tiny_model("2b"), fps=4.0, device="cpu")
    assert "another VAE encoded this" in other.notes[0] and other.fps == 4 and other.frames.shape == (5, 32, 48, 3)
    with pytest.raises(DataError, match=r"latents are \[4, 2, 4, 6\]"):
        finetune.vae("decode", latents, tmp_path / "a.mp4", model=tiny_model("5b", latent_channels=8), device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00" * 100, "no file of latents"),
        ({}, "lacks, or has wrong: .*format"),
        ({"format": "other"}, "format is 'other'"),
        ({"fps": "nan"}, "wrong: fps"),
        ({"frames": "-4"}, "wrong: frames"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        good = {"format": "cogvideox-latents-1", "model": "x", "vae": "y", "scaling_factor": "1", "fps": "8"}
        good |= {"invert_scale_latents": "False", "frames": "9", "height": "64", "width": "64", **content}
        save_file({"mean": torch.zeros(4, 3, 8, 8)}, path, good if content else {})
    with pytest.raises(DataError, match=message) as error:
        finetune.vae("decode", path, tmp_path / "a.mp4")
    assert error.value.where == str(path)


@pytest.mark.parametrize(
    ("action", "changes", "message"),
    [
        ("encode", {"model": None}, "no model is named"),
        ("encode", {"bucket": "8x64x64"}, "takes 4N.1 frames"),
        ("encode", {"bucket": "9x60x64"}, "multiples of 16"),
        ("encode", {"out": "a.pt"}, "no name for what encode writes"),
        ("roundtrip", {"worst": 0}, "0 worst frames"),
        ("roundtrip", {"fps": 0.0}, "0.0 frames per second"),
        ("decode", {"bucket": "9x64x64"}, "size of their own"),
    ],
)
def test_what_cannot_be_encoded_is_said(tiny_model, clip, tmp_path, action, changes, message):
    options = {"model": tiny_model("5b"), "device": "cpu", **changes}
    with pytest.raises(ConfigError, match=message):
        finetune.vae(action, clip, options.pop("out", None), **options)


# -------------------------------------------------------------------------------------------------------------- enhance


LONG = "a red circle moving left"


def words_of(request) -> str:
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_short_prompts_become_long_ones_that_generate_reads(tiny_model, tmp_path, serve, capsys):
    server = serve(lambda request: said(f'"{LONG}"\n'))
    (tmp_path / "ideas.txt").write_text("a kite\na boat\n")
    words = ["enhance", "--prompts", str(tmp_path / "ideas.txt"), "--endpoint", server.url, "--model", "some"]
    output = tmp_path / "long.jsonl"
    assert main([*words, "--for", str(tiny_model()), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [LONG, LONG]
    assert [(p.prompt, p.seed, p.image) for p in read_prompts(output)] == [(LONG, 0, None), (LONG, 1, None)]
    asked = [words_of(request) for _, request in server.requests]
    assert asked[0].endswith("The short prompt: a kite") and "a boat" in asked[1] and "80 to 10 words" in asked[0]


def test_a_first_frame_goes_along(tiny_model, tmp_path, serve):
    Image.new("RGB", (2000, 40), (0, 200, 0)).save(tmp_path / "boat.png")
    server = serve(lambda request: said(LONG))
    report = finetune.enhance(
        "it sails away", images=tmp_path / "boat.png", endpoint=server.url, target=str(tiny_model("5b-i2v"))
    )
    ((_, request),) = server.requests
    picture, text = request["messages"][0]["content"]
    sent = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(sent)).size == (768, 15) and "its first frame" in text["text"]
    assert report.prompts[0].image == tmp_path / "boat.png" and str(report) == LONG


def test_a_long_prompt_is_asked_for_again_and_its_end_noted(tiny_model, serve, capsys):
    turns = iter(["word " * 90, "word " * 40, "word " * 60])
    server = serve(lambda request: said(next(turns)))
    words = ["enhance", "--prompt", "a kite", "--endpoint", server.url, "--for", str(tiny_model())]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["word"] * 40 and "of prompt 1 the end will not be read" in printed.err
    assert "too long" in words_of(server.requests[1][1]) and len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "message"), [((200, {}), "holds no text"), (said(""), "the answer is no caption"), ((500, {}), "500")]
)
def test_a_prompt_that_stays_short_is_named_and_the_others_are_kept(
    tiny_model, serve, tmp_path, capsys, answer, message
):
    server = serve(lambda request: answer if "a boat" in words_of(request) else said(LONG))
    words = ["--endpoint", server.url, "--for", str(tiny_model()), "--output", str(tmp_path / "long.jsonl")]
    assert main(["enhance", "--prompt", "a boat", "--prompt", "a kite", *words]) == 2
    assert message in (text := capsys.readouterr().err) and "'a boat'" in text
    assert [(prompt.prompt, prompt.seed) for prompt in read_prompts(tmp_path / "long.jsonl")] == [(LONG, 1)]
    with pytest.raises(DataError, match=message):
        finetune.generate(
            ["a kite", "a boat"], tmp_path, model=tiny_model(), enhance="some", endpoint=server.url, device="cpu"
        )
    with pytest.raises(DataError, match=message):
        finetune.enhance("a boat", endpoint=server.url, target=str(tiny_model()))


def test_an_endpoint_that_refuses_the_key_ends_it(tiny_model, serve):
    server = serve(lambda request: (401, {}))
    with pytest.raises(ModelError, match="refuses the key in OPENAI_API_KEY"):
        finetune.enhance(["a kite", "a boat"], endpoint=server.url, target=str(tiny_model()))
    assert len(server.requests) == 1


@pytest.mark.parametrize("save", [save_text_model, save_image_model], ids=["reads", "sees"])
def test_a_model_of_transformers_writes_prompts(tiny_model, tmp_path, monkeypatch, save):
    monkeypatch.setattr(captioners, "MAX_NEW_TOKENS", 12)
    options = {"model": str(save(tmp_path / "model")), "target": str(tiny_model()), "device": "cpu"}
    report = finetune.enhance(["a red kite", "a boat"], **options)
    assert len(report.prompts) == 2 and all(prompt.prompt for prompt in report.prompts)
    Image.new("RGB", (64, 64), (0, 200, 0)).save(tmp_path / "boat.png")
    if save is save_text_model:
        with pytest.raises(ModelError, match="cannot be loaded as a video-language model"):
            finetune.enhance("a boat", images=tmp_path / "boat.png", **options)
    else:
        assert finetune.enhance("a boat", images=tmp_path / "boat.png", **options).prompts[0].prompt


def test_the_instruction_is_a_file(tiny_model, tmp_path, serve, capsys):
    assert main(["enhance", "--print-instruction"]) == 0
    text = capsys.readouterr().out
    assert main(["enhance", "--print-instruction", "--image", "a.png"]) == 0
    assert "{prompt}" in text and "{words}" in text and "first frame" in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("In verse, please: {prompt}")
    server = serve(lambda request: said(LONG))
    options = {"endpoint": server.url, "target": str(tiny_model())}
    finetune.enhance("a kite", instruction=tmp_path / "mine.txt", **options)
    assert words_of(server.requests[0][1]) == "In verse, please: a kite"
    (tmp_path / "mine.txt").write_text("Write something nice.")
    with pytest.raises(ConfigError, match="never mentions the prompt"):
        finetune.enhance("a kite", instruction=tmp_path / "mine.txt", **options)
    with pytest.raises(ConfigError, match="there is no prompt"):
        finetune.enhance([], **options)


# ---------------------------------------------------------------------------------------------------------------- story


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return save_painter(tmp_path_factory.mktemp("painter"))


@pytest.fixture
def told(tiny_model, painter, tmp_path, serve):
    """``told(**changes)``: a story of two steps in ``tmp_path / "story"``, and what the endpoint was asked."""
    server = serve(lambda request: said(LONG))

    def tell(idea: str = "a kite", **changes):
        options = {"endpoint": server.url, "num_inference_steps": 1, "guidance_scale": 1.0, "painter_steps": 2}
        options |= {"model": tiny_model("1.5-5b-i2v"), "painter": painter, "bucket": "9x32x48", "device": "cpu"}
        return finetune.story(idea, tmp_path / "story", **(options | changes))

    tell.requests = server.requests
    return tell


def test_an_idea_becomes_a_video_and_no_stage_has_another_s_model(told, monkeypatch):
    from diffusers import DiffusionPipeline

    painters, alive = [], []
    load = DiffusionPipeline.from_pretrained

    def noted(*arguments, **options):
        pipeline = load(*arguments, **options)
        painters.append(weakref.ref(pipeline))
        return pipeline

    def interrupted(*arguments, **options):
        alive.extend(reference() for reference in painters)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", noted)
        patch.setattr("finetune.sampling.generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            told()
    assert alive == [None]
    report = told()
    text, frame, video = report.files
    assert report.made == ("video",) and len(told.requests) == 1  # it went on
    assert report.prompt == LONG == text.read_text().strip() and Image.open(frame).size == (48, 32)
    assert video.suffix == ".mp4" and video.is_file() and told().made == ()


def test_only_what_changed_is_made_again(tmp_path, monkeypatch):
    def written(content: str, name: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    monkeypatch.setattr(story, "paint", lambda prompt, painter, path: written(f"{painter.seed} {prompt}", path.name))

    def made(idea: str = "a kite", seed: int = 0, steps: int = 1) -> str:
        painter = story.Painter("any", Bucket(9, 32, 48), seed, None, torch.device("cpu"))
        film = story.Animation(lambda prompt, frame: written(f"{prompt} {frame.read_text()}", "a.mp4"), {"n": steps})
        return " ".join(story.tell(idea, tmp_path, story.Script(str.upper, {}), painter, film).made)

    assert made() == "prompt frame video" and made() == ""
    assert made(seed=3) == "frame video" and made(seed=3, steps=2) == "video"
    written("painted over by hand", "frame.png")
    assert made(seed=3, steps=2) == "video"
    written("a blue kite", "prompt.txt")
    assert made(seed=3, steps=2) == "frame video" and (tmp_path / "a.mp4").read_text() == "a blue kite 3 a blue kite"
    (tmp_path / "a.mp4").unlink()
    assert made(seed=3, steps=2) == "video"
    assert made("a boat", seed=3) == "prompt frame video" and (tmp_path / "prompt.txt").read_text() == "A BOAT\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "5b"}, "takes no first frame"),
        ({"idea": " "}, "the idea is empty"),
        ({"bucket": "8x32x48"}, "nearest"),
        ({"painter": "absent/painter"}, "cannot be painted"),
        ({"device": "abacus"}, "device cannot be used"),
        ({"instruction": "absent.txt"}, "absent.txt"),
        ({"record": "[]"}, "no story's record"),
    ],
)
def test_a_story_that_cannot_be_told_is_refused(told, tmp_path, changes, message):
    if record := changes.pop("record", None):
        (tmp_path / "story").mkdir()
        (tmp_path / "story/story.json").write_text(record)
    with pytest.raises(FinetuneError, match=message):
        told(**changes)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_commands_of_the_page_run(tiny_model, painter, clip, tmp_path, monkeypatch, capsys, serve):
    """As they stand, but for the names of models, sizes and the number of steps."""
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    shutil.copy(clip, "clip.mp4")
    save_upscaler(Path("RealESRGAN_x2plus.pth"))
    save_file(TinyDecoder(4).state_dict(), "taecvx.safetensors")
    for name in ("painted.png", "boat.png"):
        Image.new("RGB", (64, 64), (0, 200, 0)).save(name)
    Path("ideas.txt").write_text("a kite\na boat\n")
    server = serve(lambda request: said(LONG)).url
    here = {
        "49x480x720": "9x64x64",
        "black-forest-labs/FLUX.1-schnell": str(painter),
        "http://localhost:8000/v1": server,
    }
    here |= {name: str(tiny_model(name)) for name in ("5b", "5b-i2v")}
    short = {"invert": ["--steps", "2"], "story": ["--steps", "1", "--endpoint", server], "vae": []}
    short["generate"] = ["--steps", "1", "--bucket", "9x64x64"]
    short["enhance"] = ["--endpoint", server, "--for", here["5b"]]
    for line in lines:
        words = [here.get(word, word) for word in shlex.split(line)[1:]]
        assert main([*words, *short[words[0]], "--device", "cpu"]) == 0, line
    assert len(lines) >= 13 and "next: finetune vae decode clip.safetensors" in capsys.readouterr().out
    names = {path.name for path in Path().rglob("*.*")}
    assert Path("clip.mp4").read_bytes() == clip.read_bytes()
    assert {
        "clip.safetensors",
        "clip-decoded.mp4",
        "worst.png",
        "reconstruction.mp4",
        "edit.mp4",
        "edit.png",
        "prompts.jsonl",
    } <= names
    assert {"prompt.txt", "frame.png", "story.json", "preview.png"} <= names
