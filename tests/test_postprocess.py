"""Frames enlarged, frames in between, and looks at a video while it is sampled; all weights are random."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import sys

import av
import numpy as np
import pytest
import torch
from endpoint import said
from PIL import Image
from safetensors.torch import save_file
from stock_pipeline import load_pipeline
from tiny_upscaler import save_upscaler

import finetune
from finetune.cli.main import main
from finetune.cogvideox.load import ModelConfig, load_vae
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ConfigError
from finetune.inference import postprocess
from finetune.inference.postprocess import Interpolation, Postprocess, interpolate, load_upscaler, parse_interpolation
from finetune.inference.preview import Preview, TinyDecoder, load_decoder, terminal_images

CPU = torch.device("cpu")


def moving_square(frames: int = 6, height: int = 48, width: int = 80) -> np.ndarray:
    video = np.zeros((frames, height, width, 3), np.uint8)
    for at in range(frames):
        video[at, 16:32, 8 + 6 * at : 24 + 6 * at] = (250, 120, 40)
    return video


# -------------------------------------------------------------------------------------------------------- enlarging


@pytest.fixture(scope="module")
def esrgan(tmp_path_factory):
    """``esrgan(scale, suffix)``: a file of a tiny ESRGAN's weights; skips where spandrel is not installed."""
    folder = tmp_path_factory.mktemp("esrgan")
    return lambda scale=2, suffix=".safetensors": save_upscaler(folder / f"x{scale}{suffix}", scale)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_frames_are_what_the_network_makes_of_them(esrgan, suffix):
    upscaler, frames = load_upscaler(esrgan(2, suffix)), moving_square(2)
    large = postprocess.upscale(frames, upscaler, CPU)
    assert large.shape == (2, 96, 160, 3) and large.dtype == np.uint8
    with torch.no_grad():
        theirs = upscaler.network(torch.from_numpy(frames[1]).permute(2, 0, 1)[None].float() / 255)
    assert np.abs(large[1] - theirs[0].permute(1, 2, 0).numpy() * 255).max() <= 0.51 and large.std() > 0


def test_parts_of_a_large_frame_fit_together(esrgan, monkeypatch):
    upscaler, frames = load_upscaler(esrgan(4)), moving_square(1, 75, 110)
    frames[:] = np.random.default_rng(0).integers(0, 256, frames.shape)
    whole = postprocess.upscale(frames, upscaler, CPU)
    monkeypatch.setattr(postprocess, "TILE", 40)
    parts = postprocess.upscale(frames, upscaler, CPU)
    assert parts.shape == (1, 300, 440, 3) and np.abs(parts.astype(int) - whole).max() <= 1
    monkeypatch.setattr(postprocess, "OVERLAP", 0)  # canary: without what is around them they do not
    assert np.abs(postprocess.upscale(frames, upscaler, CPU).astype(int) - whole).max() > 3


def test_a_full_gpu_loses_no_video(esrgan, monkeypatch, caplog):
    upscaler, frames, where = load_upscaler(esrgan(2)), moving_square(1), []
    upscaled = postprocess._upscaled

    def full(frames, upscaler, device):
        where.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError
        return upscaled(frames, upscaler, device)

    monkeypatch.setattr(postprocess, "_upscaled", full)
    assert postprocess.upscale(frames, upscaler, torch.device("cuda")).shape == (1, 96, 160, 3)
    assert where == ["cuda", "cpu"] and "goes on on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "no such file"),
        ("a.safetensors", b"\x00" * 50, "no super-resolution weights"),
        ("a.pth", b"cos\nsystem\n(S'true'\ntR.", "no super-resolution weights"),
        ("a.pt", b"", ".pt is none of"),
        ("b.safetensors", {"some.weight": torch.zeros(3)}, "no super-resolution weights"),
    ],
)
def test_what_is_no_upscaler_is_said(tmp_path, name, content, message):
    if content is not None and importlib.util.find_spec("spandrel") is None:
        pytest.skip("needs spandrel (the extra upscale)")
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    with pytest.raises(ConfigError, match=message) as error:
        load_upscaler(path)
    assert str(path) in error.value.where


def test_the_library_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ConfigError, match="needs spandrel") as error:
        load_upscaler(tmp_path / "a.pth")
    assert "cogvideox-finetune[upscale]" in error.value.fix


# -------------------------------------------------------------------------------------------------------- in between


@pytest.mark.parametrize(("factor", "fps"), [(2, 8), (3, 16.0), (2, 24000 / 1001)])
def test_frames_in_between_are_on_the_way(factor, fps):
    frames = moving_square()
    smooth = interpolate(frames, fps, Interpolation("minterpolate", factor))
    assert len(smooth) == 5 * factor + 1 and np.array_equal(smooth[::factor], frames)
    left = [int(np.argmax(frame[24, :, 0] > 128)) for frame in smooth]
    assert left == sorted(left) and all(abs(at - (8 + 6 / factor * step)) <= 3 for step, at in enumerate(left))
    assert len(set(left)) > len(frames)
    assert np.array_equal(interpolate(frames[:1], fps, Interpolation("minterpolate")), frames[:1])


