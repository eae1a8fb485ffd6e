"""What CogVideoX is trained on, as a function of model, noise schedule and batch."""

from __future__ import annotations

from torch import Tensor, nn

from finetune.cogvideox import denoise
from finetune.diffusion import noise_batch, v_mse
from finetune.facts import Facts
from finetune.types import Batch


def velocity_losses(model: nn.Module, facts: Facts, alpha_bar: Tensor, batch: Batch) -> Tensor:
    """The velocity's mean squared error per sample, float32 [B].

    Args:
        model: the transformer, or what wraps it.
        facts: of the model.
        alpha_bar: the noise schedule, float32 [num_train_timesteps].
        batch: on the device of both.
    """
    noised = noise_batch(batch, alpha_bar)
    prediction = denoise(model, facts, noised.noisy_latents, batch.prompt_embeds, batch.timesteps, batch.image_latents)
    return v_mse(prediction, noised.velocity)
