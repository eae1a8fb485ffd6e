"""What each component's JSON may say: every field that its class reads, with type, bounds and the class's default.

A wrong type would otherwise end as a traceback out of a library, or as another model than the one that was trained.
Keys that are not listed are left alone: the diffusers classes pass them over, and T5 is built from these fields only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from finetune.core.errors import FinetuneError, ModelError, is_out_of_memory, raise_all
from finetune.core.terminal import Bar

SchedulerClass = Literal["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]

# Far above any model, and far below what would take all memory before a wrong number is noticed.
_Layers = Annotated[int, Field(gt=0, le=1_000)]

_Width = Annotated[int, Field(gt=0, le=65_536)]

_Rgb = Annotated[int, Field(ge=3, le=3)]

_Probability = Annotated[float, Field(ge=0, lt=1)]

_Epsilon = Annotated[float, Field(gt=0, le=1e-2)]

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
    spatial_interpolation_scale: PositiveFloat = 1.875
    temporal_interpolation_scale: PositiveFloat = 1.0
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
    scaling_factor: PositiveFloat = 1.15258426
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
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
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: Annotated[float, Field(gt=0, le=1_000)] = 3.0
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0
    sample_max_value: PositiveFloat = 1.0
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


PARTS: Mapping[str, type[Part]] = {
    "transformer": Transformer,
    "vae": Vae,
    "scheduler": Scheduler,
    "text_encoder": TextEncoder,
}


# -------- Where a checkpoint's files are: a folder, the hub's cache, or the JSON that ships with this package.

MODEL_INDEX = "model_index.json"
"""The file that makes a folder a diffusers pipeline."""

COMPLETE_CHECKPOINT = "name a complete CogVideoX checkpoint in diffusers format"

KNOWN_MODELS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
"""Published checkpoints whose JSON ships with this package (``known_model``)."""

_HOME, _FORMER_HOME = "zai-org/", "THUDM/"

HUB_IDS: Mapping[str, str] = {
    "2b": f"{_HOME}CogVideoX-2b",
    "5b": f"{_HOME}CogVideoX-5b",
    "5b-i2v": f"{_HOME}CogVideoX-5b-I2V",
    "1.5-5b": f"{_HOME}CogVideoX1.5-5B",
    "1.5-5b-i2v": f"{_HOME}CogVideoX1.5-5B-I2V",
}
"""Where the published checkpoints are; the keys are ``KNOWN_MODELS``."""

_VARIANTS: Mapping[str, str] = {
    name.lower(): variant
    for variant, hub_id in HUB_IDS.items()
    for name in (variant, hub_id, hub_id.removeprefix(_HOME), hub_id.replace(_HOME, _FORMER_HOME))
}
"""Every name of a published checkpoint, in lower case -> its variant: ``5b``, ``cogvideox-5b``, both homes' ids."""

_COMPONENT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def published_variant(pretrained: str) -> str | None:
    """Which of ``KNOWN_MODELS`` a name stands for, however it is written; None for any other model, or a folder."""
    return _VARIANTS.get(pretrained.lower())


def canonical_name(pretrained: str) -> str:
    """The one name of a published model, the id at its home of today; any other name or path as it is.

    It looks at no disk: where a folder may be meant by a relative name, look for that first.
    """
    variant = published_variant(pretrained)
    return pretrained if variant is None else HUB_IDS[variant]


def resolve_pretrained(pretrained: str, revision: str | None = None, *, components: Sequence[str]) -> Path:
    """The local folder that holds these components of a checkpoint, downloaded from the hub if it lives there.

    Args:
        pretrained: as for ``read_spec``.
        revision: as for ``read_spec``.
        components: sub-folders that are needed, such as ``["vae"]``; nothing else is downloaded.

    Raises:
        ModelError: if the checkpoint or one of the components cannot be found.
    """
    patterns = [MODEL_INDEX, *(f"{component}/{pattern}" for component in components for pattern in _COMPONENT_FILES)]
    folder = locate(pretrained, revision, patterns=patterns)
    for component in components:
        if not (folder / component).is_dir():
            raise ModelError(
                f"the checkpoint has no {component}", where=str(folder / component), fix=COMPLETE_CHECKPOINT
            )
    return folder


