"""The hand-over types: what one part of the package gives to the next. Frozen, without behaviour.

Shape legend, used in every docstring of the package:
``B`` batch, ``C`` channels, ``F`` frames (pixel or latent), ``H`` height, ``W`` width, ``L`` text tokens, ``D`` text
width, ``K`` noise-augmented draws of an image condition. Video and latents are always ``[..., C, F, H, W]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GIB = 2**30

MIB = 2**20

DtypeName = Literal["bf16", "fp16", "fp32"]
"""What weights are held and computed in, as configurations name it."""


CompanionName = Literal["control", "mask"]
"""What a row may have beside its video that goes with it frame for frame: ``control``, a video that the model is
conditioned on; ``mask``, which is white where the video is learnt from."""

RowFile = Literal["image"] | CompanionName
"""What a run may read of a row beside its video and captions: also the ``image`` that stands for the first frame."""

Decoder = Literal["pyav", "decord"]
"""What decodes videos, as configurations name it."""

Offload = Literal["none", "model", "group", "sequential"]
"""What waits in host memory while videos are sampled: nothing; the module that does not compute now; all of the
transformer's blocks but two; all layers but two. Ordered from the fastest to the slowest."""

Quantization = Literal["int8", "int8-dynamic", "fp8", "fp8-dynamic", "fp8-cast", "nf4", "bnb-int8"]
"""Weights in fewer bits while videos are sampled: torchao's, but for ``fp8-cast``, which is torch's own cast of whole
layers, and bitsandbytes' ``nf4`` and ``bnb-int8``. With ``-dynamic`` products are computed in eight bits too."""


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Torch's dtype of this name."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


