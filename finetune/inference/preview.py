"""A look at a video while it is sampled: the estimate of the clean video, decoded by a tiny VAE.

The network is TAEHV (Ollin Boer Bohan, MIT licence), whose weights for CogVideoX are ``taecvx``; neither diffusers nor
another kept package has its architecture. They are given, never fetched.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import ConfigError, first_line, is_out_of_memory
from finetune.core.files import atomic_write_bytes
from finetune.inference.videos import Frames

COLUMNS = 4
"""Frames that are shown, from the first to the last."""

LOOKS = 10
"""At one video, about."""

_WIDTH = 960
"""Of what is shown in a terminal, in pixels, at most."""


# ---------------------------------------------------------------------------------------------------------- the network


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _MemoryBlock(nn.Module):
    """Sees each frame and what the frame before was at the same place."""

    last: Tensor | None = None
    """Of the frames that it was given before; None at the beginning of a video."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros_like(x[:1]) if self.last is None else self.last
        before = torch.cat([first, x[:-1]])
        self.last = x[-1:]
        return torch.relu(self.conv(torch.cat([x, before], 1)) + x)


class _Grow(nn.Module):
    """Makes ``stride`` frames of each."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])  # type: ignore[no-any-return]


class TinyDecoder(nn.Module):
    """TAEHV's decoder for CogVideoX, names as in its files; a batch is one video's frames."""

    def __init__(self, latent_channels: int = 16) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        layers: list[nn.Module] = [_Clamp(), nn.Conv2d(latent_channels, 256, 3, padding=1), nn.ReLU()]
        for width, following, stride in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
            layers += [*(_MemoryBlock(width) for _ in range(3)), nn.Upsample(scale_factor=2), _Grow(width, stride)]
            layers.append(nn.Conv2d(width, following, 3, padding=1, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """Latents before any scaling, [F', C, H', W'], to pixels in 0..1, [F, 3, H, W], on the CPU.

        As of the VAE, an even number of latent frames gives 4F' frames, an odd one 4F' - 3. One goes through at a time:
        together they would take 8.6 GiB for 49x480x720.
        """
        blocks = [block for block in self.decoder if isinstance(block, _MemoryBlock)]
        try:
            pixels = torch.cat([self.decoder(frame[None]).clamp(0, 1).cpu() for frame in latents])
        finally:
            for block in blocks:
                block.last = None
        return pixels if len(latents) % 2 == 0 else pixels[3:]


def load_decoder(path: Path) -> TinyDecoder:
    """Read ``taecvx`` weights, as tensors only.

    Args:
        path: ``.safetensors`` or ``.pth``, with or without the encoder.

    Raises:
        ConfigError: if it is no file of such weights.
    """
    fix = "name taecvx.safetensors or taecvx.pth (github.com/madebyollin/taehv)"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        decoder = TinyDecoder(own["decoder.1.weight"].shape[1])
        for name, tensor in decoder.state_dict().items():
            if name.endswith(("7.conv.weight", "13.conv.weight", "19.conv.weight")):
                own[name] = own[name][-len(tensor) :]  # files may make more frames than CogVideoX has: the last count
        decoder.load_state_dict(own)
    except Exception as error:  # unpicklers raise anything
        what = f"these are no weights of TAEHV for CogVideoX: {first_line(error):.200}"
        raise ConfigError(what, where=f"--preview {path}", fix=fix) from error
    return decoder.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- the looking


class Preview:
    """Shows a video while the stock pipeline samples it: in a terminal that shows images, else in a file.

    Args:
        decoder: of ``load_decoder``.
        spec: of the model.
        file: where it is written if the terminal cannot show it; replaced with every look.

    Raises:
        ConfigError: if the decoder is for other latents than the model's.
    """

    def __init__(self, decoder: TinyDecoder, spec: ModelSpec, file: Path) -> None:
        channels = decoder.latent_channels
        if channels != spec.latent_channels:
            what = f"the weights are for {channels} latent channels, and the model has {spec.latent_channels}"
            raise ConfigError(what, where="--preview", fix="name the weights for CogVideoX")
        self._decoder, self._spec, self._file = decoder, spec, file
        self._lacks_memory = False

    def attach(self, pipeline: Any, num_inference_steps: int) -> dict[str, Any]:
        """Watch a pipeline; returns what it is called with for that.

        A scheduler's step gives the estimate of the clean video beside the next latents. The pipeline hands only those
        on, which are noise until late, so the step is listened to.
        """
        step, estimates = pipeline.scheduler.step, [torch.empty(0)]

        @functools.wraps(step)  # the pipeline looks at its parameters: without them it would draw noise unseeded
        def listened(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            estimates[0] = result[1]
            return result

        pipeline.scheduler.step = listened
        every = max(1, num_inference_steps // LOOKS)

        def look(pipeline: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if at % every == every - 1 and not self._lacks_memory:
                try:
                    self.show(estimates[0])
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self._lacks_memory = True
                    warnings.warn("the GPU's memory does not hold a look at the video: no more are taken", stacklevel=1)
            return tensors

        return {"callback_on_step_end": look}

    @torch.no_grad()
    def show(self, latents: Tensor) -> None:
        """Show some frames of scaled latents, [1, F', C, H', W'], as pipelines have them."""
        decoder = self._decoder.to(latents.device)
        pixels = decoder((latents[0] / self._spec.scaling_factor).to(torch.float32))
        chosen = pixels[torch.linspace(0, len(pixels) - 1, min(COLUMNS, len(pixels))).round().long()]
        strip: Frames = (chosen * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        picture = Image.fromarray(np.concatenate(list(strip), axis=1))
        protocol = terminal_images()
        if protocol is not None:
            picture.thumbnail((_WIDTH, _WIDTH))
        content = io.BytesIO()
        picture.save(content, "PNG")
        if protocol is None:
            atomic_write_bytes(self._file, content.getvalue())
        else:
            sys.stderr.write(_ESCAPES[protocol](content.getvalue()) + "\n")
            sys.stderr.flush()


def terminal_images() -> Literal["kitty", "iterm2"] | None:
    """The protocol in which the terminal shows images, by the variables that terminals set; None where it shows none.

    Not through tmux and screen, which swallow both.
    """
    has, terminal = os.environ.get, os.environ.get("TERM", "")
    if not sys.stderr.isatty() or has("TMUX") or terminal.startswith(("screen", "tmux")):
        return None
    if has("KITTY_WINDOW_ID") or "kitty" in terminal or "ghostty" in terminal:
        return "kitty"
    if "iTerm" in (has("TERM_PROGRAM") or has("LC_TERMINAL") or "") or has("TERM_PROGRAM") == "WezTerm":
        return "iterm2"
    return None


def _kitty(content: bytes) -> str:
    """Kitty's graphics protocol: PNG, in chunks of 4096 characters."""
    encoded = base64.b64encode(content).decode("ascii")
    chunks = [encoded[at : at + 4096] for at in range(0, len(encoded), 4096)]
    last = len(chunks) - 1
    return "".join(
        f"\x1b_G{'a=T,f=100,' if at == 0 else ''}m={int(at < last)};{chunk}\x1b\\" for at, chunk in enumerate(chunks)
    )


def _iterm2(content: bytes) -> str:
    """iTerm2's inline images, which WezTerm shows as well."""
    return f"\x1b]1337;File=inline=1;size={len(content)}:{base64.b64encode(content).decode('ascii')}\x07"


_ESCAPES: dict[str, Callable[[bytes], str]] = {"kitty": _kitty, "iterm2": _iterm2}