def pin_revision(pretrained: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a checkpoint on the hub stands for now; None for a folder.

    A branch can be moved between two downloads of one run. Asked once and used for all of them, the commit makes sure
    that a run never mixes two versions of a model. Without a network it is the commit that the local cache has.

    Args:
        pretrained: as for ``read_spec``.
        revision: branch, tag or commit; None for the main branch. A whole commit is returned as it is: nobody is asked.

    Raises:
        ModelError: if there is no such folder or model, or no such revision.
    """
    if revision is not None and is_commit(revision) and not _as_folder(pretrained).is_dir():
        return revision
    folder = locate(pretrained, revision, patterns=[MODEL_INDEX])
    if _as_folder(pretrained).is_dir():
        return None
    # The hub's client keeps a repository's files in `snapshots/<commit>`.
    if not is_commit(folder.name):
        raise ModelError(
            f"it cannot be told which commit was downloaded: {folder.name!r} is none",
            where=f"{pretrained} on the Hugging Face hub",
            fix="name a commit as the revision, or a local folder as the model",
        )
    return folder.name


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model on the hub, and is no folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def is_commit(revision: str | None) -> bool:
    """Whether this is the whole name of a commit, which never stands for anything else: 40 hexadecimal digits."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def locate(pretrained: str, revision: str | None, *, patterns: list[str]) -> Path:
    """The local folder of a checkpoint: itself, or the hub's snapshot after the files of ``patterns`` are fetched.

    Raises:
        ModelError: if there is no such folder and no such model on the hub.
    """
    folder = _as_folder(pretrained)
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} is given for a folder; only the hub has revisions",
                where=str(folder),
                fix="leave the revision out",
            )
        return folder
    pretrained = canonical_name(pretrained)
    looks_like_path = pretrained.startswith((".", "~", os.sep)) or pretrained.count("/") != 1
    if looks_like_path:
        raise ModelError(
            "there is no such model folder",
            where=pretrained,
            fix=f"name a folder that exists, a hub id such as {HUB_IDS['5b']}, or one of {', '.join(KNOWN_MODELS)}",
        )
    return _from_hub(id_in_cache(pretrained), revision, patterns)


def hub_sha256(path: Path) -> str | None:
    """The SHA-256 that the hub gave for a large file, as its client left it here; None for a file from elsewhere."""
    blob = path.resolve()
    if blob.parent.name == "blobs":  # the cache: a snapshot's files are links to blobs of that name
        return blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else None
    for root in path.absolute().parents:  # `hf download --local-dir`: commit, hash and time in a file of three lines
        note = root / ".cache" / "huggingface" / "download" / f"{path.absolute().relative_to(root)}.metadata"
        if note.is_file():
            with note.open("rb") as source:
                lines = source.read(1000).decode(errors="replace").splitlines()
            return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{64}", lines[1]) else None
    return None


def _as_folder(pretrained: str) -> Path:
    try:
        folder = Path(pretrained).expanduser()
        folder.is_dir()  # fails for a name that no file system takes
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"this names no model: {error}"[:300], where=pretrained[:200]) from None
    return folder


