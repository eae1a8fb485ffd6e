"""What a checkpoint says of itself: the numbers that training needs, read from its JSON and from nothing else.

No code here or above asks for a model's name. Two checkpoints with the same numbers are treated alike, so that a new
CogVideoX variant, or a tiny look-alike of a published one, costs no code. Reading needs neither weights nor diffusers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from finetune.errors import ModelError, raise_all
from finetune.types import Bucket

MODEL_INDEX = "model_index.json"
CONFIG_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
}
"""Where a diffusers pipeline folder keeps the JSON of each component."""

KNOWN_MODELS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
"""Published checkpoints whose JSON ships with this package (``known_model``)."""

_WEIGHT_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")
_LONGEST_S = 10
"""Seconds that the second generation was made for: it states 16N+1 frames with N <= 10, and no file of it says so."""


@dataclass(frozen=True)
class Facts:
    """A CogVideoX checkpoint in numbers; the names are those of its JSON wherever it has one."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    """Of the transformer: the latent channels, or twice as many where an image condition is concatenated."""
    out_channels: int
    patch_size: int
    """Latent cells per token, each way."""
    patch_size_t: int | None
    """Latent frames per token; None in the first generation, whose tokens span one frame."""
    sample_height: int
    """Latent cells. The native height of the first generation; of the second, the reach of its position table."""
    sample_width: int
    """As ``sample_height``."""
    sample_frames: int
    """Pixel frames, unlike the two above; diffusers keeps it so for compatibility."""
    use_rotary: bool
    use_learned_positions: bool
    ofs_embed_dim: int | None
    """Width of the offset embedding; a model that has one is always given the offset 2.0."""
    text_embed_dim: int
    max_text_seq_length: int
    """Text tokens, padding included: CogVideoX attends to all of them."""
    latent_channels: int
    scaling_factor: float
    """Latents are multiplied by it before the transformer sees them."""
    invert_scale_latents: bool
    """Whether the latents of an *image condition* are divided by the scaling factor instead."""
    vae_spatial: int
    """Pixels per latent cell, each way."""
    vae_temporal: int
    """Pixel frames per latent frame, after the first."""
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    snr_shift_scale: float
    rescale_betas_zero_snr: bool
    prediction_type: str

    @property
    def image_to_video(self) -> bool:
        """Whether the model is conditioned on a first frame, concatenated on channels."""
        return self.in_channels == 2 * self.latent_channels

    @property
    def native_fps(self) -> int:
        """Frames per second of the videos it was trained on.

        The one number that no file states: the first generation was trained at 8, the second at 16, and only the
        second has a temporal patch.
        """
        return 8 if self.patch_size_t is None else 16

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this: one token's side."""
        return self.vae_spatial * self.patch_size

    @property
    def frames_step(self) -> int:
        """A clip has this many frames times N, plus 1; see ``check_bucket``."""
        if self.patch_size_t is None:
            return math.lcm(self.vae_temporal, self.native_fps)
        return self.vae_temporal

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of ``frames`` pixel frames, before front padding."""
        return (frames - 1) // self.vae_temporal + 1

    def padded_latent_frames(self, frames: int) -> int:
        """Latent frames as the transformer sees them: padded in front to whole temporal patches."""
        latent_frames = self.latent_frames(frames)
        return latent_frames + self.front_padding(latent_frames)

    def front_padding(self, latent_frames: int) -> int:
        """How many copies of the first latent frame go before ``latent_frames`` frames: ``(p - F' mod p) mod p``."""
        return -latent_frames % (self.patch_size_t or 1)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """(C, F', H', W') of a clip's latents, before front padding."""
        return (
            self.latent_channels,
            self.latent_frames(bucket.frames),
            bucket.height // self.vae_spatial,
            bucket.width // self.vae_spatial,
        )

    def tokens(self, bucket: Bucket) -> int:
        """Length of the sequence the transformer attends over: video tokens and text tokens."""
        frames = self.padded_latent_frames(bucket.frames) // (self.patch_size_t or 1)
        return (
            frames * (bucket.height // self.size_multiple) * (bucket.width // self.size_multiple)
            + self.max_text_seq_length
        )

    def check_bucket(self, bucket: Bucket) -> list[str]:
        """What makes ``bucket`` impossible for this model, in words with the nearest legal values; empty if nothing.

        - Learned positions are one table, for the native height, width and frame count. diffusers refuses another
          size, and silently puts a sine table in its place at another frame count.
        - The VAE takes 4N+1 frames. The first generation was made for whole seconds, 8N+1 up to its ``sample_frames``.
          The second asks for 16N+1, but its front padding takes any 4N+1: see ``advise_bucket``.
        - A token is ``size_multiple`` pixels wide and high.
        - The second generation cuts its rotary positions out of a table of ``sample_height`` x ``sample_width``.
          The first stretches them, and sine positions are computed for any size.
        """
        native = Bucket(self.sample_frames, self.sample_height * self.vae_spatial, self.sample_width * self.vae_spatial)
        if self.use_learned_positions:
            fixed = f"its learned positions fix it to {native} (frames x height x width)"
            return [] if bucket == native else [f"{bucket} is not possible for this model: {fixed}"]
        problems = []
        longest = self.sample_frames if self.patch_size_t is None else None
        if bucket.frames % self.frames_step != 1 % self.frames_step or (longest and bucket.frames > longest):
            rule = f"{self.frames_step}N+1 frames" + (f", at most {longest}" if longest else "")
            legal = _nearest(bucket.frames, self.frames_step, offset=1, largest=longest)
            problems.append(f"{bucket.frames} frames are not possible: this model takes {rule}; nearest: {legal}")
        for side, pixels, native_pixels in (
            ("height", bucket.height, native.height),
            ("width", bucket.width, native.width),
        ):
            largest = native_pixels if self.use_rotary and self.patch_size_t is not None else None
            if pixels % self.size_multiple or (largest and pixels > largest):
                rule = f"a multiple of {self.size_multiple}" + (f", at most {largest}" if largest else "")
                legal = _nearest(pixels, self.size_multiple, offset=0, largest=largest)
                problems.append(f"{side} {pixels} is not possible: it must be {rule}; nearest: {legal}")
        return problems

    def advise_bucket(self, bucket: Bucket) -> list[str]:
        """What is possible but not what the model was made for, in words; empty if nothing. For legal buckets."""
        advice = []
        if self.patch_size_t is not None:
            step, longest = self.native_fps, self.native_fps * _LONGEST_S + 1
            if bucket.frames % step != 1 or bucket.frames > longest:
                legal = _nearest(bucket.frames, step, offset=1, largest=longest)
                advice.append(
                    f"{bucket.frames} frames: the model was made for {step}N+1 frames, at most {longest}; "
                    f"nearest: {legal} (others train, with a padded first frame where needed)"
                )
        elif (native := (self.sample_height * self.vae_spatial, self.sample_width * self.vae_spatial)) != (
            bucket.height,
            bucket.width,
        ):
            advice.append(
                f"{bucket.height}x{bucket.width}: the model was made for {native[0]}x{native[1]} (height x width); "
                "at other sizes it needs more steps and more clips to look right"
            )
        return advice


def _nearest(value: int, step: int, *, offset: int, largest: int | None) -> str:
    """The legal values ``step * N + offset`` around ``value``, as text."""
    below = max((value - offset) // step * step + offset, offset or step)
    if largest is not None and below + step > largest:
        return str(min(below, (largest - offset) // step * step + offset))
    return f"{below} or {below + step}" if below < value else str(below)


class _Json(BaseModel):
    """A component's JSON: known keys checked, others left alone; defaults are those of the diffusers class."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Transformer(_Json):
    """Defaults of ``diffusers.CogVideoXTransformer3DModel``."""

    num_layers: PositiveInt = 30
    num_attention_heads: PositiveInt = 30
    attention_head_dim: PositiveInt = 64
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    patch_size: PositiveInt = 2
    patch_size_t: PositiveInt | None = None
    sample_height: PositiveInt = 60
    sample_width: PositiveInt = 90
    sample_frames: PositiveInt = 49
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    ofs_embed_dim: PositiveInt | None = None
    text_embed_dim: PositiveInt = 4096
    max_text_seq_length: PositiveInt = 226
    temporal_compression_ratio: PositiveInt = 4


class _Vae(_Json):
    """Defaults of ``diffusers.AutoencoderKLCogVideoX``."""

    block_out_channels: tuple[PositiveInt, ...] = (128, 256, 256, 512)
    latent_channels: PositiveInt = 16
    temporal_compression_ratio: PositiveInt = 4
    scaling_factor: PositiveFloat = 1.15258426
    invert_scale_latents: bool = False


class _Scheduler(_Json):
    """Defaults of ``diffusers.CogVideoXDDIMScheduler``, which ``CogVideoXDPMScheduler`` shares."""

    num_train_timesteps: PositiveInt = 1000
    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.0120
    beta_schedule: str = "scaled_linear"
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: PositiveFloat = 3.0


class _TextEncoder(_Json):
    """A T5 encoder's; it has no default, because this package would not know whose."""

    d_model: PositiveInt = Field()


_CLASSES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("CogVideoXTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
}


def read_facts(pretrained: str, revision: str | None = None) -> Facts:
    """Read a checkpoint's facts from its JSON; no weight is read or downloaded.

    Args:
        pretrained: a diffusers pipeline folder, or the id of one on the Hugging Face hub.
        revision: branch, tag or commit on the hub; for a folder only None.

    Raises:
        ModelError: if it cannot be found, or is not a CogVideoX; every wrong file and key is named.
    """
    folder = _locate(pretrained, revision, patterns=[MODEL_INDEX, *CONFIG_FILES.values()])
    index = _read_json(folder / MODEL_INDEX)
    pipeline = index.get("_class_name")
    if not str(pipeline).startswith("CogVideoX"):
        raise ModelError(
            f"this is not a CogVideoX pipeline: _class_name is {pipeline!r}",
            where=str(folder / MODEL_INDEX),
            fix="give model.pretrained a CogVideoX checkpoint in diffusers format",
        )
    transformer = _component(folder, "transformer", _Transformer)
    vae = _component(folder, "vae", _Vae)
    scheduler = _component(folder, "scheduler", _Scheduler)
    # Training from a complete cache needs no text encoder, so its folder may be absent; if present it has to fit.
    text_encoder = None
    if (folder / CONFIG_FILES["text_encoder"]).is_file():
        text_encoder = _component(folder, "text_encoder", _TextEncoder)
    raise_all(
        ModelError,
        list(_misfits(folder, transformer, vae, scheduler, text_encoder)),
        what="the checkpoint's parts do not make a CogVideoX this package understands ({n} problems)",
    )
    named = {**transformer.model_dump(), **vae.model_dump(), **scheduler.model_dump()}
    return Facts(
        **{field.name: named[field.name] for field in fields(Facts) if field.name in named},
        use_rotary=transformer.use_rotary_positional_embeddings,
        use_learned_positions=transformer.use_learned_positional_embeddings,
        vae_spatial=2 ** (len(vae.block_out_channels) - 1),
        vae_temporal=vae.temporal_compression_ratio,
    )


def _misfits(
    folder: Path, transformer: _Transformer, vae: _Vae, scheduler: _Scheduler, text_encoder: _TextEncoder | None
) -> list[ModelError]:
    """Values that are legal one by one and wrong together, or that the training arithmetic does not cover."""
    latent = vae.latent_channels
    rules = [
        (
            transformer.out_channels == latent,
            "transformer",
            f"out_channels is {transformer.out_channels}, but the VAE has {latent} latent channels",
        ),
        (
            transformer.in_channels in (latent, 2 * latent),
            "transformer",
            f"in_channels is {transformer.in_channels}; it has to be {latent} (text to video) or {2 * latent} "
            "(image to video)",
        ),
        (
            transformer.temporal_compression_ratio == vae.temporal_compression_ratio,
            "transformer",
            f"temporal_compression_ratio is {transformer.temporal_compression_ratio}, "
            f"but the VAE's is {vae.temporal_compression_ratio}",
        ),
        (
            transformer.use_rotary_positional_embeddings or not transformer.use_learned_positional_embeddings,
            "transformer",
            "use_learned_positional_embeddings without use_rotary_positional_embeddings has no diffusers model",
        ),
        (
            text_encoder is None or text_encoder.d_model == transformer.text_embed_dim,
            "text_encoder",
            f"d_model is {text_encoder and text_encoder.d_model}, but the transformer's text_embed_dim is "
            f"{transformer.text_embed_dim}",
        ),
        (
            scheduler.prediction_type == "v_prediction",
            "scheduler",
            f"prediction_type is {scheduler.prediction_type!r}; training here is on v_prediction",
        ),
        (
            scheduler.beta_schedule == "scaled_linear" and scheduler.trained_betas is None,
            "scheduler",
            f"beta_schedule is {scheduler.beta_schedule!r}"
            f"{' with trained_betas' if scheduler.trained_betas else ''}; CogVideoX uses scaled_linear",
        ),
    ]
    return [
        ModelError(what, where=str(folder / CONFIG_FILES[component])) for fits, component, what in rules if not fits
    ]


_Parsed = TypeVar("_Parsed", bound=_Json)


def _component(folder: Path, component: str, kind: type[_Parsed]) -> _Parsed:
    path = folder / CONFIG_FILES[component]
    content = _read_json(path)
    expected, found = _CLASSES.get(component), content.get("_class_name")
    if expected and found not in expected:
        raise ModelError(f"_class_name is {found!r}; expected {' or '.join(expected)}", where=str(path))
    try:
        # diffusers writes null for a value that was never set; only where None is a value of its own does it stay.
        return kind.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ModelError(f"unusable values: {problems}", where=str(path)) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent.name}/{path.name} is missing",
            where=str(path),
            fix="give model.pretrained a complete CogVideoX checkpoint in diffusers format",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} holds a JSON {type(content).__name__}, not an object", where=str(path))
    return content


def resolve_pretrained(pretrained: str, revision: str | None = None, *, components: Sequence[str]) -> Path:
    """The local folder that holds these components of a checkpoint, downloaded from the hub if it lives there.

    Args:
        pretrained: as for ``read_facts``.
        revision: as for ``read_facts``.
        components: sub-folders that are needed, such as ``["vae"]``; nothing else is downloaded.

    Raises:
        ModelError: if the checkpoint or one of the components cannot be found.
    """
    patterns = [MODEL_INDEX, *(f"{component}/{pattern}" for component in components for pattern in _WEIGHT_PATTERNS)]
    folder = _locate(pretrained, revision, patterns=patterns)
    for component in components:
        if not (folder / component).is_dir():
            raise ModelError(
                f"the checkpoint has no {component}",
                where=str(folder / component),
                fix="give model.pretrained a complete CogVideoX checkpoint in diffusers format",
            )
    return folder


def _locate(pretrained: str, revision: str | None, *, patterns: list[str]) -> Path:
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} is given for a folder; only the hub has revisions",
                where=str(folder),
                fix="remove model.revision",
            )
        return folder
    looks_like_path = pretrained.startswith((".", "~", os.sep)) or pretrained.count("/") != 1
    if looks_like_path:
        raise ModelError(
            "there is no such model folder",
            where=pretrained,
            fix="give model.pretrained a folder that exists, or a hub id such as THUDM/CogVideoX-5b",
        )
    return _from_hub(pretrained, revision, patterns)


def _from_hub(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo} on the Hugging Face hub" + (f", revision {revision}" if revision else "")
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        what, fix = "the model asks for its licence to be accepted", "accept it on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        what, fix = "there is no such model", "check the id; for a private model run `hf auth login` first"
    except errors.RevisionNotFoundError:
        what, fix = "the model has no such revision", "check model.revision, or leave it out"
    except (errors.HFValidationError, errors.BadRequestError) as error:
        what, fix = f"this is not a hub id: {error}", "write it as organisation/name"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        what = "the model is not on this machine and the hub cannot be reached"
        fix = "download it where there is a network (`hf download`), or give model.pretrained a local folder"
    except (errors.HfHubHTTPError, OSError) as error:
        what, fix = f"the hub did not answer: {error}", "try again, or give model.pretrained a local folder"
    raise ModelError(what, where=where, fix=fix) from None


def known_model(variant: str) -> Path:
    """The folder with a published checkpoint's JSON, without weights: for examples, tests and memory planning.

    Raises:
        ModelError: if ``variant`` is not one of ``KNOWN_MODELS``.
    """
    if variant not in KNOWN_MODELS:
        raise ModelError(f"no shipped model is called {variant!r}", fix=f"choose one of {', '.join(KNOWN_MODELS)}")
    return Path(__file__).parent / "assets" / "models" / variant
