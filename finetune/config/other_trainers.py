"""Configurations of other CogVideoX trainers, read as ours: each of their settings is mapped, or named with the reason.

Known are CogVideo's scripts, CogKit's YAML, cogvideox-factory's scripts and finetrainers' (flags, or its dataset JSON).
Scripts are read by ``shell_scripts``, which runs nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from finetune.cogvideox.model_files import canonical_name
from finetune.config.document import Document, Dumper, YamlReader
from finetune.config.shell_scripts import Setting, ShellScript
from finetune.core.errors import ConfigError


@dataclass(frozen=True)
class Translation:
    """What became of their configuration."""

    trainer: str
    source: Path
    values: dict[str, Any]
    """A configuration of ours, without defaults."""
    mapped: tuple[tuple[Setting, str], ...]
    """Their setting, and where it went."""
    unmapped: tuple[tuple[Setting, str], ...]
    """Their setting, and why there is none of ours."""
    notes: tuple[str, ...]
    """What to look at before a run."""

    def text(self) -> str:
        """The commented YAML file."""
        rows = [(setting, f"-> {place}") for setting, place in self.mapped]
        rows += [(setting, reason) for setting, reason in self.unmapped]
        rows.sort(key=lambda row: (row[0].line is None, row[0].line))
        width = min(max(len(str(setting)) for setting, _ in rows), 48)
        lines = [f"From {self.source.name} ({self.trainer}). What became of its settings, by line:", ""]
        for setting, outcome in rows:
            lines.append(f"{'default' if setting.line is None else setting.line:>7}  {setting!s:<{width}}  {outcome}")
        lines += ["", *(f"NOTE: {note}." for note in self.notes), *[""][: len(self.notes)]]
        head = "".join(f"# {line}".rstrip() + "\n" for line in [*lines, "Every field: docs/config.md."])
        names = [name for name in _SECTIONS if name in self.values]
        dumped = [
            yaml.dump({name: self.values[name]}, Dumper=Dumper, allow_unicode=True, width=1 << 20, sort_keys=False)
            for name in names
        ]
        return "\n".join([head, *dumped])


_SECTIONS = (
    *("model", "data", "method", "optimizer", "lr_schedule", "train", "parallel", "memory", "validation"),
    *("checkpoint", "tracking", "output_dir"),
)
"""In the order of a file that ``init`` writes."""


# ------------------------------------------------------------------------------------------------------- their defaults

_COG = {
    "seed": "42",
    "learning_rate": "2e-5",
    "optimizer": "adamw",
    "beta1": "0.9",
    "beta2": "0.95",
    "epsilon": "1e-8",
    "weight_decay": "1e-4",
    "max_grad_norm": "1.0",
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": "100",
    "batch_size": "1",
    "gradient_accumulation_steps": "1",
    "rank": "128",
    "lora_alpha": "64",
    "checkpointing_steps": "200",
    "checkpointing_limit": "10",
}

_DEFAULTS: dict[str, dict[str, str]] = {
    "CogVideo": {**_COG, "train_epochs": "10", "mixed_precision": "no"},
    "CogKit": {**_COG, "train_epochs": "1"},
    "cogvideox-factory": {
        "frame_buckets": "49",
        "rank": "64",
        "lora_alpha": "64",
        "train_batch_size": "4",
        "num_train_epochs": "1",
        "checkpointing_steps": "500",
        "learning_rate": "1e-4",
        "lr_scheduler": "constant",
        "lr_warmup_steps": "500",
        "optimizer": "adam",
        "beta1": "0.9",
        "beta2": "0.95",
        "epsilon": "1e-8",
        "weight_decay": "1e-4",
        "max_grad_norm": "1.0",
        "guidance_scale": "6",
    },
    "finetrainers": {
        "seed": "42",
        "batch_size": "1",
        "train_steps": "1000",
        "lr": "1e-4",
        "lr_scheduler": "cosine_with_restarts",
        "lr_warmup_steps": "500",
        "optimizer": "adamw",
        "beta1": "0.9",
        "beta2": "0.95",
        "epsilon": "1e-8",
        "weight_decay": "1e-4",
        "max_grad_norm": "1.0",
        "checkpointing_steps": "500",
        "rank": "64",
        "lora_alpha": "64",
        "caption_dropout_p": "0.0",
    },
}
"""Read in each trainer's argument parser; what decides nothing that is trained is left out."""


