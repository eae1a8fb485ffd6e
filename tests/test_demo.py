"""The demo world: clips that are what they say, a measure that tells shapes apart, and a base model that learned."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.core.errors import ConfigError, DataError
from finetune.testing import demo
from finetune.testing.demo import COLOURS, MOTIONS, NEW_SHAPE, SHAPES, Scene

UNSEEN_SEED = 2_000_000_011
"""The training script draws its scenes from other addresses, so these clips are new to the models."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.install_demo_model(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# ---- clips


def test_a_scene_renders_to_the_same_pixels_every_time_and_its_seed_moves_it() -> None:
    scene = Scene("circle", "red", "left", seed=1)
    clip = demo.render(scene)
    assert (clip.dtype, clip.shape) == (np.uint8, (9, 64, 64, 3))
    assert np.array_equal(clip, demo.render(scene))
    assert not np.array_equal(clip, demo.render(Scene("circle", "red", "left", seed=2)))
    assert scene.caption == "a red circle moving left"


@pytest.mark.parametrize(
    "scene", [Scene("hexagon", "red", "left"), Scene("ring", "mauve", "left"), Scene("ring", "red", "in")]
)
def test_a_word_the_world_lacks_is_refused(scene: Scene) -> None:
    with pytest.raises(DataError, match=r"has no '(hexagon|mauve|in)'"):
        demo.render(scene)


def test_the_lesson_is_a_dozen_rings_with_replay_and_keeps_the_held_out_ones_out() -> None:
    lesson, held_out = demo.lesson(), demo.held_out()
    assert len({scene.caption for scene in lesson if scene.shape == NEW_SHAPE}) == 12
    assert {(scene.shape, scene.colour) for scene in lesson} == set(product(SHAPES, COLOURS))
    captions = {scene.caption for scene in lesson}
    assert len(set(lesson)) == len(lesson) == 4 * 24
    assert len(held_out) == 4
    assert captions.isdisjoint(scene.caption for scene in held_out)


def test_written_clips_are_h264_with_captions_and_writing_again_changes_no_byte(tmp_path: Path) -> None:
    import av

    scenes = [*demo.lesson()[:3], *demo.lesson()[-2:]]
    metadata = demo.write_clips(tmp_path, scenes)
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [scene.caption for scene in scenes]
    files = [tmp_path / row["file_name"] for row in rows]
    before = [path.read_bytes() for path in files]
    for path, scene in zip(files, scenes, strict=True):
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == 8
            clip = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert np.abs(clip.astype(int) - demo.render(scene)).mean() < 6
        assert demo.classify(clip).shape == scene.shape
    demo.write_clips(tmp_path, scenes)
    assert [path.read_bytes() for path in files] == before


def test_no_scenes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no demo clips"):
        demo.write_clips(tmp_path, [])


# ---- the measure


def test_classify_reads_every_scene_of_the_world() -> None:
    for shape, (colour, motion) in product(SHAPES, zip(COLOURS, MOTIONS, strict=True)):
        reading = demo.classify(demo.render(Scene(shape, colour, motion, seed=UNSEEN_SEED)))
        assert (reading.shape, reading.colour, reading.motion) == (shape, colour, motion)
        assert reading.distances[shape] < 0.05
        assert min(reading.distances[other] for other in SHAPES if other != shape) > 0.1


def test_classify_sees_nothing_in_noise_and_in_an_empty_clip() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    for clip in (noise, np.full_like(noise, 60)):
        reading = demo.classify(clip)
        assert reading.shape is None
        assert min(reading.distances.values()) > 0.9


def test_concept_distance_tells_a_ring_from_a_circle() -> None:
    rings, circles = (
        [demo.render(Scene(shape, colour, "up", seed=UNSEEN_SEED)) for colour in COLOURS]
        for shape in ("ring", "circle")
    )
    assert demo.concept_distance(rings) < 0.05
    assert demo.concept_distance(circles) > 0.2
    assert demo.concept_distance(circles, "circle") < 0.05


@pytest.mark.parametrize("shape", [(9, 32, 32, 3), (1, 64, 64, 3), (9, 3, 64, 64)])
def test_classify_refuses_what_is_no_demo_clip(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="a demo clip is"):
        demo.classify(np.zeros(shape, np.uint8))


# ---- the model


def test_the_shipped_weights_are_small_and_installed_as_float32(folder: Path) -> None:
    from importlib.resources import files

    shipped = Path(str(files("finetune") / "assets" / "demo"))
    weights = sorted(path.relative_to(shipped) for path in shipped.rglob("*.safetensors"))
    assert len(weights) == 3  # VAE, T5, transformer
    assert sum((shipped / path).stat().st_size for path in weights) < 3 * 2**20
    # Neither a configuration nor anything else names the machine that the weights were trained on.
    assert not [path for path in shipped.rglob("*.json") if "_name_or_path" in path.read_text()]
    for path in weights:
        ours, theirs = load_file(folder / path), load_file(shipped / path)
        assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
        assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)


def test_installing_replaces_a_model_but_no_other_folder(folder: Path, tmp_path: Path) -> None:
    assert demo.install_demo_model(folder) == folder
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not a model"):
        demo.install_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_vae_reconstructs_unseen_clips(pipeline: Any) -> None:
    scenes = [
        Scene(shape, colour, motion, UNSEEN_SEED)
        for shape, (colour, motion) in product(SHAPES, zip(COLOURS, MOTIONS, strict=True))
    ]
    clips = np.stack([demo.render(scene) for scene in scenes])
    video = (torch.from_numpy(clips).float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        latents = pipeline.vae.encode(video).latent_dist.mean
        rebuilt = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    errors = (rebuilt - video).square()
    assert 10 * torch.log10(4 / errors.mean()) >= 25
    assert (10 * torch.log10(4 / errors.flatten(1).mean(1))).min() >= 22
    # Diffusion starts from unit noise, so the scaled latents should have about unit variance.
    assert (latents * pipeline.vae.config.scaling_factor).std() == pytest.approx(1, abs=0.1)


def test_the_base_shows_the_known_shapes_when_asked_and_no_ring(pipeline: Any) -> None:
    motions = list(MOTIONS)
    asked = [
        Scene(shape, colour, motions[(row + column) % 4])
        for (row, shape), (column, colour) in product(enumerate(SHAPES), enumerate(COLOURS))
    ]
    frames = pipeline(
        prompt=[scene.caption for scene in asked],
        num_frames=demo.FRAMES,
        num_inference_steps=25,
        guidance_scale=3.0,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=[torch.Generator().manual_seed(index) for index in range(len(asked))],
        output_type="np",
    ).frames
    readings = [demo.classify((clip * 255).round().astype(np.uint8)) for clip in frames]
    known = [pair for pair in zip(asked, readings, strict=True) if pair[0].shape != NEW_SHAPE]
    # Colours and motions it has learnt; of the shapes most, and chance would be one in four.
    assert all((reading.colour, reading.motion) == (scene.colour, scene.motion) for scene, reading in known)
    assert sum(reading.shape == scene.shape for scene, reading in known) >= 0.6 * len(known)
    assert all(reading.shape != NEW_SHAPE for reading in readings)
