"""A tiny but complete CogVideoX of any variant, made on the spot with random weights.

The folders are ordinary diffusers pipelines: the stock classes load them, and every fact that tells the variants apart
(position embedding, temporal patch, scaling, text length, scheduler shift) stands in their JSON as it does in the
published checkpoints. Only the widths are small. Tests run on them, and so does a first try of one's own configuration.

Leaf module: it knows diffusers' and transformers' constructors and nothing else of this package's upper layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.core.errors import ConfigError
from finetune.core.files import publish_dir

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5EncoderModel, T5Tokenizer


VAE_SPATIAL = 8
"""Pixels per latent cell, each way: three halvings, as in every CogVideoX."""

VAE_TEMPORAL = 4
"""Frames per latent frame, after the first."""

TIME_EMBED_DIM = 64

TEXT_DIM = 32

DEFAULT_CAPTIONS = (
    "a red circle moving left",
    "a blue square moving right",
    "a green triangle moving up",
    "a yellow ring moving down",
)


@dataclass(frozen=True)
class _Look:
    """What tells one variant from another, in the checkpoints' own terms."""

    rotary: bool = True
    learned_positions: bool = False
    image_to_video: bool = False
    patch_size_t: int | None = None
    ofs: bool = False
    scaling_factor: float = 0.7
    invert_scale_latents: bool = False
    snr_shift_scale: float = 1.0
    ddim: bool = False
    max_text_seq_length: int = 16


_LOOKS = {
    "2b": _Look(rotary=False, scaling_factor=1.15258426, snr_shift_scale=3.0, ddim=True),
    "5b": _Look(),
    "5b-i2v": _Look(learned_positions=True, image_to_video=True),
    # 226 against 224 tokens in the published models; two fewer here too, so that mixing the generations fails.
    "1.5-5b": _Look(patch_size_t=2, invert_scale_latents=True, max_text_seq_length=14),
    "1.5-5b-i2v": _Look(
        patch_size_t=2, invert_scale_latents=True, max_text_seq_length=14, image_to_video=True, ofs=True
    ),
}

VARIANTS: tuple[str, ...] = tuple(_LOOKS)
"""``2b``, ``5b``, ``5b-i2v``, ``1.5-5b``, ``1.5-5b-i2v``."""


@dataclass(frozen=True)
class TinySizes:
    """Widths and native size of a tiny transformer.

    Raises:
        ConfigError: for sizes that no CogVideoX can have.
    """

    num_layers: int = 2
    num_attention_heads: int = 4
    attention_head_dim: int = 16
    """A multiple of 16: the three axes of RoPE share it 1:3:3 in even parts."""
    latent_channels: int = 4
    text_embed_dim: int = TEXT_DIM
    time_embed_dim: int = TIME_EMBED_DIM
    frames: int = 9
    """Pixel frames, 4N+1."""
    height: int = 64
    """Pixels, a multiple of 16, like ``width``."""
    width: int = 64

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % VAE_TEMPORAL != 1:
            raise ConfigError(f"the VAE takes 4N+1 frames, not {self.frames}", fix="give 1, 5, 9, 13, ...")
        cell = 2 * VAE_SPATIAL
        if min(self.height, self.width) < cell or self.height % cell or self.width % cell:
            raise ConfigError(
                f"{self.height}x{self.width} pixels do not divide into patches",
                fix=f"give a height and width in multiples of {cell}",
            )


def build_tiny(
    folder: Path, variant: str = "5b", *, seed: int = 0, captions: Sequence[str] = DEFAULT_CAPTIONS, **sizes: int
) -> Path:
    """Save a tiny look-alike of ``variant`` as a diffusers pipeline folder; takes well under two seconds on a CPU.

    Args:
        folder: where to write; an earlier model of this function is replaced.
        variant: one of ``VARIANTS``.
        seed: of the random weights; torch's global generator is left as it was.
        captions: what the tokenizer learns its words from; other words fall back to letters.
        sizes: fields of ``TinySizes``.

    Returns:
        ``folder``.

    Raises:
        ConfigError: for an unknown variant, sizes that no CogVideoX can have, or a folder that holds something else.
    """
    look = _look(variant)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ConfigError(
            "the folder for the tiny model holds files that are not a model",
            where=str(folder),
            fix="name a new or empty folder",
        )
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    tokenizer, text_encoder = tiny_text(captions, seed=seed)
    pipeline_class = CogVideoXImageToVideoPipeline if look.image_to_video else CogVideoXPipeline
    pipeline = pipeline_class(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(variant, seed=seed, **sizes),
        transformer=tiny_transformer(variant, seed=seed, **sizes),
        scheduler=tiny_scheduler(variant),
    )
    publish_dir(folder, lambda partial: pipeline.save_pretrained(str(partial)))
    return folder