# ----------------------------------------------------------------------------------------------------------- one to one


def _value(word: str) -> Any:
    return YamlReader("a value", one_line=True).read(word)


def _scalar(setting: Setting) -> Any:
    return _value(setting.words[0]) if setting.words else True


def _dtype(setting: Setting) -> str:
    word = setting.words[0].removeprefix("torch.") if setting.words else ""
    names = {"no": "fp32", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return names.get(word, word)


def _tracker(setting: Setting) -> str:
    word = setting.words[0] if setting.words else "none"
    return {"all": "tensorboard", "null": "none", "None": "none"}.get(word, word)


def _targets(setting: Setting) -> Any:
    if set(setting.words) == {"to_q", "to_k", "to_v", "to_out.0"}:
        return "attention"
    plain = [re.fullmatch(r"[\w.]+", word) for word in setting.words]
    patterns = [rf".*\.{re.escape(w)}" if match else w for w, match in zip(setting.words, plain, strict=True)]
    return patterns[0] if len(patterns) == 1 else patterns


def _method(setting: Setting) -> str:
    return "lora" if setting.words[:1] == ("lora",) else "full"


def _on(setting: Setting) -> bool:
    return not setting.words or setting.words[0].lower() in ("true", "1", "yes")


_ONE_TO_ONE: dict[str, tuple[str, Callable[[Setting], Any]]] = {
    "revision": ("model.revision", lambda s: s.words[0]),
    "mixed_precision": ("model.dtype", _dtype),
    "transformer_dtype": ("model.dtype", _dtype),
    "id_token": ("data.trigger", lambda s: s.words[0]),
    "fps": ("data.fps", _scalar),
    "caption_dropout_p": ("data.caption_dropout", _scalar),
    "caption_dropout_technique": (
        "data.unconditional_text",
        lambda s: {"zero": "zeros"}.get(s.words[0], s.words[0]),
    ),
    "noised_image_dropout": ("data.image_dropout", _scalar),
    "training_type": ("method.kind", _method),
    "rank": ("method.rank", _scalar),
    "lora_alpha": ("method.alpha", _scalar),
    "target_modules": ("method.targets", _targets),
    "learning_rate": ("optimizer.lr", _scalar),
    "lr": ("optimizer.lr", _scalar),
    "epsilon": ("optimizer.eps", _scalar),
    "weight_decay": ("optimizer.weight_decay", _scalar),
    "batch_size": ("train.batch_size", _scalar),
    "train_batch_size": ("train.batch_size", _scalar),
    "gradient_accumulation_steps": ("train.accumulation", _scalar),
    "max_grad_norm": ("train.max_grad_norm", _scalar),
    "seed": ("train.seed", _scalar),
    "cp_degree": ("parallel.context", _scalar),
    "gradient_checkpointing": ("memory.checkpointing", lambda s: "full" if _on(s) else "none"),
    "guidance_scale": ("validation.guidance_scale", _scalar),
    "use_dynamic_cfg": ("validation.dynamic_cfg", _on),
    "checkpointing_steps": ("checkpoint.every", _scalar),
    "checkpointing_limit": ("checkpoint.keep_last", _scalar),
    "checkpoints_total_limit": ("checkpoint.keep_last", _scalar),
    "report_to": ("tracking.kind", _tracker),
}

_ALIASES = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "epsilon",
    "adam_weight_decay": "weight_decay",
    "use_8bit_adam": "use_8bit",
}
"""What diffusers' own example calls them, from which cogvideox-factory's scripts come."""

