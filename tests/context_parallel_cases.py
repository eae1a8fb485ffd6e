"""What the processes of a ``launcher`` run in tests of context parallelism: one call of a model, whole and divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import load_transformer
from finetune.cogvideox.objective import alpha_bar, velocity_losses
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.distributed import ProcessGroup
from finetune.core.types import Batch, Bucket
from finetune.inference.context_parallel import Division, divide
from finetune.memory.config import MemoryConfig
from finetune.memory.runner import assert_recompute
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod
from finetune.parallel import context


def denoised(spec: ModelSpec, transformer: Any, bucket: Bucket) -> Tensor:
    """The two passes of guidance, from random latents."""
    generator = torch.Generator().manual_seed(5)
    channels, frames, height, width = spec.latent_shape(bucket)
    latents = torch.randn(1, channels, frames + spec.front_padding(frames), height, width, generator=generator)
    prompts = torch.randn(2, spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
    image = torch.randn(2, channels, 1, height, width, generator=generator) if spec.image_to_video else None
    with torch.no_grad():
        return denoise(transformer, spec, latents.repeat(2, 1, 1, 1, 1), prompts, torch.tensor([500, 500]), image)


def compare(models: list[str], sizes: list[str], divisions: list[Division]) -> None:
    """Each model's call, whole and divided: the same up to rounding, in every process."""
    ranks = ProcessGroup.current()
    for folder, size in zip(models, sizes, strict=True):
        spec, bucket = read_spec(folder), Bucket(*map(int, size.split("x")))
        whole = denoised(spec, load_transformer(ModelConfig(pretrained=folder)), bucket)
        for division in divisions:
            transformer = load_transformer(ModelConfig(pretrained=folder))
            divide(transformer, division, ranks)
            parts = denoised(spec, transformer, bucket)
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6, msg=f"{folder}, {division}")
            assert all(torch.equal(parts, other) for other in ranks.run_on_all(lambda result=parts: result))
    ranks.close()


def gradients(model: str, size: str, method: dict[str, Any], memory: dict[str, Any], group: Any) -> dict[str, Tensor]:
    """Loss and gradients of two clips, of all tokens: summed over ``group`` where it is given."""
    spec, bucket = read_spec(model), Bucket(*map(int, size.split("x")))
    channels, frames, height, width = spec.latent_shape(bucket)
    shape, generator = (2, channels, frames + spec.front_padding(frames), height, width), torch.Generator()
    drawn = [torch.randn(shape, generator=generator.manual_seed(seed)) for seed in (1, 2)]
    batch = Batch(
        latents=drawn[0],
        noise=drawn[1],
        timesteps=torch.tensor([100, 800]),
        prompt_embeds=torch.randn(2, spec.max_text_seq_length, spec.text_embed_dim, generator=generator),
        image_latents=torch.randn(2, channels, 1, height, width, generator=generator) if spec.image_to_video else None,
        slots=(0, 1),
        clips=("a", "b"),
    )
    transformer: Any = load_transformer(ModelConfig(pretrained=model))
    trains = LoraMethod(**method) if method["kind"] == "lora" else FullMethod(**method)
    trains.apply(transformer, seed=0)
    state = MemoryConfig(**memory)
    state.apply(transformer)
    transformer.train()
    if group is not None:
        context.divide(transformer, group)
    parameters = trains.trainable(transformer)
    with torch.no_grad():
        for name, parameter in parameters.items():  # of a LoRA, that the first pass has gradients everywhere
            if method["kind"] == "lora":
                parameter.copy_(torch.randn(parameter.shape, generator=generator.manual_seed(len(name))) * 0.1)
    torch.manual_seed(9)
    with assert_recompute(transformer, state):
        losses = velocity_losses(transformer, spec, alpha_bar(spec).float(), batch)
        losses.sum().backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    for name, grad in found.items():
        assert grad is not None, name
        if group is not None:
            distributed.all_reduce(grad, group=group.group)
    return {"loss": losses.detach(), **found}


def differentiate(cases: list[tuple[str, str, dict[str, Any], dict[str, Any]]]) -> None:
    """Loss and gradients of each case, whole and divided: the same up to rounding, in every process."""
    ranks = ProcessGroup.current()
    for case in cases:
        whole, parts = (gradients(*case, group) for group in (None, context.ContextGroup.of(ranks, ranks.world)))
        for name, theirs in whole.items():
            torch.testing.assert_close(parts[name], theirs, rtol=1e-5, atol=1e-6, msg=f"{case}, {name}")
        assert all(torch.equal(parts["loss"], other) for other in ranks.run_on_all(lambda own=parts: own["loss"]))
    ranks.close()
