"""The stock diffusers pipeline around modules that are already loaded: for sampling, and to verify exports against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.facts import Facts

if TYPE_CHECKING:
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline


def pipeline_class(facts: Facts) -> type[CogVideoXPipeline] | type[CogVideoXImageToVideoPipeline]:
    """``CogVideoXImageToVideoPipeline`` or ``CogVideoXPipeline``, by the facts."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    kind: type[CogVideoXPipeline] | type[CogVideoXImageToVideoPipeline]
    kind = CogVideoXImageToVideoPipeline if facts.image_to_video else CogVideoXPipeline
    return kind


def build_pipeline(
    facts: Facts,
    *,
    transformer: Any,
    scheduler: Any,
    vae: Any = None,
    tokenizer: Any = None,
    text_encoder: Any = None,
) -> Any:
    """The stock pipeline around these modules, which stay where and as they are; building one costs nothing.

    Pass ``max_sequence_length=facts.max_text_seq_length`` when calling it with prompts: the pipeline's own default is
    the first generation's, whatever the model.

    Args:
        facts: of the model.
        transformer: a ``CogVideoXTransformer3DModel``, with or without adapters, unwrapped.
        scheduler: a CogVideoX scheduler.
        vae: may be absent where latents are sampled and not decoded; an image-to-video pipeline always calls it.
        tokenizer: may be absent where embeddings are given instead of prompts.
        text_encoder: as ``tokenizer``.
    """
    pipeline = pipeline_class(facts)(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    if vae is None:
        # The pipeline derives these from the VAE, and without one assumes the published VAE's.
        pipeline.vae_scale_factor_spatial = facts.vae_spatial
        pipeline.vae_scale_factor_temporal = facts.vae_temporal
        pipeline.vae_scaling_factor_image = facts.scaling_factor
    return pipeline