_BY_ITSELF = "done by itself"
_UNMAPPED: dict[str, str] = {
    "model_name": "the model's own JSON says what it is",
    "model_type": "the model's own JSON says what it is",
    "variant": "weights are found under any of their names",
    "cache_dir": "HF_HOME says where models are downloaded to",
    "load_tensors": "always: latents and embeddings come from the cache, which names what made them",
    "precompute_conditions": "always: latents and embeddings come from the cache",
    "precomputation_items": "the cache holds all of it",
    "precomputation_once": "the cache holds all of it",
    "precomputation_dir": "cache.dir, which several runs share",
    "dataset_shuffle_buffer_size": "the order of clips is a permutation of all of them",
    "num_workers": _BY_ITSELF,
    "dataloader_num_workers": _BY_ITSELF,
    "pin_memory": _BY_ITSELF,
    "enable_slicing": _BY_ITSELF,
    "enable_tiling": "cache.vae_tiling, by itself where memory asks for it",
    "enable_model_cpu_offload": _BY_ITSELF,
    "allow_tf32": "nothing of a run is computed in a precision that was not asked for",
    "nccl_timeout": "the launcher's",
    "init_timeout": "the launcher's",
    "parallel_backend": "the launcher's: see accelerate_configs/",
    "strategy": "the launcher's: DDP, FSDP2 and ZeRO are files in accelerate_configs/",
    "offload_params_grads": "memory.optimizer_states, memory.gradient_release; `finetune plan --budget` chooses",
    "enable_packing": "buckets keep the aspect ratio",
    "tracker_name": "the run's folder names it",
    "name4train": "the run's folder names it",
    "logging_dir": "the run's folder holds it",
    "log_level": "",
    "gen_fps": "sampled videos have the rate of the training clips",
    "push_to_hub": "`finetune push` does it, after the export",
    "hub_token": "the login of huggingface_hub is used; no token belongs into a file",
    "hub_model_id": "`finetune push` does it, after the export",
    "reshape_mode": "clips are resized to cover their bucket, and cropped at the centre",
    "skip_frames_start": "cut the videos beforehand (`finetune prepare`), or give spans (data.sources kind: spans)",
    "skip_frames_end": "cut the videos beforehand (`finetune prepare`), or give spans (data.sources kind: spans)",
    "scale_lr": "write the learning rate that you mean",
    "beta3": "no optimizer of ours has it",
    "layerwise_upcasting_modules": "memory.base: fp8 holds the frozen base in 8 bits, with a scale per row",
    "remove_common_llm_caption_prefixes": "clean the captions beforehand",
    "logging_steps": "",
    "validation_epochs": "validation.sample_every counts steps; the number of clips decides what an epoch is",
}

_SWEPT_BY_PREFIX = {
    "flow_": "of flow-matching models; CogVideoX predicts v",
    "prodigy_": "optimizer: {kind: custom, name: pytorch_optimizer.Prodigy}, with its arguments as kwargs",
    "layerwise_upcasting_": "memory.base",
    "hub_": "`finetune push`, after the export",
    "compile_": "memory.compile: block",
}


# --------------------------------------------------------------------------------------------------- several make one