@pytest.mark.parametrize("text", ["rife", "minterpolate:1", "minterpolate:9", "minterpolate:x", "minterpolate:2.5"])
def test_how_to_interpolate_is_checked(text):
    assert parse_interpolation("minterpolate") == Interpolation("minterpolate", 2)
    assert parse_interpolation("minterpolate:4").factor == 4
    with pytest.raises(ConfigError) as error:
        parse_interpolation(text)
    assert error.value.where == f"--interpolate {text}"


def test_both_at_once_and_neither(esrgan):
    frames = moving_square(3)
    large, fps = Postprocess(esrgan(2), Interpolation("minterpolate", 2), CPU)(frames, 8.0)
    assert large.shape == (5, 96, 160, 3) and fps == 16
    same, fps = Postprocess(None, None, CPU)(frames, 8.0)
    assert same is frames and fps == 8


# ------------------------------------------------------------------------------------------------------------- looks


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return TinyDecoder(4).eval().requires_grad_(False)


@pytest.mark.parametrize(("latent_frames", "frames"), [(1, 1), (2, 8), (3, 9), (13, 49), (22, 88)])
def test_a_look_has_as_many_frames_as_the_vae_gives(decoder, latent_frames, frames):
    pixels = decoder(torch.randn(latent_frames, 4, 2, 3))
    assert pixels.shape == (frames, 3, 16, 24) and 0 <= pixels.min() < pixels.max() <= 1


def test_a_frame_depends_on_those_before_it_only(decoder):
    """Each block remembers one frame, so that the first frames do not know of the last."""
    latents = torch.randn(5, 4, 2, 3)
    changed = torch.cat([latents[:4], torch.randn(1, 4, 2, 3)])
    one, other = decoder(latents), decoder(changed)
    assert torch.equal(one[:13], other[:13]) and not torch.equal(one[13:], other[13:])


def test_one_latent_frame_goes_through_at_a_time_and_the_pixels_are_those_of_all_together(decoder):
    latents, sizes = torch.randn(5, 4, 2, 3), []
    handle = decoder.decoder[1].register_forward_hook(lambda *of: sizes.append(len(of[2])))
    pixels = decoder(latents)
    handle.remove()
    assert sizes == [1] * 5
    torch.testing.assert_close(pixels, decoder.decoder(latents).clamp(0, 1)[3:], rtol=0, atol=1e-5)
    for block in decoder.decoder:
        block.last = None


def test_a_look_that_memory_does_not_hold_is_the_last_and_the_video_goes_on(tiny_model, decoder, tmp_path, monkeypatch):
    looks = []

    def show(self, latents):
        looks.append(latents)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Preview, "show", show)
    pipeline = load_pipeline(str(tiny_model("5b")))
    callback = Preview(decoder, read_spec(str(tiny_model())), tmp_path / "preview.png").attach(pipeline, 2)
    with pytest.warns(UserWarning, match="does not hold a look"):
        for at in range(2):
            assert callback["callback_on_step_end"](pipeline, at, 0, {"a": 1}) == {"a": 1}
    assert len(looks) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_read_with_and_without_their_encoder(decoder, tmp_path, suffix):
    weights = {**decoder.state_dict(), "encoder.0.weight": torch.zeros(3)}
    # Files may hold growths that make more frames: those of the last count.
    weights["decoder.7.conv.weight"] = torch.cat([torch.randn(256, 256, 1, 1), weights["decoder.7.conv.weight"]])
    path = tmp_path / f"taecvx{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    latents = torch.randn(3, 4, 2, 3)
    assert torch.equal(load_decoder(path)(latents), decoder(latents))


@pytest.mark.parametrize(
    "content", [b"", b"cos\nsystem\n(S'true'\ntR.", {"decoder.1.weight": torch.zeros(256, 16, 3, 3)}]
)
def test_other_weights_are_refused(tmp_path, content):
    path = tmp_path / "taecvx.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ConfigError, match="no weights of TAEHV"):
        load_decoder(path)


def test_weights_for_other_latents_are_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="for 16 latent channels, and the model has 4"):
        Preview(TinyDecoder(16), read_spec(str(tiny_model())), tmp_path / "preview.png")


@pytest.fixture
def terminal(monkeypatch):
    """``terminal(**variables)``: standard error is a terminal that sets these; what is written to it."""

    def become(**variables: str) -> io.StringIO:
        for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "TMUX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return become


