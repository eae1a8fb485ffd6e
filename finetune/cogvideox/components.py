"""A checkpoint's components, looked at before a library acts on them.

Checkpoints come from strangers: their files may not read others, choose code to run, or take all memory. Weights are
read from safetensors alone, which hold numbers and nothing else. Of each component's JSON, every field that its class
reads is listed here with type, bounds and the class's default: a wrong one would otherwise end as a traceback out of a
library, or as another model than the one that was trained. Keys that are not listed are left alone: the diffusers
classes pass them over, and T5 is built from these fields only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.cogvideox.model_files import COMPLETE_CHECKPOINT
from finetune.core.errors import FinetuneError, ModelError, is_out_of_memory, raise_all

SchedulerClass = Literal["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]

# Far above any model, and far below what would take all memory before a wrong number is noticed.
_Layers = Annotated[int, Field(gt=0, le=1_000)]

_Width = Annotated[int, Field(gt=0, le=65_536)]

_Rgb = Annotated[int, Field(ge=3, le=3)]

_Probability = Annotated[float, Field(ge=0, lt=1)]

_Epsilon = Annotated[float, Field(gt=0, le=1e-2)]

_Scale = Annotated[float, Field(gt=0, le=1_000_000)]

_Number = Annotated[float, Field(ge=-1_000_000, le=1_000_000)]

_Numbers = Annotated[list[_Number], Field(max_length=100_000)]

_Activation = Literal["silu", "swish", "mish", "gelu", "relu"]


class Part(BaseModel):
    """A component's JSON. Strict: JSON has numbers, truth values and texts, and none stands for another."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Transformer(Part):
    """Defaults of ``diffusers.CogVideoXTransformer3DModel``."""

    class_name: Literal["CogVideoXTransformer3DModel"] = Field(alias="_class_name")
    num_layers: _Layers = 30
    num_attention_heads: _Width = 30
    attention_head_dim: _Width = 64
    in_channels: _Width = 16
    out_channels: _Width = 16
    patch_size: _Width = 2
    patch_size_t: _Width | None = None
    patch_bias: bool = True
    sample_height: _Width = 60
    sample_width: _Width = 90
    sample_frames: _Width = 49
    spatial_interpolation_scale: _Scale = 1.875
    temporal_interpolation_scale: _Scale = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    time_embed_dim: _Width = 512
    ofs_embed_dim: _Width | None = None
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    text_embed_dim: _Width = 4096
    max_text_seq_length: _Width = 226
    temporal_compression_ratio: _Width = 4
    dropout: _Probability = 0.0
    attention_bias: bool = True
    activation_fn: Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = (
        "gelu-approximate"
    )
    timestep_activation_fn: _Activation = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: _Epsilon = 1e-5

    @model_validator(mode="after")
    def _fits(self) -> Transformer:
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError("attention_head_dim is split in 4/16, 6/16 and 6/16: it has to be a multiple of 16")
        return self


class Vae(Part):
    """Defaults of ``diffusers.AutoencoderKLCogVideoX``."""

    class_name: Literal["AutoencoderKLCogVideoX"] = Field(alias="_class_name")
    in_channels: _Rgb = 3
    out_channels: _Rgb = 3
    block_out_channels: Annotated[list[_Width], Field(min_length=1, max_length=8)] = [128, 256, 256, 512]
    down_block_types: list[Literal["CogVideoXDownBlock3D"]] = ["CogVideoXDownBlock3D"] * 4
    up_block_types: list[Literal["CogVideoXUpBlock3D"]] = ["CogVideoXUpBlock3D"] * 4
    layers_per_block: _Layers = 3
    latent_channels: _Width = 16
    temporal_compression_ratio: _Width = 4
    sample_height: _Width = 480
    sample_width: _Width = 720
    act_fn: _Activation = "silu"
    norm_eps: _Epsilon = 1e-6
    norm_num_groups: _Width = 32
    scaling_factor: _Scale = 1.15258426
    shift_factor: _Number | None = None
    latents_mean: _Numbers | None = None
    latents_std: _Numbers | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Vae:
        blocks = len(self.block_out_channels)
        if not blocks == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide block_out_channels")
        if self.temporal_compression_ratio not in (ratios := [2**level for level in range(blocks)]):
            raise ValueError(f"temporal_compression_ratio is {self.temporal_compression_ratio}, none of {ratios}")
        return self