@dataclass
class _Mapper:
    settings: dict[str, Setting]
    folder: Path
    """Where their relative paths start."""
    start: Path
    """Where ours do."""
    values: dict[str, Any] = field(default_factory=dict)
    mapped: list[tuple[Setting, str]] = field(default_factory=list)
    unmapped: list[tuple[Setting, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str, place: str = "") -> list[Setting | None]:
        """Settings by name, None for those that are absent; with ``place``, they went there."""
        taken = [self.settings.pop(name, None) for name in names]
        self.mapped += [(setting, place) for setting in taken if setting is not None and place]
        return taken

    def path(self, word: str) -> str:
        """A path of theirs as it has to stand in a file of ours."""
        return word if Path(word).is_absolute() or word[:1] in "~$" else os.path.relpath(self.folder / word, self.start)

    def model(self) -> None:
        for setting in self.take("model_path", "pretrained_model_name_or_path", place="model.pretrained"):
            if setting is not None and setting.words:
                word = setting.words[0]
                self.put("model.pretrained", self.path(word) if (self.folder / word).is_dir() else canonical_name(word))
        for setting in self.take("output_dir", place="output_dir"):
            if setting is not None and setting.words:
                self.put("output_dir", self.path(setting.words[0]))

    def refuse(self, setting: Setting | None, reason: str) -> None:
        if setting is not None:
            self.unmapped.append((setting, reason))

    def put(self, place: str, value: Any) -> None:
        *sections, name = place.split(".")
        holder = self.values
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value

    def sources(self) -> None:
        (flip,) = self.take("random_flip", place="data.sources")
        self._sources()
        for source in self.values.get("data", {}).get("sources", []) if flip is not None and _scalar(flip) else ():
            source["random_flip"] = True

    def _sources(self) -> None:
        root, old_root = self.take("data_root", "instance_data_root", place="data.sources")
        table, video, caption, image = self.take(
            "dataset_file", "video_column", "caption_column", "image_column", place="data.sources"
        )
        (config,) = self.take("dataset_config")
        (hub,) = self.take("dataset_name", place="data.sources")
        (config_name,) = self.take("dataset_config_name")
        self.refuse(config_name, "a dataset is read as its files lie")
        root = root or old_root
        if hub is not None:
            self.put("data.sources", [{"kind": "hub", "path": hub.words[0]}])
            unread = [each for each in (config, root, table, video, caption, image) if each is not None]
            if unread:
                self.notes.append(f"of the data only --dataset_name is taken: see {', '.join(map(str, unread))}")
            return
        if config is not None:
            self._datasets(config)
            return
        folder = self.path(root.words[0]) if root else ""
        if table is not None:
            source = {"path": self.path(table.words[0]), **({"root": folder} if folder else {})}
            columns = {"video_column": video, "caption_column": caption, "image_column": image}
            source |= {name: setting.words[0] for name, setting in columns.items() if setting is not None}
            self.put("data.sources", [{"kind": "metadata", **source}])
        elif folder:
            self.put("data.sources", [{"path": folder}])
            usual = {
                "prompts.txt",
                "prompt.txt",
                "captions.txt",
                "caption.txt",
                "videos.txt",
                "video.txt",
                "images.txt",
            }
            for setting in (video, caption, image):
                if setting is not None and setting.words[0] not in usual:
                    self.notes.append(
                        f"{folder}/{setting.words[0]} is found only under a usual name ({', '.join(sorted(usual))}):"
                        " rename it, or write a metadata.jsonl"
                    )

    def _datasets(self, config: Setting) -> None:
        """Finetrainers' JSON: a list of datasets, each with its buckets."""
        content = _read_json(self.folder / config.words[0])
        if content is None:
            self.refuse(config, "it cannot be read here")
            self.put("data.sources", [{"path": "clips"}])
            self.notes.append(f"{config.words[0]} is not here: write its datasets into data.sources and data.buckets")
            return
        self.mapped.append((config, "data.sources, data.buckets"))
        sources, buckets = [], []
        for dataset in content.get("datasets", []):
            path = dataset.get("data_root") or dataset.get("dataset_file")
            if dataset.get("dataset_type") == "image":
                self.notes.append(f"{path} holds images: see docs/data.md on how they are mixed in")
                continue
            sources.append(
                {"path": self.path(str(path)), **({"trigger": dataset["id_token"]} if dataset.get("id_token") else {})}
            )
            buckets += [list(bucket) for bucket in dataset.get("video_resolution_buckets", [])]
        self.put("data.sources", sources)
        self.put("data.buckets", _bucket_texts(buckets))

    def repository(self) -> None:
        """Where their relative paths start: from where this runs or a folder above the script, if a JSON is there that
        the script names and that does not lie beside it.
        """
        named = (self.settings.get(name) for name in ("dataset_config", "validation_dataset_file"))
        words = [setting.words[0] for setting in named if setting is not None and setting.words]
        for place in (self.folder, Path.cwd(), *self.folder.parents):
            if any((place / word).is_file() for word in words):
                self.folder = place
                return

    def buckets(self) -> None:
        (resolution, listed) = self.take("train_resolution", "video_resolution_buckets", place="data.buckets")
        if resolution is not None:
            sizes = [word.split("x") for word in resolution.words] if "x" in resolution.words[0] else [resolution.words]
            self.put("data.buckets", _bucket_texts(sizes))
            return
        if listed is not None:
            self.put("data.buckets", _bucket_texts([word.split("x") for word in listed.words]))
            return
        frames, heights, widths = self.take("frame_buckets", "height_buckets", "width_buckets", place="data.buckets")
        most, height, width = self.take("max_num_frames", "height", "width")
        if "buckets" in self.values.get("data", {}):
            for setting in (frames, heights, widths, most, height, width):
                self.refuse(setting, "the dataset's own buckets say it")
            return
        if frames is not None and frames.line is None and most is not None:  # the older script
            frames = most
            self.mapped.append((most, "data.buckets"))
        else:
            self.refuse(most, "the buckets say it")
        for setting in (height, width):
            if setting is not None and heights is None:
                self.mapped.append((setting, "data.buckets"))
            else:
                self.refuse(setting, "the buckets say it")
        axes = (frames, heights or height, widths or width)
        words = [axis.words if axis else (usual,) for axis, usual in zip(axes, ("49", "480", "720"), strict=True)]
        sizes = [[*size] for size in product(*words)]
        self.put("data.buckets", _bucket_texts(sizes))
        if len(sizes) > 12:
            self.notes.append(
                f"{len(sizes)} buckets, all combinations of theirs: `finetune doctor` says which are used"
            )

    def schedule(self) -> None:
        kind, warmup, cycles, power = self.take("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power")
        name = kind.words[0] if kind else "constant"
        ours = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
        if name == "cosine_with_restarts" and (cycles is None or _scalar(cycles) == 1):
            chosen = "cosine"
        elif name == "polynomial" and (power is None or _scalar(power) == 1):
            chosen = "linear"
        else:
            chosen = ours.get(name, "")
        if kind is not None and chosen:
            self.mapped.append((kind, "lr_schedule.kind"))
            self.put("lr_schedule.kind", chosen)
        elif kind is not None:
            self.refuse(kind, "there is no such schedule; constant, linear and cosine are there")
        if warmup is not None and name != "constant":
            self.mapped.append((warmup, "lr_schedule.warmup_steps"))
            self.put("lr_schedule.warmup_steps", _scalar(warmup))
        else:
            self.refuse(warmup, "their constant schedule does not warm up")
        for setting in (cycles, power):
            if setting is not None and _scalar(setting) == 1:
                self.mapped.append((setting, "lr_schedule.kind"))
            else:
                self.refuse(setting, "there is no such schedule")

    def optimizer(self) -> None:
        kind, small, small_bnb, four, torchao = self.take(
            "optimizer", "use_8bit", "use_8bit_bnb", "use_4bit", "use_torchao"
        )
        betas = self.take("beta1", "beta2", place="optimizer.betas")
        if all(betas):
            self.put("optimizer.betas", [_scalar(beta) for beta in betas if beta is not None])
        name = kind.words[0].lower() if kind else "adamw"
        base, _, variant = name.partition("-")
        eight = small or small_bnb or "8bit" in variant
        if base in ("adam", "adamw"):
            chosen = ("torchao_adamw8bit" if torchao else "adamw8bit") if eight else "adamw"
            self.put("optimizer.kind", chosen)
            for setting in (kind, small, small_bnb, torchao):
                if setting is not None:
                    self.mapped.append((setting, "optimizer.kind"))
            if base == "adam":
                self.notes.append("Adam became AdamW: weight decay is decoupled from the gradient")
        else:
            for setting in (kind, small, small_bnb, torchao):
                self.refuse(setting, "there is no such optimizer; adamw8bit, where optimizer.kind is left out")
        self.refuse(four, "there is no optimizer with states of 4 bits")

    def length(self) -> None:
        steps, most, epochs, old = self.take("train_steps", "max_train_steps", "train_epochs", "num_train_epochs")
        written = [setting for setting in (steps, most) if setting is not None]
        count = next((s for s in written if s.line is not None), written[0] if written else None)
        passes = epochs or old
        if count is not None and _scalar(count) is not None and (count.line is not None or passes is None):
            self.mapped.append((count, "train.steps"))
            self.put("train.steps", _scalar(count))
            if passes is not None:
                self.refuse(passes, "the number of steps says it")
        elif passes is not None:
            self.mapped.append((passes, "train.epochs"))
            self.put("train.epochs", _scalar(passes))

    def resumption(self) -> None:
        (setting,) = self.take("resume_from_checkpoint")
        if setting is None:
            return
        if setting.words[:1] in ((), ("latest",), ("null",), ("None",)):
            self.mapped.append((setting, "checkpoint.resume"))
            self.put("checkpoint.resume", "latest")
        else:
            self.refuse(setting, "a checkpoint of theirs cannot be continued; its LoRA can be: method.init_from")

    def validation(self) -> None:
        wanted, every, folder, texts, images, videos = self.take(
            *("do_validation", "validation_steps", "validation_dir"),
            *("validation_prompts", "validation_images", "validation_videos"),
        )
        prompt, separator, count, table = self.take(
            *("validation_prompt", "validation_prompt_separator", "num_validation_videos", "validation_dataset_file")
        )
        off = wanted is not None and not _on(wanted)
        if wanted is not None:
            self.mapped.append((wanted, "validation"))
        if off:
            self.put("validation.sample_every", None)
        if every is not None and not off:
            self.mapped.append((every, "validation.sample_every"))
            self.put("validation.sample_every", _scalar(every))
        else:
            self.refuse(every, "nothing is sampled")
        samples: list[dict[str, Any]] = []
        if texts is not None and folder is not None:
            base = self.folder / folder.words[0]
            lines = [_lines(base / setting.words[0]) if setting else [] for setting in (texts, images)]
            samples = [
                {"prompt": text, **({"image": self.path(f"{folder.words[0]}/{lines[1][i]}")} if lines[1][i:] else {})}
                for i, text in enumerate(lines[0])
            ]
        elif prompt is not None and prompt.words:
            mark = separator.words[0] if separator else ":::"
            pictures = images.words[0].split(mark) if images and images.words else []
            for index, text in enumerate(prompt.words[0].split(mark)):
                for seed in range(int(_scalar(count)) if count else 1):
                    image = {"image": self.path(pictures[index])} if pictures[index:] else {}
                    samples.append({"prompt": " ".join(text.split()), **image, "seed": seed})
        elif table is not None:
            content = _read_json(self.folder / table.words[0]) or {}
            for row in content.get("data", []):
                image = {"image": self.path(row["image_path"])} if row.get("image_path") else {}
                samples.append({"prompt": row.get("caption", ""), **image})
        for setting in (folder, texts, images, prompt, separator, count, table):
            if samples and not off:
                self.mapped += [(setting, "validation.samples")] if setting else []
            else:
                self.refuse(setting, "nothing is sampled" if off else "it cannot be read here: validation.samples")
        self.refuse(videos, "no model of ours samples from a video while training")
        if samples and not off:
            self.put("validation.samples", samples)

    def rest(self) -> None:
        for name in [*self.settings]:
            (setting,) = self.take(name)
            assert setting is not None
            if name in _ONE_TO_ONE and (setting.words or name in ("gradient_checkpointing", "use_dynamic_cfg")):
                place, convert = _ONE_TO_ONE[name]
                self.put(place, convert(setting))
                self.mapped.append((setting, place))
                continue
            swept = (reason for prefix, reason in _SWEPT_BY_PREFIX.items() if name.startswith(prefix))
            self.refuse(setting, _UNMAPPED.get(name) or next(swept, "none of ours is known for it"))


def _bucket_texts(sizes: Iterable[Sequence[Any]]) -> list[str]:
    return list(dict.fromkeys("x".join(str(part) for part in size) for size in sizes))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []


# ------------------------------------------------------------------------------------------------------- reading theirs


def translate(path: Path, folder: Path) -> Translation:
    """Read another trainer's script or file as a configuration of ours.

    Args:
        path: a shell script that starts CogVideo's, cogvideox-factory's or finetrainers' training, or CogKit's YAML;
            relative paths in it are taken to start at its folder.
        folder: where relative paths of ours will start.

    Raises:
        ConfigError: if it cannot be read, or is of no trainer that is known.
    """
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    script = None if is_yaml else ShellScript(path)
    written = list(_from_yaml(path) if script is None else script.settings())
    settings = {_ALIASES.get(setting.name, setting.name): setting for setting in written}
    trainer = _trainer(settings, is_yaml=is_yaml)
    if trainer is None:
        raise ConfigError(
            "this starts no training of CogVideo, CogKit, cogvideox-factory or finetrainers",
            where=str(path),
            fix="give the script with the flags of their train.py, or CogKit's YAML; or begin with --model",
        )
    for name, word in _DEFAULTS[trainer].items():
        settings.setdefault(name, Setting(name, (word,)))
    mapper = _Mapper(settings, path.absolute().parent, folder, notes=[] if script is None else script.notes)
    kind = settings.get("training_type", Setting("training_type", ("lora",)))
    full = _method(kind) == "full" or (script is not None and "_sft" in script.program)
    mapper.put("method.kind", "full" if full else "lora")
    for setting in mapper.take("rank", "lora_alpha", "target_modules") if full else ():
        if setting is not None and setting.line is not None:
            mapper.refuse(setting, "every weight is trained")
    mapper.repository()
    for part in (mapper.model, mapper.sources, mapper.buckets, mapper.length, mapper.schedule, mapper.optimizer):
        part()
    for part in (mapper.resumption, mapper.validation, mapper.rest):
        part()
    if "caption_dropout" not in mapper.values.setdefault("data", {}):
        mapper.put("data.caption_dropout", 0.0)
        mapper.notes.append(
            "data.caption_dropout is 0 as it was with them; CogVideoX was trained with 0.1, for classifier-free"
            " guidance"
        )
    rate = mapper.values.get("optimizer", {}).get("lr")
    if mapper.values["method"]["kind"] == "lora" and isinstance(rate, float) and rate < 5e-5:
        mapper.notes.append(f"a learning rate of {rate:g} hardly moves a LoRA: 1e-4 to 1e-3 is usual")
    return Translation(trainer, path, mapper.values, tuple(mapper.mapped), tuple(mapper.unmapped), tuple(mapper.notes))


def _trainer(settings: Mapping[str, Setting], *, is_yaml: bool) -> str | None:
    if "model_path" in settings and ("train_resolution" in settings or "training_type" in settings):
        return "CogKit" if is_yaml else "CogVideo"
    if "pretrained_model_name_or_path" in settings:
        newer = {"training_type", "dataset_config", "video_resolution_buckets", "model_name"}
        return "finetrainers" if newer & settings.keys() else "cogvideox-factory"
    return None


def _from_yaml(path: Path) -> Iterator[Setting]:
    document = Document.read(path)
    for name, value in document.values.items():
        line = re.match(r".*?:(\d+)", document.place((name,)).removeprefix(str(path.parent)))
        words = value if isinstance(value, list) else [] if value is None else [value]
        yield Setting(name, tuple(str(word) for word in words) or ("null",), int(line[1]) if line else 0)
