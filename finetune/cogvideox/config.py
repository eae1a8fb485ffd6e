"""The sections of a configuration that say which model is trained, on what objective, what is withheld; no torch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from finetune.cogvideox.components import loading, require_own_files
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.core.files import LORA_FILE
from finetune.core.types import DtypeName, Strict, torch_dtype

if TYPE_CHECKING:
    import torch


Attention = Literal["auto", "cudnn", "flash", "flash3", "flash4", "efficient", "math"]


class MergedAdapter(Strict):
    """A LoRA that becomes a part of the base model."""

    path: Path
    """A LoRA safetensors file in diffusers' layout, or an export's folder. ``finetune convert`` makes one of others."""
    strength: float = Field(1.0, ge=-100, le=100)
    """1 as it was trained."""
    sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Of the file. A run notes it when it begins, and goes on with that file alone; so need not you."""

    @property
    def file(self) -> Path:
        """The safetensors file itself."""
        return self.path / LORA_FILE if self.path.is_dir() else self.path

    def __str__(self) -> str:
        return f"{self.file.name} at strength {self.strength:g}"


class ModelConfig(Strict):
    """Which checkpoint is fine-tuned, and in which precision its frozen weights are held."""

    pretrained: str
    """A CogVideoX checkpoint in diffusers format: a folder, or an id on the Hugging Face hub such as
    ``zai-org/CogVideoX-5b``."""
    revision: str | None = None
    """Branch, tag or commit on the hub; left out, its main branch. A commit makes a run repeatable."""
    dtype: Literal["auto", DtypeName] = "auto"
    """What weights are held and computed in. ``auto`` is ``fp32`` where the stored transformer is, else ``bf16``.
    LoRA weights, the optimizer's master copies and the loss are float32 in any case."""
    control: bool = False
    """Train a text-to-video model to follow a control video (depth, edges, pose, low resolution, masked video), which
    every row of the dataset then names: its latents are concatenated on channels, and the patch embedding gets as many
    channels more, which begin at zero. A checkpoint that diffusers' ``CogVideoXFunControlPipeline`` wrote follows one
    in any case."""
    adapters: tuple[MergedAdapter, ...] = Field((), max_length=100)
    """LoRAs that are merged into the transformer, in this order, before anything is trained on top of it:
    ``[{path: style.safetensors, strength: 0.8}]``. Whoever uses what was trained has to merge them too, or load them
    beside it."""
    attention: Attention = "auto"
    """Which of torch's kernels computes attention. ``auto`` times those that are there for a second when a run begins
    on a GPU, and the run keeps the fastest; on a CPU it is torch's choice. ``flash3`` and ``flash4`` need the package
    ``flash_attn_interface`` or ``flash-attn-4``. The results differ in their last digits."""
    riflex: int | None = Field(None, ge=1, le=100_000)
    """For videos longer than the model makes: the frames of the longest one, for which RIFLEx lowers the one frequency
    of the rotary positions that would make it repeat. Buckets may then have up to so many frames. Sampling needs the
    same number, which ``generate`` takes from the adapter's record. Not for 2B, nor for 5B-I2V."""

    def dtype_name(self) -> DtypeName:
        """What ``dtype`` stands for; ``auto`` looks at the transformer's files, and so needs them here.

        Raises:
            ModelError: if ``auto`` has to look and the transformer cannot be found.
        """
        if self.dtype != "auto":
            return self.dtype
        folder = resolve_pretrained(self.pretrained, self.revision, components=["transformer"])
        return "fp32" if _stored_dtype(folder / "transformer") == "F32" else "bf16"

    def torch_dtype(self) -> torch.dtype:
        """``dtype_name`` as torch has it. Raises as that does."""
        return torch_dtype(self.dtype_name())


def _stored_dtype(folder: Path) -> str | None:
    """The dtype of most stored numbers, in safetensors' spelling (``BF16``); None where no weights are stored.

    The first file tells: a checkpoint is saved in one dtype, but for a few tables such as learned positions.
    """
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is None:
        return None
    require_own_files(folder)
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    with loading(folder.name, folder.parent), safe_open(path, framework="numpy") as source:
        for name in source.keys():  # noqa: SIM118 - not a mapping
            piece = source.get_slice(name)  # its entry in the table of contents; no tensor is read
            numbers[piece.get_dtype()] += math.prod(piece.get_shape())
    return numbers.most_common(1)[0][0] if numbers else None


StoredFrames = Literal["last", "all"]
"""Which latent frames the cache holds as single images beside the first."""


class FirstFrame(Strict):
    """The first frame alone, as the published models were trained."""

    kind: Literal["first"] = "first"

    @property
    def stored(self) -> StoredFrames | None:
        """What the cache holds beside the first frame."""
        return None


class FirstAndLastFrames(Strict):
    """The first frame and the last one, for videos between two images."""

    kind: Literal["first_last"] = "first_last"

    @property
    def stored(self) -> StoredFrames | None:
        """What the cache holds beside the first frame."""
        return "last"


