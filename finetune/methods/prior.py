"""Prior preservation: what the base model predicts, by the model in which an adapter trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune.cogvideox.control import projection_strength
from finetune.cogvideox.denoise import ofs_of
from finetune.cogvideox.objective import predicted_velocity
from finetune.memory.adaln_offload import announced
from finetune.methods.lora import adapted_layers

if TYPE_CHECKING:
    from finetune.cogvideox.spec import ModelSpec
    from finetune.core.types import Batch


@contextmanager
def without_adapter(transformer: nn.Module) -> Iterator[None]:
    """While it lasts, a transformer computes what its base does, bit for bit, in whatever memory state."""
    layers = [layer for _, layer in adapted_layers(transformer)]
    # The flag that peft's layers and ours go by. Strength 0 would not do: a DoRA still stretches the rows. And peft's
    # own switch freezes the adapter as well, which FSDP2 and DDP, who look at what trains, must not see.
    for layer in layers:
        layer._disable_adapters = True
    try:
        with projection_strength(transformer, 0.0):
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def asks_base(batch: Batch, *, collective: bool) -> bool:
    """Whether a pass of the base model comes before that of a micro-batch.

    Args:
        batch: the micro-batch.
        collective: whether processes talk to each other in every forward pass: then all of them make it or none.
    """
    return batch.prior is not None and (collective or any(batch.prior))


def base_prediction(
    model: nn.Module, transformer: nn.Module, spec: ModelSpec, alpha_bar: Tensor, batch: Batch, *, collective: bool
) -> Tensor | None:
    """What the base model predicts for a micro-batch, float32 [B, C, F, H, W], without a gradient; None where nobody
    ``asks_base``.

    Args:
        model: what is called: the transformer itself or, where its wrapper communicates in each pass, the wrapper.
        transformer: a diffusers transformer with a LoRA.
        spec: of the model.
        alpha_bar: the noise schedule, float32 [num_train_timesteps].
        batch: on the device of both.
        collective: as in ``asks_base``.
    """
    if not asks_base(batch, collective=collective):
        return None
    with torch.no_grad(), without_adapter(transformer), announced(transformer, batch.timesteps_on_host, ofs_of(spec)):
        return predicted_velocity(model, spec, alpha_bar, batch)
