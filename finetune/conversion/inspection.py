"""What an adapter or a checkpoint is, and what programs will make of it: a report from its headers alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetune.checkpoint.folders import CONFIG, EMA, OPTIMIZER
from finetune.conversion.loaders import Loading, lora_loadings, transformer_loadings
from finetune.conversion.lora_layouts import detect, is_lora
from finetune.conversion.model_card import PEFT_CONFIG
from finetune.conversion.stored import (
    Shapes,
    StoredLora,
    block_count,
    block_of,
    find_files,
    follows_control,
    inside,
    opened,
    published_bases,
    read_headers,
    settings_beside,
    whole_layers,
)
from finetune.core.files import TRAINABLE, from_here, human_size
from finetune.core.text import shown
from finetune.inference.adapters import TRAINING_RECORD, read_record
from finetune.methods.adapter import COMPONENT, FINETRAINERS_KEY, METADATA_KEY

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

LOKR = "LoKr"

_KINDS = (
    ("transformer", r"(transformer_blocks|\bblocks)\.\d+\.norm1\.linear\.weight$"),
    (LOKR, r"^(transformer\.)?transformer_blocks\..*\.lokr_"),
    ("LoHa, LoKr or LoCon of LyCORIS", r"\.(lokr_|hada_|lora_mid)"),
    ("VAE", r"(^|\.)(en|de)coder\.(down|up|mid)_?(block|\.)"),
    ("T5 text encoder", r"^encoder\.block\.\d+\.layer\."),
)
"""What a file is that is no LoRA, by what some tensor's name holds."""

_WRITERS = {
    "peft": f"peft, or a trainer built on it, by {PEFT_CONFIG}'s names",
    "peft-pipeline": f"peft, or a trainer built on it, by {PEFT_CONFIG}'s names",
    "sat": "CogVideo's sat/, by its names",
    "sat-bare": "CogVideo's sat/, by its names",
    "videox-fun": "VideoX-Fun, by its names",
    "diffusion-model": "diffusion-pipe or ai-toolkit, by its names",
    "comfyui": "an export for ComfyUI, by its names",
    "kohya-comfyui": "an export for ComfyUI, by its names",
    "kohya": "kohya's scripts or a descendant of theirs, by its names",
}
"""Who writes the layouts of ``lora_layouts.LAYOUTS``, where metadata says nothing."""

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Norms:
    """How strongly an adapter acts, or how large a model's weights are: Frobenius norms."""

    blocks: tuple[float, ...]
    """Of all layers of each block together; of an adapter, of the update as it is added."""
    layers: Mapping[str, float]
    """By a layer's name inside its block, of all blocks together; and of the layers outside of all blocks."""

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {norm:.3g}" for name, norm in self.layers.items())]
        if self.blocks:
            ends = f"{min(self.blocks):.3g} to {max(self.blocks):.3g}"
            lines.insert(0, f"{self._bars()}  blocks 0 to {len(self.blocks) - 1}, {ends}")
        return "\n".join(lines)

    def _bars(self) -> str:
        """One character per block: as high as its norm, ``_`` where it is nothing, ``!`` where it is no number."""
        highest = max((norm for norm in self.blocks if math.isfinite(norm)), default=0.0)

        def bar(norm: float) -> str:
            if not math.isfinite(norm):
                return "!"
            return _BARS[min(int(norm / highest * len(_BARS)), len(_BARS) - 1)] if norm else "_"

        return "".join(map(bar, self.blocks))