class AnyFrames(Strict):
    """Drawn for each sample anew: one of four choices, as often as its share says, so that one model takes them all."""

    kind: Literal["any"] = "any"
    first: float = Field(1.0, ge=0, le=1e6)
    """Share of samples that are given the first frame alone."""
    first_last: float = Field(1.0, ge=0, le=1e6)
    """Share of samples that are given the first frame and the last one."""
    last: float = Field(1.0, ge=0, le=1e6)
    """Share of samples that are given the last frame alone."""
    random: float = Field(1.0, ge=0, le=1e6)
    """Share of samples that are given 1 to ``most`` frames, each number as often, anywhere in the clip."""
    most: int = Field(3, ge=1, le=64)
    """The greatest number of frames of a ``random`` sample."""

    @model_validator(mode="after")
    def _some_share(self) -> AnyFrames:
        if not any(self.shares):
            raise ValueError("every share is 0, so no sample has any frames")
        return self

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Of the four choices, in the order in which they stand here."""
        return self.first, self.first_last, self.last, self.random

    @property
    def stored(self) -> StoredFrames | None:
        """What the cache holds beside the first frame."""
        return "all" if self.random else "last" if self.first_last or self.last else None


ConditionFrames = FirstFrame | FirstAndLastFrames | AnyFrames


class DropoutConfig(Strict):
    """Which conditions a sample has, and how often they are withheld, so that classifier-free guidance has something to
    guide away from.
    """

    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a sample trains on the unconditional text. The original CogVideoX training used 0.1."""
    image_dropout: float = Field(0.05, ge=0, le=1)
    """Probability that an image-to-video sample trains on all-zero images. The original training used 0.05."""
    control_dropout: float = Field(0.05, ge=0, le=1)
    """Probability that a sample trains on an all-zero control video (``model.control``), so that the model stays one
    that can do without."""
    unconditional_text: Literal["empty", "zeros"] = "empty"
    """What stands for "no caption": the embedding of the empty caption, as diffusers samples, or zeros, as SAT did."""
    condition_frames: Annotated[ConditionFrames, Field(discriminator="kind")] = FirstFrame()
    """Which frames of a clip an image-to-video model is given; a kind's name stands for its defaults."""

    @field_validator("condition_frames", mode="before")
    @classmethod
    def _condition_frames_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class UniformTimesteps(Strict):
    """Every timestep as often as any other, as CogVideoX was trained."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalTimesteps(Strict):
    """The middle of the schedule more often than its ends: the sigmoid of a normal number (Esser et al. 2024)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = Field(0.0, ge=-10, le=10)
    """Of the normal number: above 0 for more noise, below for less."""
    std: float = Field(1.0, ge=1e-3, le=10)
    """Of the normal number: smaller for a narrower peak."""


class TimestepBand(Strict):
    """A range of timesteps, uniform within."""

    first: int = Field(ge=0, le=1_000_000)
    """Lowest timestep; 0 has least noise."""
    last: int = Field(ge=0, le=1_000_000)
    """Highest timestep; 999 is noise alone."""
    share: float = Field(1.0, ge=1e-6, le=1e6)
    """How often it is drawn, relative to the other bands' shares."""

    @model_validator(mode="after")
    def _in_order(self) -> TimestepBand:
        if self.last < self.first:
            raise ValueError(f"the band's last timestep, {self.last}, is below its first, {self.first}")
        return self


class BandedTimesteps(Strict):
    """Timesteps from some bands alone: first a band by its share, then any timestep in it."""

    kind: Literal["bands"] = "bands"
    bands: tuple[TimestepBand, ...] = Field(min_length=1, max_length=1_000)
    """Such as ``[{first: 600, last: 999, share: 0.7}, {first: 0, last: 599, share: 0.3}]``."""


TimestepSampling = UniformTimesteps | LogitNormalTimesteps | BandedTimesteps


class VelocityWeighting(Strict):
    """The squared error of the velocity as it is, as CogVideoX was trained."""

    kind: Literal["velocity"] = "velocity"


class MinSnrWeighting(Strict):
    """min(SNR, gamma) / (SNR + 1): timesteps with little noise count less, and so does nearly pure noise (Hang et al.
    2023).
    """

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(5.0, ge=1e-3, le=1e6)
    """The signal-to-noise ratio above which the weight falls, as gamma / (SNR + 1)."""


class NoiseWeighting(Strict):
    """The squared error of the noise that the velocity implies: weight alpha_bar. Details more."""

    kind: Literal["noise"] = "noise"


class CleanWeighting(Strict):
    """The squared error of the clean latents that the velocity implies: weight 1 - alpha_bar. Structure more."""

    kind: Literal["clean"] = "clean"


LossWeighting = VelocityWeighting | MinSnrWeighting | NoiseWeighting | CleanWeighting


class MaskedLoss(Strict):
    """Learn a part of the picture: where a clip's mask video is white. A clip without a mask is learnt whole."""

    outside: float = Field(0.1, ge=0, le=1)
    """What the error counts where the mask is black, of 1 where it is white: 0 for nothing, as where there is something
    that must not be learnt. A little keeps what is outside from drifting."""


class ObjectiveConfig(Strict):
    """What of the prediction's error is learnt from. Losses are shown, and held-out clips measured, without weights and
    at evenly spread timesteps, and held-out clips without masks, so that runs can be compared.
    """

    weighting: Annotated[LossWeighting, Field(discriminator="kind")] = VelocityWeighting()
    """What a sample's loss is multiplied by, as a function of its timestep; a kind's name stands for its defaults."""
    timesteps: Annotated[TimestepSampling, Field(discriminator="kind")] = UniformTimesteps()
    """How often each timestep is trained; a kind's name stands for its defaults."""
    masked: MaskedLoss | None = None
    """Learn only, or mostly, what the clips' mask videos show in white; left out, masks are not read."""

    @field_validator("weighting", "timesteps", mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value