@pytest.mark.parametrize(
    ("variables", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
    ],
)
def test_terminals_that_show_images_are_known(terminal, variables, protocol):
    terminal(**variables)
    assert terminal_images() == protocol


@pytest.mark.parametrize(
    ("variables", "pattern"),
    [
        ({"TERM": "xterm-kitty"}, r"^(?:\x1b_G(?:a=T,f=100,)?m=[01];([A-Za-z0-9+/=]+)\x1b\\)+\n$"),
        ({"LC_TERMINAL": "iTerm2"}, r"^\x1b\]1337;File=inline=1;size=\d+:([A-Za-z0-9+/=]+)\x07\n$"),
    ],
)
def test_a_look_is_an_image_in_the_terminal_else_a_file(tiny_model, decoder, tmp_path, terminal, variables, pattern):
    file = tmp_path / "preview.png"
    look = Preview(decoder, read_spec(str(tiny_model())), file)
    screen = terminal(**variables)
    look.show(torch.randn(1, 3, 4, 8, 8))
    written = screen.getvalue()
    assert re.match(pattern, written) and not file.exists()
    content = "".join(re.findall(r"[;:]([A-Za-z0-9+/=]{20,})", written))
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (256, 64)
    terminal(TERM="dumb")
    look.show(torch.randn(1, 3, 4, 8, 8))
    assert Image.open(file).size == (256, 64)


# --------------------------------------------------------------------------------------------------------- generate


def test_generate_enlarges_smooths_and_shows(tiny_model, decoder, esrgan, tmp_path, monkeypatch, capsys):
    """And nothing of it changes what is sampled."""
    looks, show = [], Preview.show
    monkeypatch.setattr(Preview, "show", lambda self, latents: (looks.append(latents), show(self, latents)))
    options = {"model": tiny_model("5b"), "bucket": "9x32x48", "num_inference_steps": 3, "device": "cpu"}
    plain = finetune.generate("a red circle", tmp_path / "plain", guidance_scale=1.0, **options)
    weights = tmp_path / "taecvx.safetensors"
    save_file(decoder.state_dict(), weights)
    line = f"generate --model {options['model']} --bucket 9x32x48 --steps 3 --guidance 1 --device cpu"
    line += f" --upscale {esrgan(2)} --interpolate minterpolate --preview {weights} --output {tmp_path / 'large'}"
    assert main([*line.split(), "--prompt", "a red circle"]) == 0
    (large,) = (tmp_path / "large").glob("*.mp4")
    with av.open(str(large)) as file:
        (stream,) = file.streams.video
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (96, 64, 16, 17)
    assert len(looks) == 3 and all(latents.shape == (1, 3, 4, 4, 6) for latents in looks)
    assert Image.open(tmp_path / "large/preview.png").size == (4 * 48, 32)
    again = finetune.generate("a red circle", tmp_path / "again", guidance_scale=1.0, preview=weights, **options)
    assert np.array_equal(plain.frames[0], again.frames[0])
    # What is looked at is the estimate of the clean video: after the last step it is the video.
    vae = load_vae(ModelConfig(pretrained=str(options["model"])))
    shown = vae.decode(looks[-1].transpose(1, 2) / vae.config.scaling_factor).sample[0].permute(1, 2, 3, 0)
    assert np.abs(((shown / 2 + 0.5).clamp(0, 1) * 255).numpy() - again.frames[0]).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscale": "absent.pth"}, "no such file"),
        ({"interpolate": "rife"}, "no interpolation 'rife'"),
        ({"preview": "absent.pth"}, "no weights of TAEHV"),
        ({"enhance": "some", "model": None}, "which model will read the prompts"),
        ({"endpoint": "http://localhost"}, "nobody asks the endpoint"),
        ({"videos": 10**20}, "videos of each prompt"),
        ({"extend": 10**20}, "parts more"),
        ({"fps": 1e20}, "frames per second"),
    ],
)
def test_generate_refuses_them_before_weights_load(tiny_model, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("finetune.inference.generate.embed_prompts", None)
    with pytest.raises(ConfigError, match=message):
        finetune.generate("a", tmp_path, **({"model": tiny_model(), "device": "cpu"} | options))


def test_generate_has_prompts_made_long_first(tiny_model, tmp_path, serve, monkeypatch):
    server = serve(lambda request: said("a red circle moving left"))
    options = {"model": tiny_model(), "bucket": "9x32x32", "num_inference_steps": 1, "device": "cpu"}
    report = finetune.generate("a circle", tmp_path, enhance="some", endpoint=server.url, seed=7, **options)
    assert "a-red-circle-moving-left-seed7" in report.videos[0].name and len(server.requests) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes"):
        finetune.generate("a circle", tmp_path, enhance="some", endpoint=server.url, **options)