DTYPE_BYTES: Mapping[DtypeName, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Of one number."""


@dataclass(frozen=True)
class Sample:
    """One row of a dataset: a video, its caption, and where the row was written (for messages)."""

    video: Path
    caption: str
    image: Path | None
    where: str
    """Such as ``metadata.jsonl:17``: the file and line (or row) a person can open."""
    repeats: float = 1.0
    """How often per epoch: 3 = three times, 0.5 = in every other epoch on average (see ``schedule.epoch_items``)."""
    span_s: tuple[float, float] | None = None
    """The part of the video that is the row's: begin and end in seconds from its first frame; None: all of it."""
    variants: tuple[str, ...] = ()
    """Further captions: training takes any of them or ``caption``, measurements ``caption`` alone."""
    caption_dropout: float | None = None
    """In place of the configuration's; None where its source has none of its own."""
    weight: float = 1.0
    """What its loss is multiplied by in training."""
    random_flip: bool = False
    """Whether training may mirror its clips left to right."""
    prior: bool = False
    """Whether training on it aims at what the base model predicts, not at the clip."""
    companions: tuple[tuple[CompanionName, Path], ...] = ()
    """What goes with the video frame for frame, as far as the run reads it; in the order of the run's names."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption, the first one first."""
        return self.caption, *self.variants


@dataclass(frozen=True)
class Bucket:
    """A shape that every clip in one micro-batch shares."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


_PRIMARIES = {"bt709": "BT.709", "bt2020": "BT.2020", "p3": "P3"}

CORRECTIONS: Mapping[str, str] = {
    "turned-1": "turned as the file states",
    "bwdif-auto-1": "interlaced: made progressive (bwdif)",
    "bwdif-tff-1": "interlaced, by its container, top field first: made progressive (bwdif)",
    "bwdif-bff-1": "interlaced, by its container, bottom field first: made progressive (bwdif)",
    "on-black-1": "transparent: laid on black",
    **{f"pq-{name}-1": f"HDR (PQ, {title}): tone-mapped to SDR (BT.2390)" for name, title in _PRIMARIES.items()},
    **{f"hlg-{name}-1": f"HDR (HLG, {title}): tone-mapped to SDR (BT.2390)" for name, title in _PRIMARIES.items()},
    **{f"sdr-{name}-1": f"colours of {_PRIMARIES[name]}: converted to BT.709" for name in ("bt2020", "p3")},
}
"""What is done to a video that is not plain (upright, progressive, opaque, SDR), in words for the user. The names stand
in cache addresses, so one whose arithmetic changes gets a new number; plain videos have none."""


@dataclass(frozen=True)
class VideoProbe:
    """What a container's header says of its video stream, after its orientation is applied."""

    frames: int
    fps: float
    height: int
    width: int
    frame_times_s: Sequence[float]
    """Presentation time of every frame in seconds from the first, ascending; its length is ``frames``."""
    orientation: int
    """How stored frames are made upright, by EXIF's numbers 1 to 8; height and width are after it."""
    corrections: tuple[str, ...] = ()
    """Of ``CORRECTIONS``: what is done to its frames; empty for a plain video."""
    still: bool = False
    """Whether it is a still image, taken for a video of one frame; its rate then means nothing."""


@dataclass(frozen=True)
class ClipPlan:
    """How one clip is cut out of one video. Two equal plans on equal bytes give equal pixels."""

    frame_indices: tuple[int, ...]
    """Source frame numbers in presentation order; the last one is repeated where ``short_clips: pad`` pads."""
    resize_hw: tuple[int, int]
    crop_yx: tuple[int, int]
    bucket: Bucket
    flip: bool = False
    """Whether the cut frames are mirrored left to right, and the image that stands for the first frame with them."""


@dataclass(frozen=True)
class Companion:
    """A video that goes with a clip frame for frame, and how it is cut so that it lies over the clip."""

    name: CompanionName
    path: Path
    probe: VideoProbe
    plan: ClipPlan


@dataclass(frozen=True)
class Clip:
    """Decoded pixels: uint8 RGB, [3, F, H, W]."""

    pixels: Tensor
    image: Tensor | None = None
    """The image that stands for the first frame, [3, H, W]; None where the first frame itself does."""
    companions: Mapping[CompanionName, Tensor] = field(default_factory=dict)
    """What goes with the clip, each of its shape."""


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds for one clip and its caption; all tensors on the CPU.

    ``latents_mean`` and ``latents_std`` are the VAE posterior before any scaling factor, [C, F, H, W];
    ``image_latents`` are K posterior samples of the noise-augmented first frame, before any scaling, [K, C, 1, H, W];
    ``frame_latents`` are those of the last N latent frames, each made from the last pixel frame that it covers alone,
    [K, C, N, H, W].
    """

    latents_mean: Tensor
    latents_std: Tensor
    prompt_embeds: Tensor
    image_latents: Tensor | None
    frame_latents: Tensor | None = None
    control_latents: Tensor | None = None
    """The mode of the VAE's posterior of the control video, before any scaling, [C, F, H, W]."""
    mask: Tensor | None = None
    """How white the mask is at each place of the latents, 0 to 1, [1, F, H, W]."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch with every random choice already made on the CPU (``datasets.schedule``, ``sample_noise``).

    ``latents`` and ``noise`` are float32 [B, C, F, H, W]: posterior samples in model space (scaled, and padded in front
    where the model has a temporal patch). ``image_latents`` are scaled the way the stock pipeline scales them and
    zeroed where image dropout fell, [B, C, 1, H, W]; of a control video (padded as ``latents``), and where other frames
    than the first may be given, [B, C, F, H, W];
    None for text-to-video.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    image_latents: Tensor | None
    slots: tuple[int, ...]
    """Each sample's global index inside its optimizer step."""
    clips: tuple[str, ...]
    """Names of the clips, for messages."""
    weights: Tensor | None = None
    """What each sample's loss is multiplied by, float32 [B]; None where every one counts 1."""
    timesteps_on_host: tuple[int, ...] | None = None
    """``timesteps`` as numbers, which are there without asking the device; None where they are not known."""
    mask: Tensor | None = None
    """What each place of the latents counts in its sample's loss, float32 [B, 1, F, H, W]; None where all count the
    same."""
    prior: tuple[bool, ...] | None = None
    """Which samples aim at what the base model predicts; None where no sample of the whole run does."""


@dataclass(frozen=True)
class Noised:
    """The diffused input and its target: ``noisy_latents``, ``velocity`` float32 [B, C, F, H, W]."""

    noisy_latents: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class RunState:
    """Beside the tensors, the whole of "resume"."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: int
    cache_digest: str
    samples_seen: int = 0
    best_heldout_loss: float | None = None
    best_step: int | None = None
    weights: str = ""
    """``tensor_files.weights_digest`` of what trains, in a saved state: equal where two runs are equal, bit for bit."""
    base: str = ""
    """``base_digest`` of the transformer that is fine-tuned; empty in states from before it was recorded."""


# ------------------------------------------------------------------------------ the base of every configuration section

MOST_STEPS = 100_000_000
"""Bound of every count of optimizer steps: three years at one a second."""


class Strict(BaseModel):
    """A configuration section: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class SamplePrompt(Strict):
    """One video to sample: what for, from which image, with which noise."""

    prompt: str
    """The text to sample for, as it stands: caption prefix, suffix and trigger word are not added."""
    image: Path | None = None
    """First frame, for image-to-video models; a relative path starts at the configuration file's folder."""
    last_image: Path | None = None
    """Last frame, for image-to-video models; best for one that was trained with it (``data.condition_frames``)."""
    keyframes: dict[int, Path] | None = Field(None, max_length=64)
    """Further frames by their number in the video: ``{24: middle.png}``. Numbers are multiples of the VAE's 4."""
    control: Path | None = None
    """Control video that it follows, for models with ``model.control``; a relative path as for ``image``."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the noise that sampling starts from: the same at every step, so that only the weights differ."""

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of all frames that are given."""
        ends = [image for image in (self.image, self.last_image) if image is not None]
        return (*ends, *(self.keyframes or {}).values())

    def images_by_frame(self, frames: int) -> dict[int, Path]:
        """The files of all frames that are given, by their number in a video of ``frames``, rising."""
        ends = {0: self.image, frames - 1: self.last_image}
        given = (self.keyframes or {}) | {frame: image for frame, image in ends.items() if image is not None}
        return dict(sorted(given.items()))

    def image_faults(self, frames: int, step: int) -> Iterator[str]:
        """What is wrong with the numbers of ``keyframes`` in a video of ``frames``.

        Args:
            frames: of the video.
            step: pixel frames of a latent frame.
        """
        for frame in self.keyframes or ():
            if not 0 <= frame < frames or frame % step:
                yield f"a keyframe at frame {frame} is not possible: 0, {step}, {2 * step}... to {frames - 1}"
            elif (frame == 0 and self.image) or (frame == frames - 1 and self.last_image):
                name = "image" if frame == 0 else "last_image"
                yield f"frame {frame} is given twice, as {name} and in keyframes"
