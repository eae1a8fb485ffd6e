"""The tiny look-alikes: complete, loadable by the stock classes, and telling the same spec as the published models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.core.errors import ConfigError
from finetune.testing.tiny import VARIANTS, build_tiny, tiny_scheduler, tiny_text, tiny_transformer, tiny_vae

# position, in/out channels, temporal patch, patch bias, ofs, scaling factor, inverted, snr shift, text tokens
SPEC = {
    "2b": ("sincos", (4, 4), None, True, False, 1.15258426, False, 3.0, 16),
    "5b": ("rope", (4, 4), None, True, False, 0.7, False, 1.0, 16),
    "5b-i2v": ("rope+learned", (8, 4), None, True, False, 0.7, False, 1.0, 16),
    "1.5-5b": ("rope", (4, 4), 2, False, False, 0.7, True, 1.0, 14),
    "1.5-5b-i2v": ("rope", (8, 4), 2, False, True, 0.7, True, 1.0, 14),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {variant: build_tiny(root / variant, variant) for variant in VARIANTS}


def test_the_table_covers_every_variant() -> None:
    assert tuple(SPEC) == VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stock_pipeline_loads_it_and_samples(folders: dict[str, Path], variant: str) -> None:
    from diffusers import DiffusionPipeline
    from PIL import Image

    pipeline = DiffusionPipeline.from_pretrained(folders[variant])
    pipeline.set_progress_bar_config(disable=True)
    image_to_video = variant.endswith("i2v")
    assert type(pipeline).__name__ == ("CogVideoXImageToVideoPipeline" if image_to_video else "CogVideoXPipeline")
    condition = {"image": Image.new("RGB", (64, 64), (200, 30, 30))} if image_to_video else {}
    video = pipeline(
        prompt="a red circle moving left",
        num_frames=9,
        num_inference_steps=2,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **condition,  # and no height or width: 64x64 is native
    ).frames
    assert video.shape == (1, 9, 3, 64, 64)
    assert video.isfinite().all()
    assert video.std() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_json_tells_the_variants_apart(folders: dict[str, Path], variant: str) -> None:
    position, channels, patch_size_t, patch_bias, ofs, scaling_factor, inverted, snr_shift, tokens = SPEC[variant]
    transformer, vae, scheduler = (
        json.loads((folders[variant] / part).read_text())
        for part in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    assert transformer["use_rotary_positional_embeddings"] == position.startswith("rope")
    assert transformer["use_learned_positional_embeddings"] == position.endswith("learned")
    assert (transformer["in_channels"], transformer["out_channels"]) == channels
    assert transformer["patch_size_t"] == patch_size_t
    assert transformer["patch_bias"] == patch_bias
    assert (transformer["ofs_embed_dim"] is not None) == ofs
    assert transformer["max_text_seq_length"] == tokens
    assert (vae["scaling_factor"], vae["invert_scale_latents"]) == (scaling_factor, inverted)
    assert scheduler["snr_shift_scale"] == snr_shift
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    assert {name: scheduler[name] for name in common} == common


def test_the_vae_compresses_8x_in_space_and_4x_in_time() -> None:
    vae = tiny_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 9, 64, 48)).latent_dist.mean
        assert latents.shape == (1, 4, 3, 8, 6)
        assert vae.decode(latents).sample.shape == (1, 3, 9, 64, 48)


def test_learned_positions_fix_the_size() -> None:
    transformer = tiny_transformer("5b-i2v", frames=13, height=48, width=80)
    # 16 text tokens and (13 - 1) / 4 + 1 = 4 latent frames of 3 x 5 patches.
    assert transformer.patch_embed.pos_embedding.shape == (1, 16 + 4 * 3 * 5, 64)
    assert "patch_embed.pos_embedding" in transformer.state_dict()
    with pytest.raises(ValueError, match="different resolution"):
        transformer(torch.zeros(1, 4, 8, 8, 8), torch.zeros(1, 16, 32), torch.tensor([1]))


def test_a_seed_is_the_same_model_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (tiny_transformer(seed=seed).state_dict() for seed in (3, 3, 4))
    encoders = [tiny_text(seed=3)[1].state_dict() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])


def test_the_tokenizer_survives_saving_and_spells_what_it_does_not_know(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, T5Tokenizer

    made, _ = tiny_text()
    for tokenizer in (
        made,
        AutoTokenizer.from_pretrained(folders["5b"] / "tokenizer"),
        T5Tokenizer.from_pretrained(folders["5b"] / "tokenizer"),
    ):
        ids = tokenizer("a red zebra moving left").input_ids
        assert ids == made("a red zebra moving left").input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁red", "▁", *"zebra", "▁moving", "▁left", "</s>"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a red zebra moving left"
        assert tokenizer("").input_ids == [tokenizer.eos_token_id] == [1]
        assert tokenizer.pad_token_id == 0


def test_every_id_has_an_embedding_row() -> None:
    captions = ["ein roter Kreis", "une étoile bleue"]
    tokenizer, encoder = tiny_text(captions)
    assert len(tokenizer) == encoder.get_input_embeddings().num_embeddings
    ids = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert tokenizer.unk_token_id not in ids
    assert encoder(ids)[0].shape == (2, 16, 32)


@pytest.mark.parametrize("build", [tiny_transformer, tiny_vae, tiny_scheduler])
def test_an_unknown_variant_is_named_with_the_known_ones(build: object) -> None:
    with pytest.raises(ConfigError, match=r"'6b'[\s\S]*1\.5-5b-i2v"):
        build("6b")  # type: ignore[operator]


@pytest.mark.parametrize("size", [{"frames": 8}, {"height": 72}, {"width": 0}])
def test_sizes_that_no_cogvideox_can_have_are_refused(tmp_path: Path, size: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        build_tiny(tmp_path / "model", **size)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_it_replaces_a_model_but_no_other_folder(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", "5b")
    assert build_tiny(model, "2b") == model
    assert json.loads((model / "vae" / "config.json").read_text())["scaling_factor"] == 1.15258426

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a model"):
        build_tiny(tmp_path / "mine", "5b")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
