"""What the processes of a ``launcher`` run in tests of context parallelism: one denoising call, whole and divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import load_transformer
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.distributed import ProcessGroup
from finetune.core.types import Bucket
from finetune.inference.context_parallel import Division, divide


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
