"""Functions of the library that hand on what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.conversion.convert import ConversionReport
    from finetune.conversion.export import ExportReport
    from finetune.conversion.inspection import Inspection
    from finetune.conversion.merge import MergeReport
    from finetune.conversion.push import PushReport
    from finetune.core.types import DtypeName


@checked
def export(
    source: str | Path,
    to: str | Path | None = None,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    full_pipeline: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
    pretrained: str | Path | None = None,
    layout: Literal["diffusers", "comfyui", "kohya", "peft", "merged"] = "diffusers",
    strength: float = 1.0,
    dtype: DtypeName | None = None,
    max_shard_size: str | None = None,
) -> ExportReport:
    """Export a run or one of its checkpoints.

    A LoRA becomes ``pytorch_lora_weights.safetensors`` with its settings in the header, a file of another layout, or
    merged into its base a ``transformer`` folder, which is what a full fine-tuning becomes in any case. All get a model
    card, a record for programs and the run's sampled videos.

    Args:
        source: a run's folder, or one checkpoint's.
        to: the export's folder, replaced if it is an earlier export; None for ``<run>/export``, or of another layout
            ``<run>/<layout>``.
        checkpoint: of a run's folder, the newest checkpoint or the one with the lowest held-out loss.
        full_pipeline: put the base's other components beside a whole transformer, so that the folder is a whole
            pipeline (hard links where the file system has them, copies elsewhere).
        weights: the moving average or the trained weights themselves; ``auto`` takes the average if one was kept.
        pretrained: where the base model is now, if not where the run had it.
        layout: whose names an adapter's tensors get: ``diffusers`` (which kijai's wrapper for ComfyUI reads too),
            ``comfyui`` (its own CogVideoX), ``kohya`` or ``peft``; or ``merged``: into the base's weights. A full
            fine-tuning is whole already, and exported as ever.
        strength: how much of the adapter is merged: 1 as trained, 0 none of it.
        dtype: of a whole transformer, which is loaded and merged in it; None for what the run trained in.
        max_shard_size: of a whole transformer's files, such as ``2GB``; None for 5 GB.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the message names those of the run that are whole.
        ModelError: if the base model cannot be found or loaded.
        ExportError: if what was written does not give back what was trained.
    """
    from finetune.conversion.export import ExportOptions, export
    from finetune.core.gpu import amount

    base = None if pretrained is None else str(pretrained)
    shard = amount("--max-shard-size", max_shard_size)
    options = ExportOptions(
        checkpoint, full_pipeline, weights, base, layout, strength, dtype, "5GB" if shard is None else shard
    )
    return export(Path(source).expanduser(), None if to is None else Path(to).expanduser(), options)


@checked
def inspect(source: str | Path, *, norms: bool = False) -> Inspection:
    """What an adapter or a checkpoint is, and what programs will make of it.

    Names, shapes and metadata are read from the headers of safetensors files, and JSON that stands beside them. A
    pickle is not read.

    Args:
        source: a file, or the folder of an export, an adapter, a transformer, a pipeline, a checkpoint or a run.
        norms: read the tensors too: how strong the update of each block is, and the alpha that stands in tensors.

    Raises:
        ConfigError: if there is nothing of the kind, or a file is damaged.
    """
    from finetune.conversion.inspection import inspect

    return inspect(Path(source).expanduser(), norms=norms)


@checked
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["diffusers", "sat"] = "diffusers",
    model: str | Path | None = None,
    dtype: DtypeName | None = None,
    alpha: float | None = None,
    extract_lora: float | None = None,
) -> ConversionReport:
    """Convert another program's checkpoint or LoRA, a diffusers folder to SAT, or a full fine-tuning to a LoRA.

    What the source is, and which CogVideoX, follows from its tensors' names and shapes. What is written is loaded again
    and compared with the source before it gets its name.

    Args:
        source: a file of weights, or a folder of SAT, DeepSpeed, FSDP, torch.distributed.checkpoint or diffusers.
        out: the folder to make; it must be new or empty.
        to: diffusers' format, or SAT's, which CogVideo's own first scripts read.
        model: a model in diffusers' format with the same shapes, where they are no published model's; its files on
            this machine stand in for the components that the source has not.
        dtype: of the weights that are written; None for as they are.
        alpha: of a LoRA whose file does not state it: its update counts alpha / rank.
        extract_lora: write a LoRA of how a full fine-tuning differs from ``model``: of this rank, or, below 1, of the
            rank that keeps this share of the squared difference.

    Raises:
        ConfigError: if there is nothing to convert, or an argument is missing that nothing in the source tells.
        ModelError: if the source is damaged, would run code, or is no CogVideoX.
        ExportError: if what was written does not give back what the source holds, or cannot be written.
    """
    from finetune.conversion.convert import ConvertOptions, convert

    options = ConvertOptions(to, None if model is None else str(model), dtype, alpha, extract_lora)
    return convert(Path(source).expanduser(), Path(out).expanduser(), options)


@checked
def merge(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    layout: Literal["diffusers", "comfyui", "kohya", "peft"] = "diffusers",
    rank: int | None = None,
) -> MergeReport:
    """Write the sum of LoRAs as one LoRA, of any program and for any program.

    Nothing is lost unless a lower rank is asked for. One source alone is written in another layout, or at that rank.

    Args:
        sources: each a file, or the folder of an export, an adapter, a checkpoint or a run; as ``PATH:WEIGHT`` where it
            is not to count 1.
        out: the file to write, new; for peft a folder.
        layout: as for ``export``.
        rank: of each layer at most; None for the sum of all.

    Raises:
        ConfigError: if a source is none or of another model, or ``out`` exists.
        ExportError: if it cannot be written, or what was written does not give back what it should.
    """
    from finetune.conversion.merge import merge
    from finetune.core.errors import ConfigError
    from finetune.inference.request import parse_adapter

    if rank is not None and rank < 1:
        raise ConfigError(f"a rank of {rank} is none", where="rank", fix="give a whole number from 1 up")
    texts = [sources] if isinstance(sources, str | Path) else sources
    if not texts:
        raise ConfigError("there is nothing to merge", where="sources", fix="name an adapter")
    return merge([parse_adapter(str(text)) for text in texts], Path(out).expanduser(), layout, rank)


@checked
def push(folder: str | Path, repo: str, *, public: bool = False, dry_run: bool = True) -> PushReport:
    """Upload an export to the Hugging Face hub: weights, card, record and sampled videos, in one commit.

    The card that is uploaded has the repository's name where the export's has its folder. The token is the one that
    ``hf auth login`` keeps, or ``HF_TOKEN``.

    Args:
        folder: an export. Runs, checkpoints and whatever else an export does not hold are refused.
        repo: ``user/name``, or ``name`` for one's own; it is created if need be.
        public: let everybody see it. Without, a repository that is public already is refused.
        dry_run: only say what would be uploaded; nothing is asked of a network.

    Raises:
        ExportError: if it is no export, is damaged or holds other things; or if the hub does not take it.
    """
    from finetune.conversion.push import push

    return push(Path(folder).expanduser(), repo, public=public, send=not dry_run)
