"""Functions of the library that hand on what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.convert.convert import ConversionReport
    from finetune.convert.export import ExportReport
    from finetune.convert.inspection import Inspection
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
    merged: bool = False,
    strength: float = 1.0,
) -> ExportReport:
    """Export a run or one of its checkpoints.

    A LoRA becomes ``pytorch_lora_weights.safetensors`` with its settings in the header, or merged into its base a
    ``transformer`` folder, which is what a full fine-tuning becomes in any case. All get a model card, a record for
    programs and the run's sampled videos.

    Args:
        source: a run's folder, or one checkpoint's.
        to: the export's folder, replaced if it is an earlier export; None for ``<run>/export``, or ``<run>/merged``.
        checkpoint: of a run's folder, the newest checkpoint or the one with the lowest held-out loss.
        full_pipeline: put the base's other components beside a whole transformer, so that the folder is a whole
            pipeline (hard links where the file system has them, copies elsewhere).
        weights: the moving average or the trained weights themselves; ``auto`` takes the average if one was kept.
        pretrained: where the base model is now, if not where the run had it.
        merged: put the adapter into the base's weights; a full fine-tuning is whole already, and exported as ever.
        strength: how much of the adapter is merged: 1 as trained, 0 none of it.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the message names those of the run that are whole.
        ModelError: if the base model cannot be found or loaded.
        ExportError: if what was written does not give back what was trained.
    """
    from finetune.convert.export import ExportOptions, export

    options = ExportOptions(
        checkpoint, full_pipeline, weights, None if pretrained is None else str(pretrained), merged, strength
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
    from finetune.convert.inspection import inspect

    return inspect(Path(source).expanduser(), norms=norms)


@checked
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["diffusers", "sat"] = "diffusers",
    model: str | Path | None = None,
    dtype: DtypeName | None = None,
) -> ConversionReport:
    """Convert another program's checkpoint, or a diffusers folder to SAT.

    What the source is, and which CogVideoX, follows from its tensors' names and shapes. What is written is loaded again
    and compared with the source before it gets its name.

    Args:
        source: a file of weights, or a folder of SAT or diffusers.
        out: the folder to make; it must be new or empty.
        to: diffusers' format, or SAT's, which CogVideo's own first scripts read.
        model: a model in diffusers' format with the same shapes, where they are no published model's; its files on
            this machine stand in for the components that the source has not.
        dtype: of the weights that are written; None for as they are.

    Raises:
        ConfigError: if there is nothing to convert, or an argument is missing that nothing in the source tells.
        ModelError: if the source is damaged, would run code, or is no CogVideoX.
        ExportError: if what was written does not give back what the source holds, or cannot be written.
    """
    from finetune.convert.convert import ConvertOptions, convert

    options = ConvertOptions(to, None if model is None else str(model), dtype)
    return convert(Path(source).expanduser(), Path(out).expanduser(), options)