def id_in_cache(repo: str) -> str:
    """The id under which the hub's cache has a model: what came from its former home is not downloaded again."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if repo not in HUB_IDS.values():
        return repo
    for name in (repo, repo.replace(_HOME, _FORMER_HOME)):
        if Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots").is_dir():
            return name
    return repo


def _from_hub(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo} on the Hugging Face hub" + (f", revision {revision}" if revision else "")
    # The hub's client changes its HTTP library from one major version to the next; the bases of its own error are what
    # every version's connection errors are made of.
    bases = errors.HfHubHTTPError.__bases__
    connection: tuple[type[Exception], ...] = (OSError, *(base for base in bases if issubclass(base, Exception)))
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=Bar))
    except errors.GatedRepoError:
        what, fix = "the model asks for its licence to be accepted", "accept it on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        what, fix = "there is no such model", "check the id; for a private model run `hf auth login` first"
    except errors.RevisionNotFoundError:
        what, fix = "the model has no such revision", "check the revision, or leave it out"
    except (errors.HFValidationError, errors.BadRequestError) as error:
        what, fix = f"this is not a hub id: {error}", "write it as organisation/name"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        what = "there is no such folder; as a hub id it is not in the local cache, and the hub cannot be reached"
        fix = "download it where there is a network (`hf download`), or name a local folder"
    except connection as error:
        what, fix = f"the hub did not answer: {error}", "try again, or name a local folder"
    raise ModelError(what, where=where, fix=fix) from None


def known_model(variant: str) -> Path:
    """The folder with a published checkpoint's JSON, without weights: for examples, tests and memory planning.

    Raises:
        ModelError: if ``variant`` is not one of ``KNOWN_MODELS``.
    """
    if variant not in KNOWN_MODELS:
        raise ModelError(f"no shipped model is called {variant!r}", fix=f"choose one of {', '.join(KNOWN_MODELS)}")
    return Path(__file__).parents[1] / "assets" / "models" / variant


def json_folder(pretrained: str, revision: str | None = None) -> Path:
    """A folder with a checkpoint's JSON, to check and plan with: a published model's is that of this package.

    Nothing is asked of a network for a folder or a published model, under any of its names.

    Args:
        pretrained: as for ``read_spec``.
        revision: as for ``read_spec``; of no consequence for a published model, whose shapes are the same in all.

    Raises:
        ModelError: if it cannot be found.
    """
    if not _as_folder(pretrained).is_dir() and (variant := published_variant(pretrained)):
        return known_model(variant)
    return locate(pretrained, revision, patterns=[MODEL_INDEX, "*/config.json", "*/scheduler_config.json"])


# -------- What a checkpoint's files may not do: read other files, choose code to run, or take all memory.
#
# Checkpoints come from strangers. Their weights are read from safetensors alone, which hold numbers and nothing else;
# this looks at the JSON beside them before a library acts on it.

CONFIG_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
}
"""Where a diffusers pipeline folder keeps the JSON of each component."""

_MOST_BYTES = 1 << 26
"""Of one JSON file; the largest, a tokenizer's vocabulary, has a few million."""

_LARGEST_NUMBER = 1_000_000
"""In a component's JSON: a vocabulary has 32 128 entries, and nothing else comes near."""

_MOST_REPEATS = 1_000
"""Of what is built once per count: layers and blocks."""

_MOST_ENTRIES = 10_000

_MOST_FAULTS = 100

_MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""

_DEEPEST = 20

_ACTING_KEYS = {
    "quantization_config": "its weights are stored quantized, and this package trains on plain ones",
    "attn_implementation": "it names an attention implementation, which a library would fetch from the hub as code",
    "_attn_implementation": "it names an attention implementation, which a library would fetch from the hub as code",
}
"""Keys that make a library do more than build the model, and why they are refused."""

_WITHOUT_WEIGHTS = ("scheduler", "tokenizer")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


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
    """Read a component's JSON and make sure that a library may act on it.

    Raises:
        ModelError: naming every key that is refused.
    """
    path = folder / CONFIG_FILES[component]
    content = read_json(path)
    faults = list(json_faults(content, ()))
    faults += [f"{key}: {why}" for key, why in _ACTING_KEYS.items() if content.get(key) is not None]
    part: Part | None = None
    if not faults:
        try:
            part = PARTS[component].model_validate(content)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                key, said = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
                given = f" (it is {problem['input']!r:.60})" if key and problem["type"] != "missing" else ""
                faults.append(f"{key or component}: {said}{given}")
    problems = [ModelError(fault[:300], where=str(path), fix=COMPLETE_CHECKPOINT) for fault in faults[:_MOST_FAULTS]]
    raise_all(ModelError, problems, what=f"{{n}} things in {path.name} are refused")
    assert part is not None
    return part


