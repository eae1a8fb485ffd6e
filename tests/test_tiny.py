"""The tiny look-alikes: complete, loadable by the stock classes, and differing as the published models do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, T5Tokenizer

from finetune.core.errors import ConfigError
from finetune.testing.tiny import VARIANTS, build_tiny, tiny_scheduler, tiny_text, tiny_transformer, tiny_vae
from tests.stock_pipeline import load_pipeline

# position, in/out channels, temporal patch, patch bias, ofs, scaling factor, inverted, snr shift, text tokens
SPEC = {
    "2b": ("sincos", (4, 4), None, True, False, 1.15258426, False, 3.0, 16),
    "5b": ("rope", (4, 4), None, True, False, 0.7, False, 1.0, 16),
    "5b-i2v": ("rope+learned", (8, 4), None, True, False, 0.7, False, 1.0, 16),
    "1.5-5b": ("rope", (4, 4), 2, False, False, 0.7, True, 1.0, 14),
    "1.5-5b-i2v": ("rope", (8, 4), 2, False, True, 0.7, True, 1.0, 14),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stock_pipeline_loads_it_and_samples(tiny_model, variant):
    pipeline = load_pipeline(str(tiny_model(variant)))
    pipeline.set_progress_bar_config(disable=True)
    image_to_video = variant.endswith("i2v")
    assert type(pipeline).__name__ == ("CogVideoXImageToVideoPipeline" if image_to_video else "CogVideoXPipeline")
    condition = {"image": Image.new("RGB", (64, 64), (200, 30, 30))} if image_to_video else {}
    video = pipeline(
        prompt="a red circle moving left",
        num_frames=9,
        num_inference_steps=1,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **condition,  # and no height or width: 64x64 is native
    ).frames
    assert video.shape == (1, 9, 3, 64, 64) and video.isfinite().all() and video.std() > 0


def test_its_json_tells_the_variants_apart(tiny_model):
    assert tuple(SPEC) == VARIANTS
    for variant, expected in SPEC.items():
        files = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
        transformer, vae, scheduler = (json.loads((tiny_model(variant) / file).read_text()) for file in files)
        position = "rope" if transformer["use_rotary_positional_embeddings"] else "sincos"
        stated = (
            position + ("+learned" if transformer["use_learned_positional_embeddings"] else ""),
            (transformer["in_channels"], transformer["out_channels"]),
            transformer["patch_size_t"],
            transformer["patch_bias"],
            transformer["ofs_embed_dim"] is not None,
            vae["scaling_factor"],
            vae["invert_scale_latents"],
            scheduler["snr_shift_scale"],
            transformer["max_text_seq_length"],
        )
        assert stated == expected
        common = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        assert common.items() <= scheduler.items() and scheduler["num_train_timesteps"] == 1000


def test_the_vae_compresses_8x_in_space_and_4x_in_time():
    vae = tiny_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 9, 64, 48)).latent_dist.mean
        assert latents.shape == (1, 4, 3, 8, 6)
        assert vae.decode(latents).sample.shape == (1, 3, 9, 64, 48)


def test_a_seed_is_the_same_model_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (tiny_transformer(seed=seed).state_dict() for seed in (3, 3, 4))
    encoders = [tiny_text(seed=3)[1].state_dict() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])


def test_the_tokenizer_survives_saving_and_spells_what_it_does_not_know(tiny_model):
    made, encoder = tiny_text()
    assert len(made) == encoder.get_input_embeddings().num_embeddings
    for tokenizer in (made, *(c.from_pretrained(tiny_model("5b") / "tokenizer") for c in (AutoTokenizer, T5Tokenizer))):
        ids = tokenizer("a red zebra moving left").input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁red", "▁", *"zebra", "▁moving", "▁left", "</s>"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a red zebra moving left"
        assert tokenizer("").input_ids == [tokenizer.eos_token_id] == [1] and tokenizer.pad_token_id == 0


def test_what_cannot_be_built_is_refused(tmp_path):
    for build in (tiny_transformer, tiny_vae, tiny_scheduler):
        with pytest.raises(ConfigError, match=r"'6b'[\s\S]*1\.5-5b-i2v"):
            build("6b")
    for size in ({"frames": 8}, {"height": 72}, {"width": 0}):
        with pytest.raises(ConfigError):
            build_tiny(tmp_path / "model", **size)
    assert not list(tmp_path.iterdir())


def test_it_replaces_a_model_but_no_other_folder(tmp_path):
    model = build_tiny(tmp_path / "model", "5b")
    assert build_tiny(model, "2b") == model
    assert json.loads((model / "vae" / "config.json").read_text())["scaling_factor"] == 1.15258426
    thesis = Path(tmp_path / "other" / "thesis.txt")
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ConfigError, match="not a model"):
        build_tiny(thesis.parent, "5b")
    assert thesis.read_text() == "years of work"
