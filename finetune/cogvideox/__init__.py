"""The only place that knows diffusers' CogVideoX: loading, encoding, one denoising call, and the stock pipeline.

Everything outside works on ``[..., C, F, H, W]`` tensors and a ``Facts``.
"""

from finetune.cogvideox.denoise import denoise, rotary_table
from finetune.cogvideox.encode import (
    TokenizedCaption,
    count_tokens,
    encode_image,
    encode_prompts,
    encode_video,
    tokenize,
)
from finetune.cogvideox.fingerprint import base_digest, fingerprint, require_as_sent, require_base
from finetune.cogvideox.latents import alpha_bar, condition_latents, model_latents
from finetune.cogvideox.load import (
    ModelConfig,
    empty_transformer,
    load_scheduler,
    load_text,
    load_tokenizer,
    load_transformer,
    load_vae,
    save_transformer,
)
from finetune.cogvideox.pipeline import build_pipeline, pipeline_class
from finetune.cogvideox.weights import Placement

__all__ = [
    "ModelConfig",
    "Placement",
    "TokenizedCaption",
    "alpha_bar",
    "base_digest",
    "build_pipeline",
    "condition_latents",
    "count_tokens",
    "denoise",
    "empty_transformer",
    "encode_image",
    "encode_prompts",
    "encode_video",
    "fingerprint",
    "load_scheduler",
    "load_text",
    "load_tokenizer",
    "load_transformer",
    "load_vae",
    "model_latents",
    "pipeline_class",
    "require_as_sent",
    "require_base",
    "rotary_table",
    "save_transformer",
    "tokenize",
]