class Scheduler(Part):
    """Defaults of ``diffusers.CogVideoXDDIMScheduler``, which ``CogVideoXDPMScheduler`` shares."""

    class_name: SchedulerClass = Field(alias="_class_name")
    num_train_timesteps: Annotated[int, Field(gt=0, le=100_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.0120
    beta_schedule: str = "scaled_linear"
    trained_betas: _Numbers | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: Annotated[float, Field(gt=0, le=1_000)] = 3.0
    clip_sample: bool = True
    clip_sample_range: _Scale = 1.0
    sample_max_value: _Scale = 1.0
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Field(ge=0, le=1)] = 0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"

    @model_validator(mode="after")
    def _fits(self) -> Scheduler:
        if self.beta_start >= self.beta_end:
            raise ValueError("beta_start has to be less than beta_end")
        return self


class TextEncoder(Part):
    """Defaults of ``transformers.T5Config``, but for those that say which T5 it is."""

    d_model: _Width
    d_kv: _Width = 64
    d_ff: _Width = 2048
    num_layers: _Layers = 6
    num_heads: Annotated[int, Field(gt=0, le=1_000)] = 8
    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 32128
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=65_536)] = 32
    relative_attention_max_distance: _Width = 128
    dropout_rate: _Probability = 0.1
    layer_norm_epsilon: _Epsilon = 1e-6
    feed_forward_proj: Literal["relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"] = "relu"
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _fits(self) -> TextEncoder:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError("relative_attention_max_distance is too short for relative_attention_num_buckets")
        return self


def _beside(name: str) -> str:
    if name != PurePosixPath(name).name:
        raise ValueError("it is not a file beside it")
    return name


class AddedToken(Part):
    """A token that text is searched for before it is cut into pieces. Defaults of ``tokenizers.AddedToken``."""

    content: Annotated[str, Field(min_length=1, max_length=1_000)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    """None: unless it is special."""
    special: bool = False


_FileName = Annotated[str, AfterValidator(_beside)]

_Token = Annotated[str, Field(min_length=1, max_length=1_000)] | AddedToken

_TokenNumber = Annotated[str, Field(pattern="^[0-9]{1,9}$")]

_MOST_TOKENS = 10_000


class TokenizerSettings(Part):
    """What of ``tokenizer_config.json`` decides tokens, with the defaults of ``transformers.T5Tokenizer``."""

    vocab_file: _FileName | None = None
    tokenizer_file: _FileName | None = None
    spm_file: _FileName | None = None
    eos_token: _Token = "</s>"
    unk_token: _Token = "<unk>"
    pad_token: _Token = "<pad>"
    bos_token: _Token | None = None
    sep_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    padding_side: Literal["right"] = "right"
    truncation_side: Literal["right"] = "right"
    split_special_tokens: Literal[False] = False
    extra_ids: Annotated[int, Field(ge=0, le=1_000)] = 100
    added_tokens_decoder: Annotated[dict[_TokenNumber, AddedToken], Field(max_length=_MOST_TOKENS)] | None = None
    additional_special_tokens: Annotated[list[_Token], Field(max_length=_MOST_TOKENS)] | None = None
    extra_special_tokens: Annotated[list[_Token] | dict[str, _Token], Field(max_length=_MOST_TOKENS)] | None = None


PARTS: Mapping[str, type[Part]] = {
    "transformer": Transformer,
    "vae": Vae,
    "scheduler": Scheduler,
    "text_encoder": TextEncoder,
}


CONFIG_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
}
"""Where a diffusers pipeline folder keeps the JSON of each component."""

_MOST_BYTES = 1 << 26
"""Of one JSON file; the largest, a tokenizer's vocabulary, has a few million."""

_MOST_FAULTS = 100

_ACTING_KEYS = {
    "quantization_config": "its weights are stored quantized, and this package trains on plain ones",
    "attn_implementation": "it names an attention implementation, which a library would fetch from the hub as code",
    "_attn_implementation": "it names an attention implementation, which a library would fetch from the hub as code",
}
"""Keys that make a library do more than build the model, and why they are refused."""

_WITHOUT_WEIGHTS = ("scheduler", "tokenizer")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")

