"""The sections of a configuration that say which model is trained, and what is withheld from it; no torch."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finetune.cogvideox.components import loading, require_own_files
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.core.types import DtypeName, Strict, torch_dtype

if TYPE_CHECKING:
    import torch


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


class DropoutConfig(Strict):
    """How often the conditions are withheld, so that classifier-free guidance has something to guide away from."""

    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a sample trains on the unconditional text. The original CogVideoX training used 0.1."""
    image_dropout: float = Field(0.05, ge=0, le=1)
    """Probability that an image-to-video sample trains on an all-zero image. The original training used 0.05."""
    unconditional_text: Literal["empty", "zeros"] = "empty"
    """What stands for "no caption": the embedding of the empty caption, as diffusers samples, or zeros, as SAT did."""