def require_loadable(folder: Path, component: str) -> None:
    """Look at a component before a library loads it: its JSON, and which files would be opened.

    Raises:
        ModelError: as ``read_part`` and ``require_own_files``.
    """
    read_part(folder, component)
    require_own_files(folder / component)


def require_own_files(place: Path) -> None:
    """Look at the files of a component that a library would open; nothing of the weights but their size is read.

    Raises:
        ModelError: if one is a pipe, a device or a folder, leads nowhere or claims more than it has, the weights are
            pickles only, or an index names files outside the folder.
    """
    stored = sorted(place.iterdir()) if place.is_dir() else []
    for path in stored:
        opened = path.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja")
        if opened and not path.is_file():
            what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "is a broken link"
            raise ModelError(f"{path.name} {what}, not a file", where=str(path), fix=COMPLETE_CHECKPOINT)
        if path.suffix == ".safetensors":
            _require_sane_header(path)
        elif opened and path.stat().st_size > _MOST_BYTES:
            raise ModelError(
                f"{path.name} has more than {_MOST_BYTES:,} bytes", where=str(path), fix=COMPLETE_CHECKPOINT
            )
        if path.name.endswith(".safetensors.index.json"):
            require_plain_index(path)
    pickles = [path.name for path in stored if path.suffix in _PICKLES]
    if pickles and place.name not in _WITHOUT_WEIGHTS and not any(path.suffix == ".safetensors" for path in stored):
        raise ModelError(
            f"the {place.name} has its weights as {pickles[0]}, a format that can run code when it is read",
            where=str(place),
            fix="fetch the checkpoint's safetensors files, or convert it where you trust it: python -c "
            "\"import torch, safetensors.torch as s; s.save_file(torch.load('OLD', weights_only=True), 'NEW')\"",
        )


def _require_sane_header(path: Path) -> None:
    """A safetensors file begins with the length of its table of contents, which is read whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from None
    if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
        raise ModelError(
            f"{path.name} claims a table of contents of {length:,} bytes and has {size:,} bytes in all",
            where=str(path),
            fix=COMPLETE_CHECKPOINT,
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
        plain = name == PurePosixPath(name).name == PureWindowsPath(name).name and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ModelError(f"weight_map names {name!r:.100}, not a safetensors file beside it", where=str(path))
    return shards


def json_faults(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Values that no model has and that a library would spend hours or all memory on."""
    name = ".".join(path)[-100:]
    if len(path) > _DEEPEST:
        yield f"{name}: nested too deeply"
    elif isinstance(value, Mapping | list):
        if len(value) > _MOST_ENTRIES:
            yield f"{name}: {len(value):,} entries"
            return
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from json_faults(item, (*path, str(key)))
    elif isinstance(value, str):
        if len(value) > _MOST_ENTRIES:
            yield f"{name}: a text of {len(value):,} characters"
    elif isinstance(value, int | float):
        # Learning of a number's size by printing it would take as long as the number is long.
        counts = any(word in name for word in ("layers", "blocks", "num_heads"))
        most = _MOST_REPEATS if counts else _LARGEST_NUMBER
        if not abs(value) <= most:
            shown = f"{value}" if abs(value) < 10**18 else "a number"
            yield f"{name}: {shown} is more than any model has (at most {most:,})"


@contextmanager
def loading(component: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise over a damaged or incomplete folder into one kind of error."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # tokenizers raises plain ones, safetensors its own
        if is_out_of_memory(error):  # says nothing of the folder
            raise
        raise ModelError(
            f"the {component} cannot be loaded: {error}",
            where=str(folder / component),
            fix="fetch the whole folder again: its weights have to be safetensors files, and its JSON theirs",
        ) from error