_OPENED = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Suffixes of the files that the libraries open."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of reasonable size. Raises ModelError."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path.name} is no file", where=str(path))
        with path.open("rb") as source:
            content = source.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ModelError(f"{path.name} has more than {_MOST_BYTES:,} bytes", where=str(path))
        value = json.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=str(path), fix=COMPLETE_CHECKPOINT) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}"[:300], where=str(path)) from None
    except RecursionError:
        raise ModelError(f"{path.name} cannot be read: it is nested too deeply", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds a JSON {type(value).__name__}, not an object", where=str(path))
    return value


def read_part(folder: Path, component: str) -> Part:
    """Read a component's JSON and make sure that a library may act on it. Raises as ``read_json_as``."""
    return read_json_as(PARTS[component], folder / CONFIG_FILES[component])


_P = TypeVar("_P", bound=Part)


def read_json_as(kind: type[_P], path: Path) -> _P:
    """Read a JSON file of a checkpoint.

    Raises:
        ModelError: naming every key that is refused.
    """
    content = read_json(path)
    faults = [f"{key}: {why}" for key, why in _ACTING_KEYS.items() if content.get(key) is not None]
    try:
        part = kind.model_validate(content)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            key, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            given = f" (it is {problem['input']!r:.60})" if key and problem["type"] != "missing" else ""
            faults.append(f"{key or path.parent.name}: {message}{given}")
    problems = [ModelError(fault[:300], where=str(path), fix=COMPLETE_CHECKPOINT) for fault in faults[:_MOST_FAULTS]]
    raise_all(ModelError, problems, what=f"{{n}} things in {path.name} are refused")
    return part


def require_loadable(folder: Path, component: str) -> None:
    """Look at a component before a library loads it: its JSON, and which files would be opened.

    Raises:
        ModelError: as ``read_part`` and ``require_own_files``.
    """
    read_part(folder, component)
    require_own_files(folder / component)


def require_own_files(folder: Path) -> None:
    """Look at the files of a component that a library would open; of the weights, the table of contents is read.

    Raises:
        ModelError: if one is a pipe, a device or a folder, leads nowhere or claims more than it has, the weights are
            pickles only, or an index names files outside the folder.
    """
    from safetensors import safe_open

    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        if path.suffix not in _OPENED:
            continue
        what = ""
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "a broken link"
            what = f"is {kind}, not a file"
        elif path.suffix != ".safetensors" and path.stat().st_size > _MOST_BYTES:
            what = f"has more than {_MOST_BYTES:,} bytes"
        if what:
            raise ModelError(f"{path.name} {what}", where=str(path), fix=COMPLETE_CHECKPOINT)
        if path.suffix == ".safetensors":
            with loading(folder.name, folder.parent, path), safe_open(path, framework="numpy"):
                pass
        elif path.name.endswith(".safetensors.index.json"):
            require_plain_index(path)
    pickles = [path.name for path in paths if path.suffix in _PICKLES]
    if pickles and folder.name not in _WITHOUT_WEIGHTS and not any(path.suffix == ".safetensors" for path in paths):
        raise ModelError(
            f"the {folder.name} has its weights as {pickles[0]}, a format that can run code when it is read",
            where=str(folder),
            fix="fetch the checkpoint's safetensors files, or convert it where you trust it: python -c "
            "\"import torch, safetensors.torch as s; s.save_file(torch.load('OLD', weights_only=True), 'NEW')\"",
        )


def require_plain_index(path: Path) -> list[str]:
    """The weight files that an index names, each of them a plain name in the index's own folder.

    Raises:
        ModelError: if one leads elsewhere, is no safetensors file, or the index is not what it should be.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError("weight_map is no mapping of weights to files", where=str(path), fix=COMPLETE_CHECKPOINT)
    shards = sorted(set(names.values()))
    for name in shards:
        is_plain = name == PurePosixPath(name).name == PureWindowsPath(name).name and "\0" not in name
        if not is_plain or not name.endswith(".safetensors"):
            raise ModelError(f"weight_map names {name!r:.100}, not a safetensors file beside it", where=str(path))
    return shards


@contextmanager
def loading(component: str, folder: Path, path: Path | None = None) -> Iterator[None]:
    """Turn what the libraries raise over a damaged or incomplete folder into a ModelError that names ``path``."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # tokenizers raises plain ones, safetensors its own
        if is_out_of_memory(error):  # says nothing of the folder
            raise
        raise ModelError(
            f"the {component} cannot be loaded: {error}",
            where=str(path or folder / component),
            fix="fetch the whole folder again: its weights have to be safetensors files, and its JSON theirs",
        ) from error