def tiny_transformer(variant: str = "5b", *, seed: int = 0, **sizes: int) -> CogVideoXTransformer3DModel:
    """A tiny transformer of ``variant``; ``sizes`` are fields of ``TinySizes``.

    Raises:
        ConfigError: for an unknown variant or sizes that no CogVideoX can have.
    """
    look, size = _look(variant), TinySizes(**sizes)
    from diffusers import CogVideoXTransformer3DModel

    with _seeded(seed):
        return CogVideoXTransformer3DModel(
            num_attention_heads=size.num_attention_heads,
            attention_head_dim=size.attention_head_dim,
            in_channels=2 * size.latent_channels if look.image_to_video else size.latent_channels,
            out_channels=size.latent_channels,
            time_embed_dim=size.time_embed_dim,
            # It is added to the time embedding, so it has no width of its own.
            ofs_embed_dim=size.time_embed_dim if look.ofs else None,
            text_embed_dim=size.text_embed_dim,
            num_layers=size.num_layers,
            sample_height=size.height // VAE_SPATIAL,
            sample_width=size.width // VAE_SPATIAL,
            # Pixel frames, in spite of the two sizes above: diffusers divides them by the compression itself.
            sample_frames=size.frames,
            patch_size=2,
            patch_size_t=look.patch_size_t,
            patch_bias=look.patch_size_t is None,
            temporal_compression_ratio=VAE_TEMPORAL,
            max_text_seq_length=look.max_text_seq_length,
            use_rotary_positional_embeddings=look.rotary,
            use_learned_positional_embeddings=look.learned_positions,
        ).eval()


def tiny_vae(
    variant: str = "5b", block_out_channels: Sequence[int] = (8, 8, 8, 8), /, *, seed: int = 0, **sizes: int
) -> AutoencoderKLCogVideoX:
    """A tiny causal video VAE: 8x smaller in space, 4x in time, like the published one.

    ``sizes`` are fields of ``TinySizes``.

    Raises:
        ConfigError: for an unknown variant, sizes that no CogVideoX can have, or another number of blocks than four,
            which would change the 8x.
    """
    look, size = _look(variant), TinySizes(**sizes)
    if len(block_out_channels) != 4:
        raise ConfigError(f"a CogVideoX VAE has 4 blocks, not {len(block_out_channels)}", where="block_out_channels")
    from diffusers import AutoencoderKLCogVideoX

    with _seeded(seed):
        return AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=tuple(block_out_channels),
            latent_channels=size.latent_channels,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=VAE_TEMPORAL,
            sample_height=size.height,
            sample_width=size.width,
            scaling_factor=look.scaling_factor,
            invert_scale_latents=look.invert_scale_latents,
        ).eval()


def tiny_text(
    captions: Sequence[str] = DEFAULT_CAPTIONS, *, seed: int = 0, d_model: int = TEXT_DIM, num_layers: int = 2
) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 tokenizer that knows the words of ``captions``, and a random T5 v1.1 encoder for it.

    The vocabulary is counted, not trained: equal captions give an equal tokenizer on every machine.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = _vocabulary(captions)
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=226)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=d_model,
        d_kv=8,
        d_ff=2 * d_model,
        num_layers=num_layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",  # v1.1
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    with _seeded(seed):
        return tokenizer, T5EncoderModel(config).eval()


def tiny_scheduler(variant: str = "5b") -> CogVideoXDPMScheduler | CogVideoXDDIMScheduler:
    """The variant's own scheduler: nothing in it is small.

    Raises:
        ConfigError: for an unknown variant.
    """
    look = _look(variant)
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    scheduler_class = CogVideoXDDIMScheduler if look.ddim else CogVideoXDPMScheduler
    return scheduler_class(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        snr_shift_scale=look.snr_shift_scale,
    )


def _look(variant: str) -> _Look:
    if variant not in _LOOKS:
        raise ConfigError(f"no CogVideoX variant is called {variant!r}", fix=f"choose one of {', '.join(VARIANTS)}")
    return _LOOKS[variant]


def _vocabulary(captions: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces and log-probabilities of a Unigram model: T5's three special pieces, the captions' words, then letters."""
    words = Counter(word for caption in captions for word in caption.split())
    total = max(1, sum(words.values()))
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # Sorted, so that the order of the captions decides nothing.
    vocabulary += [("▁" + word, math.log(count / total)) for word, count in sorted(words.items())]
    # Any other word is spelled; a spelled word scores far below a whole one, so known words stay whole.
    letters = sorted({"▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,'-", *(letter for word in words for letter in word)})
    known = {piece for piece, _ in vocabulary}
    return vocabulary + [(letter, -20.0) for letter in letters if letter not in known]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights from ``seed``; the caller's generator goes on as if nothing had been drawn."""
    # Constructors draw on the CPU, so no CUDA generator needs saving.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