@dataclass(frozen=True)
class Inspection:
    """What a file or folder was found to be."""

    path: Path
    files: tuple[Path, ...]
    """That its tensors are in."""
    size: int
    """Bytes of these."""
    kind: str
    """Such as ``LoRA`` or ``transformer``."""
    origin: str = ""
    """Who probably wrote it, and how that shows."""
    layout: str = ""
    """Whose names its tensors have."""
    bases: tuple[str, ...] = ()
    """Published models (``cogvideox.model_files.KNOWN_MODELS``) that have each of its layers, in that shape."""
    stated_base: str = ""
    """What its metadata, or a file beside it, says of its base."""
    blocks: int = 0
    """That its layers are in, going by the highest."""
    parameters: int = 0
    dtypes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    """Of a LoRA: all that occur."""
    alphas: tuple[float, ...] = ()
    """Of a LoRA: all that it states; empty where it states none that was read."""
    alpha_source: str = ""
    """Where alpha stands."""
    scales: tuple[float, ...] = ()
    """Of a LoRA: by what updates are multiplied; empty where alpha was not read."""
    targets: Mapping[str, int] | None = None
    """Of a LoRA: how many layers it adapts, by their name inside a block."""
    metadata: Mapping[str, str] | None = None
    """Of its headers, but for what diffusers keeps an adapter's settings in."""
    loadings: tuple[Loading, ...] = ()
    norms: Norms | None = None
    """Where they were asked for."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str)

    def __str__(self) -> str:
        rows = [
            ("made by", [self.origin]),
            ("layout", [self.layout]),
            ("base", [self._base()]),
            ("rank", [_listed(self.ranks)]),
            ("alpha", [self._alpha()]),
            ("targets", [", ".join(f"{name} x {count}" for name, count in (self.targets or {}).items())]),
            ("weights", [f"{self.parameters:,} in {', '.join(self.dtypes)}" if self.parameters else ""]),
            ("norms", str(self.norms or "").splitlines()),
            ("metadata", [f"{key} = {_short(value)}" for key, value in (self.metadata or {}).items()]),
            ("loads in", [str(loading) for loading in self.loadings]),
            *(("note", [note]) for note in self.notes),
        ]
        lines = [f"{from_here(self.path)}: {self.kind}, {human_size(self.size)}"]
        for label, texts in rows:
            texts = [text for text in texts if text]
            # Names of tensors and words of metadata come from strangers.
            lines += [f"{'' if index else label:<9} {shown(text)}" for index, text in enumerate(texts)]
        return "\n".join(lines)

    def _base(self) -> str:
        if not self.blocks:
            return self.stated_base
        shapes = " or ".join(self.bases) or "none of the published models"
        stated = f"; {self.stated_base}" if self.stated_base else ""
        return f"by its shapes {shapes} (layers up to block {self.blocks - 1}){stated}"

    def _alpha(self) -> str:
        stated = f"{_listed(self.alphas)}, " if self.alphas else ""
        counts = f": the update counts {_listed(self.scales)}" if self.scales else ""
        return f"{stated}{self.alpha_source}{counts}"


def _listed(numbers: Sequence[float]) -> str:
    ends = f"{numbers[0]:g} to {numbers[-1]:g} ({len(numbers)} different)" if len(numbers) > 4 else ""
    return ends or ", ".join(f"{number:g}" for number in numbers)


def _short(value: str) -> str:
    return value if len(value) <= 100 else f"{value[:80]}... ({len(value):,} characters)"


def inspect(path: Path, *, norms: bool) -> Inspection:
    """Look at an adapter or a checkpoint; arguments and errors stand at ``finetune.inspect``."""
    files, notes = find_files(path)
    size = sum(file.stat().st_size for file in files)
    if files[0].suffix in _PICKLES:
        note = "a pickle can run code when it is read, so this one was not; `finetune convert` takes its tensors alone"
        return Inspection(path, files, size, "a pickle, PyTorch's format of old", notes=(*notes, note))
    forms, metadata = read_headers(files)
    shapes = {name: form.shape for name, form in forms.items()}
    kind = _kind(files[0], shapes)
    report = Inspection(
        path,
        files,
        size,
        kind,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        dtypes=tuple(sorted({form.dtype for form in forms.values()})),
        metadata={key: metadata[key] for key in sorted(metadata) if key not in (METADATA_KEY, "format")},
        stated_base=_stated_base(files[0], metadata),
        notes=tuple(notes),
    )
    if kind == "LoRA" and follows_control(files[0], shapes):
        note = "it follows a control video, by a projection that trained beside it: `generate --adapter` loads both,"
        note += " and so do the lines in an export's card; what else loads it here loads the LoRA alone"
        report = replace(report, notes=(*report.notes, note))
    if kind == "LoRA":
        return _with_lora(report, StoredLora(files[0], shapes, metadata, detect(shapes)), norms=norms)
    if kind == LOKR:
        return _with_lokr(report, metadata)
    if kind == "transformer":
        return _with_transformer(report, shapes, norms=norms)
    return report


def _with_lora(report: Inspection, lora: StoredLora, *, norms: bool) -> Inspection:
    alphas, source = lora.alphas(read=norms)
    scales = lora.scales(read=norms)
    is_known = bool(alphas) or not lora.states_alpha
    notes = list(report.notes)
    if lora.uses_dora:
        notes.append("it is a DoRA: beside the update it learned the magnitude of every output")
    if unknown := [module for module in lora.layers if lora.layout is None]:
        notes.append(f"no CogVideoX has layers such as {unknown[0]}")
    return replace(
        report,
        layout=lora.layout.label if lora.layout else "unknown names",
        origin=_origin(lora.file, report.metadata or {}, lora),
        bases=published_bases(lora.layers, is_whole=False),
        blocks=block_count(lora.layers),
        ranks=tuple(sorted(set(lora.ranks.values()))),
        alphas=tuple(sorted(set(alphas.values()))),
        alpha_source=source,
        scales=tuple(sorted({round(scale, 9) for scale in scales.values()})) if is_known else (),
        targets=dict(Counter(map(inside, lora.layers))),
        loadings=lora_loadings(lora),
        norms=_norms(_lora_norms(lora, scales)) if norms else None,
        notes=tuple(notes),
    )


def _with_lokr(report: Inspection, metadata: Mapping[str, str]) -> Inspection:
    """What is stated of a LoKr, and what loads it; its factors say nothing of the sides of its layers."""
    try:
        header = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        header = None
    settings = {k.removeprefix(f"{COMPONENT}."): v for k, v in header.items()} if isinstance(header, dict) else {}
    own = settings_beside(report.files[0].parent, CONFIG).get("method") if report.files[0].name == TRAINABLE else None
    settings = {"r": own.get("rank"), "alpha": own.get("alpha")} if isinstance(own, dict) else settings
    rank, alpha = (value if isinstance(value, int | float) else None for value in map(settings.get, ("r", "alpha")))
    layers = {name.partition(".lokr_")[0].removeprefix(f"{COMPONENT}.") for name in read_headers(report.files)[0]}
    is_file = report.files[0].name != TRAINABLE
    outcome = "pipeline.transformer.load_lora_adapter takes it; load_lora_weights of the pipeline refuses it"
    if not is_file:
        outcome = "`finetune export` makes a file of it"
    return replace(
        report,
        layout="diffusers' layout",
        origin=_origin(report.files[0], report.metadata or {}, None),
        blocks=block_count(layers),
        ranks=(int(rank),) if rank is not None else (),
        alphas=(float(alpha),) if alpha is not None else (),
        alpha_source="as stated" if alpha is not None else "",
        scales=(alpha / rank,) if alpha is not None and rank else (),
        targets=dict(Counter(map(inside, sorted(layers)))),
        loadings=(
            Loading("diffusers", is_file, outcome),
            Loading("generate --adapter", True, "as it is"),
            Loading("method.init_from", False, "it takes a LoRA"),
            Loading("ComfyUI, convert, merge, compare", False, "export it with --to merged"),
        ),
    )


def _with_transformer(report: Inspection, shapes: Shapes, *, norms: bool) -> Inspection:
    layout, layers = whole_layers(shapes)
    by_layer = {module: shapes[name] for module, name in layers.items()}
    has_config = (report.files[0].parent / "config.json").is_file() and report.files[0].name != TRAINABLE
    return replace(
        report,
        layout="" if layout is None else "diffusers' layout" if layout.prefix == "" else layout.label,
        origin=_origin(report.files[0], report.metadata or {}, None),
        bases=published_bases(by_layer, is_whole=True),
        blocks=block_count(layers),
        loadings=transformer_loadings(layout, has_config=has_config),
        norms=_norms(_weight_norms(report.files, layers)) if norms else None,
    )


# ----------------------------------------------------------------------------------------------- what, whose, from whom


def _kind(file: Path, names: Iterable[str]) -> str:
    names = list(names)
    if file.name in (OPTIMIZER, EMA):
        return f"the {'optimizer states' if file.name == OPTIMIZER else 'averaged weights'} of a checkpoint"
    if any(map(is_lora, names)):
        return "LoRA"
    matches = (kind for kind, pattern in _KINDS if any(re.search(pattern, name) for name in names))
    return next(matches, "tensors of another kind")


def _stated_base(file: Path, metadata: Mapping[str, str]) -> str:
    """What the files say of the base, and which of them does."""
    record = read_record(file.parent) or read_record(file.parent.parent)  # of an adapter, of a transformer
    model = settings_beside(file.parent, CONFIG).get("model") if file.name == TRAINABLE else None
    merged = (f", with {one.name} at {one.strength:g} merged in" for one in (record.base_adapters if record else ()))
    own = f"{record.base_model}{''.join(merged)}" if record and record.base_model else ""
    statements = {
        TRAINING_RECORD: own,
        "its run": model.get("pretrained") if isinstance(model, dict) else "",
        PEFT_CONFIG: settings_beside(file.parent, PEFT_CONFIG).get("base_model_name_or_path"),
        **{key: metadata.get(key) for key in ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")},
    }
    return next((f"{source} names {base!s:.200}" for source, base in statements.items() if base), "")


def _origin(file: Path, metadata: Mapping[str, str], lora: StoredLora | None) -> str:
    """Who probably wrote a file."""
    folder = file.parent
    if file.name == TRAINABLE:
        return "this package: a checkpoint"
    if (folder / TRAINING_RECORD).is_file() or (folder.parent / TRAINING_RECORD).is_file():
        return f"this package: an export, with {TRAINING_RECORD}"
    if merged := metadata.get("modelspec.merged_from"):
        return f"a merge of {_short(merged)}, by its metadata"
    if software := metadata.get("software") or metadata.get("modelspec.implementation"):
        return f"{_short(software)}, by its metadata"
    if module := metadata.get("ss_network_module"):
        return f"kohya's scripts or a descendant of theirs, by ss_network_module = {_short(module)}"
    if lora is None or lora.layout is None:
        return ""
    if lora.layout.name == "diffusers":
        if FINETRAINERS_KEY in metadata:
            return f"finetrainers, by {FINETRAINERS_KEY} in its header"
        if lora.settings[0]:
            return "diffusers 0.35 or later, by the settings in its header"
        return "CogVideo, CogKit, finetrainers or an older diffusers, by its names and the alpha that it lacks"
    return _WRITERS.get(lora.layout.name, "")


# -------------------------------------------------------------------------------------------------------- with tensors


def _norms(norms: Iterable[tuple[str, float]]) -> Norms:
    """From pairs of (module, norm)."""
    blocks: dict[int, float] = defaultdict(float)
    layers: dict[str, float] = defaultdict(float)
    for module, norm in norms:
        layers[inside(module)] += norm**2
        if (block := block_of(module)) is not None:
            blocks[block] += norm**2
    ordered = (math.sqrt(blocks[block]) for block in range(max(blocks, default=-1) + 1))
    return Norms(tuple(ordered), {name: math.sqrt(square) for name, square in layers.items()})


def _lora_norms(lora: StoredLora, scales: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Of scale x B A, without forming the product: |BA|^2 = sum of (B^T B) * (A A^T)."""
    with opened(lora.file) as source:
        for module, down_name, up_name in lora.pairs():
            down, up = (source.get_tensor(name).float().flatten(1) for name in (down_name, up_name))
            square = ((up.T @ up) * (down @ down.T)).sum().item()
            yield module, scales[module] * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


def _weight_norms(files: Sequence[Path], layers: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    modules = {name: module for module, name in layers.items()}
    for file in files:
        with opened(file) as source:
            for name in source.keys():  # noqa: SIM118 - not a mapping
                if name in modules:
                    yield modules[name], source.get_tensor(name).float().norm().item()
