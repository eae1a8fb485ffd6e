"""What each component's JSON may say: every field that its class reads, with type, bounds and the class's default.

A wrong type would otherwise end as a traceback out of a library, or as another model than the one that was trained.
Keys that are not listed are left alone: the diffusers classes pass them over, and T5 is built from these fields only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

SchedulerClass = Literal["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]

# Far above any model, and far below what would take all memory before a wrong number is noticed.
_Layers = Annotated[int, Field(gt=0, le=1_000)]
_Width = Annotated[int, Field(gt=0, le=65_536)]
_Rgb = Annotated[int, Field(ge=3, le=3)]
_Probability = Annotated[float, Field(ge=0, lt=1)]
_Epsilon = Annotated[float, Field(gt=0, le=1e-2)]
_Activation = Literal["silu", "swish", "mish", "gelu", "relu"]


class Part(BaseModel):
    """A component's JSON. Strict: JSON has numbers, truth values and texts, and none stands for another."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Transformer(Part):
    """Defaults of ``diffusers.CogVideoXTransformer3DModel``."""

    class_name: Literal["CogVideoXTransformer3DModel"] = Field(alias="_class_name")
    num_layers: _Layers = 30
    num_attention_heads: _Width = 30
    attention_head_dim: _Width = 64
    in_channels: _Width = 16
    out_channels: _Width = 16
    patch_size: _Width = 2
    patch_size_t: _Width | None = None
    patch_bias: bool = True
    sample_height: _Width = 60
    sample_width: _Width = 90
    sample_frames: _Width = 49
    spatial_interpolation_scale: PositiveFloat = 1.875
    temporal_interpolation_scale: PositiveFloat = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    time_embed_dim: _Width = 512
    ofs_embed_dim: _Width | None = None
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    text_embed_dim: _Width = 4096
    max_text_seq_length: _Width = 226
    temporal_compression_ratio: _Width = 4
    dropout: _Probability = 0.0
    attention_bias: bool = True
    activation_fn: Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"] = (
        "gelu-approximate"
    )
    timestep_activation_fn: _Activation = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: _Epsilon = 1e-5

    @model_validator(mode="after")
    def _fits(self) -> Transformer:
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError("attention_head_dim is split in 4/16, 6/16 and 6/16: it has to be a multiple of 16")
        return self


class Vae(Part):
    """Defaults of ``diffusers.AutoencoderKLCogVideoX``."""

    class_name: Literal["AutoencoderKLCogVideoX"] = Field(alias="_class_name")
    in_channels: _Rgb = 3
    out_channels: _Rgb = 3
    block_out_channels: Annotated[list[_Width], Field(min_length=1, max_length=8)] = [128, 256, 256, 512]
    down_block_types: list[Literal["CogVideoXDownBlock3D"]] = ["CogVideoXDownBlock3D"] * 4
    up_block_types: list[Literal["CogVideoXUpBlock3D"]] = ["CogVideoXUpBlock3D"] * 4
    layers_per_block: _Layers = 3
    latent_channels: _Width = 16
    temporal_compression_ratio: _Width = 4
    sample_height: _Width = 480
    sample_width: _Width = 720
    act_fn: _Activation = "silu"
    norm_eps: _Epsilon = 1e-6
    norm_num_groups: _Width = 32
    scaling_factor: PositiveFloat = 1.15258426
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Vae:
        blocks = len(self.block_out_channels)
        if not blocks == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length")
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide block_out_channels")
        if self.temporal_compression_ratio not in (ratios := [2**level for level in range(blocks)]):
            raise ValueError(f"temporal_compression_ratio is {self.temporal_compression_ratio}, none of {ratios}")
        return self


class Scheduler(Part):
    """Defaults of ``diffusers.CogVideoXDDIMScheduler``, which ``CogVideoXDPMScheduler`` shares."""

    class_name: SchedulerClass = Field(alias="_class_name")
    num_train_timesteps: Annotated[int, Field(gt=0, le=100_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.0120
    beta_schedule: str = "scaled_linear"
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: Annotated[float, Field(gt=0, le=1_000)] = 3.0
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0
    sample_max_value: PositiveFloat = 1.0
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Field(ge=0, le=1)] = 0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"

    @model_validator(mode="after")
    def _fits(self) -> Scheduler:
        if self.beta_start >= self.beta_end:
            raise ValueError("beta_start has to be less than beta_end")
        return self


class TextEncoder(Part):
    """Defaults of ``transformers.T5Config``, but for those that say which T5 it is."""

    d_model: _Width
    d_kv: _Width = 64
    d_ff: _Width = 2048
    num_layers: _Layers = 6
    num_heads: Annotated[int, Field(gt=0, le=1_000)] = 8
    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 32128
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=65_536)] = 32
    relative_attention_max_distance: _Width = 128
    dropout_rate: _Probability = 0.1
    layer_norm_epsilon: _Epsilon = 1e-6
    feed_forward_proj: Literal["relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"] = "relu"
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _fits(self) -> TextEncoder:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError("relative_attention_max_distance is too short for relative_attention_num_buckets")
        return self


PARTS: Mapping[str, type[Part]] = {
    "transformer": Transformer,
    "vae": Vae,
    "scheduler": Scheduler,
    "text_encoder": TextEncoder,
}
