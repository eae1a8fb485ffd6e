"""Train the demo world's VAE and base transformer, and write them to ``finetune/assets/demo``.

    python scripts/train_demo_world.py                    # everything; about 25 minutes on 2 CPU cores
    python scripts/train_demo_world.py --keep-vae         # the transformer alone, on the VAE that is there
    python scripts/train_demo_world.py --sheets /tmp/look # also write PNG contact sheets of what it learned

The VAE sees every shape of the world in any colour, as a real VAE has seen everything. The transformer sees circles,
squares and triangles only: the ring is for the quickstart's LoRA to teach. Equal seeds on equal software and hardware
give equal weights; the checks printed at the end hold anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import encode_prompts, encode_video
from finetune.cogvideox.objective import add_noise, alpha_bar, v_mse, velocity
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.rng import generator, seed_for
from finetune.testing import demo, tiny
from finetune.testing.demo import COLOURS, KNOWN_SHAPES, MOTIONS, SHAPES, Scene

ASSETS = Path(__file__).parents[1] / "finetune" / "assets" / "demo"
LATENT_CHANNELS = 8
VAE_CLIPS = 1024
VAE_LR = 2e-3
BASE_CLIPS = 4608
BASE_LR = 1.5e-3
EMA_DECAY = 0.998


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the weights go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-steps", type=int, default=300, help="VAE steps on single frames")
    parser.add_argument("--video-steps", type=int, default=1600, help="VAE steps on whole clips")
    parser.add_argument("--base-steps", type=int, default=6000)
    parser.add_argument("--keep-vae", action="store_true", help="reuse the VAE in --out")
    parser.add_argument("--sheets", type=Path, help="a folder for PNG contact sheets")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    if not options.keep_vae:
        vae = train_vae(options.seed, options.image_steps, options.video_steps)
        ship(untrained_pipeline(vae, options.seed), options.out)
    # Read back from float16, so that a run in one go and one with --keep-vae train the same base.
    with tempfile.TemporaryDirectory() as installed:
        vae = AutoencoderKLCogVideoX.from_pretrained(
            demo.install_demo_model(Path(installed), shipped=options.out) / "vae"
        )
    pipeline = untrained_pipeline(vae, options.seed)
    train_base(pipeline, options.seed, options.base_steps)
    ship(pipeline, options.out)
    check(options.out, options.sheets)


def train_vae(seed: int, image_steps: int, video_steps: int) -> AutoencoderKLCogVideoX:
    """Reconstruction (MSE) with a slight pull to a unit Gaussian, then the scaling factor that whitens the latents.

    Single frames come first: a batch of them costs less than two clips and shows four times as many shapes.
    """
    vae = tiny.tiny_vae("5b", (8, 16, 16, 32), seed=seed, latent_channels=LATENT_CHANNELS).train()
    clips = np.stack([demo.render(any_scene(seed, "vae", index)) for index in range(VAE_CLIPS)])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    started, meter, steps = time.perf_counter(), [], image_steps + video_steps
    for step in range(steps):
        set_lr(optimizer, VAE_LR, step, steps)
        draw = np.random.default_rng(seed_for(seed, "vae", step))
        if step < image_steps:
            frame = draw.integers(demo.FRAMES)
            video = to_model(clips[draw.integers(VAE_CLIPS, size=8), frame : frame + 1])
        else:
            video = to_model(clips[draw.integers(VAE_CLIPS, size=2)])
        posterior = vae.encode(video).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        mse = torch.nn.functional.mse_loss(reconstruction, video)
        loss = mse + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.append(mse.item())
        report("vae", step, steps, started, f"PSNR {psnr(float(np.mean(meter[-100:]))):.2f} dB")
    vae.eval()
    with torch.no_grad():
        spread = torch.cat([vae.encode(part).latent_dist.mean for part in to_model(clips[:256]).split(16)]).std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    print(f"vae: scaling_factor {vae.config.scaling_factor}")
    return vae


def untrained_pipeline(vae: AutoencoderKLCogVideoX, seed: int) -> CogVideoXPipeline:
    captions = [Scene(*words).caption for words in product(SHAPES, COLOURS, MOTIONS)]
    tokenizer, text_encoder = tiny.tiny_text(captions, seed=seed)
    transformer = tiny.tiny_transformer(
        seed=seed, num_layers=4, num_attention_heads=3, attention_head_dim=32, latent_channels=LATENT_CHANNELS
    )
    return CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, tiny.tiny_scheduler())


def train_base(pipeline: CogVideoXPipeline, seed: int, steps: int, batch_size: int = 32) -> None:
    """Plain velocity MSE at uniform timesteps, a tenth of the captions dropped; keeps the averaged (EMA) weights."""
    transformer, spec = pipeline.transformer, spec_of(pipeline)
    scenes = [known_scene(seed, index) for index in range(BASE_CLIPS)]
    started = time.perf_counter()
    latents = encode(pipeline, scenes)
    print(f"base: {len(latents)} clips encoded in {time.perf_counter() - started:.0f} s, std {latents.std():.3f}")
    captions = ["", *sorted({scene.caption for scene in scenes})]  # the unconditional text is row 0
    embeds = encode_prompts(pipeline.tokenizer.backend_tokenizer, pipeline.text_encoder, captions, spec)
    row = torch.tensor([captions.index(scene.caption) for scene in scenes])
    levels = alpha_bar(spec).float()

    transformer.train()
    averaged = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=BASE_LR, betas=(0.9, 0.95), weight_decay=0.01)
    started, meter = time.perf_counter(), []
    for step in range(steps):
        set_lr(optimizer, BASE_LR, step, steps)
        draw = generator(seed, "base", step)
        chosen = torch.randint(len(latents), (batch_size,), generator=draw)
        timesteps = torch.randint(spec.num_train_timesteps, (batch_size,), generator=draw)
        eps = torch.randn(batch_size, *latents.shape[1:], generator=draw)
        kept = torch.rand(batch_size, generator=draw) >= 0.1
        x0, level = latents[chosen], levels[timesteps]
        prediction = denoise(
            transformer, spec, add_noise(x0, eps, level), embeds[row[chosen] * kept], timesteps, image_latents=None
        )
        loss = v_mse(prediction, velocity(x0, eps, level)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.append(loss.item())
        with torch.no_grad():
            for name, value in transformer.named_parameters():
                averaged[name].lerp_(value, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        report("base", step, steps, started, f"loss {np.mean(meter[-200:]):.4f}")
    transformer.load_state_dict(averaged, strict=False)  # strict would miss the buffers, which are not trained
    transformer.eval()


def spec_of(pipeline: CogVideoXPipeline) -> ModelSpec:
    """What ``pipeline`` will say of itself once it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        return read_spec(folder)


def encode(pipeline: CogVideoXPipeline, scenes: list[Scene]) -> Tensor:
    """Posterior means in model space, [N, C, F, H, W]."""
    parts = [
        np.stack([demo.render(scene) for scene in scenes[first : first + 16]]) for first in range(0, len(scenes), 16)
    ]
    means = [encode_video(pipeline.vae, torch.from_numpy(part).permute(0, 4, 1, 2, 3))[0] for part in parts]
    return torch.cat(means) * pipeline.vae.config.scaling_factor


def ship(pipeline: CogVideoXPipeline, out: Path) -> None:
    """Save the pipeline with float16 weights. The JSON goes on saying float32: installing widens the weights again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        fresh = Path(scratch) / "demo"
        pipeline.save_pretrained(fresh)
        for weights in fresh.rglob("*.safetensors"):
            save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
        # With --keep-vae, diffusers notes the temporary folder that the VAE was loaded from: no fact about it.
        config = fresh / "vae" / "config.json"
        spec = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
        config.write_text(json.dumps(spec, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(fresh, out)
    total = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"shipped {total / 2**20:.2f} MiB of weights in {out}")


def check(out: Path, sheets: Path | None) -> None:
    """Measure what was shipped: reconstruction of unseen clips, and what the base shows when asked."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline = CogVideoXPipeline.from_pretrained(demo.install_demo_model(Path(folder), shipped=out))
    pipeline.set_progress_bar_config(disable=True)
    scenes = [Scene(shape, colour, motion, 10**6) for shape, colour, motion in product(SHAPES, COLOURS, MOTIONS)]
    clips = np.stack([demo.render(scene) for scene in scenes])
    with torch.no_grad():
        rebuilt = torch.cat(
            [
                pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mean).sample
                for part in to_model(clips).split(8)
            ]
        ).clamp(-1, 1)
    errors = torch.nn.functional.mse_loss(rebuilt, to_model(clips), reduction="none").flatten(1).mean(1)
    for shape in SHAPES:
        mse = float(errors[[scene.shape == shape for scene in scenes]].mean())
        print(f"check: {shape:8} reconstructed at {psnr(mse):.1f} dB")
    seen = [demo.classify(clip) for clip in to_pixels(rebuilt)]
    matched = sum(reading.shape == scene.shape for reading, scene in zip(seen, scenes, strict=True))
    print(f"check: {matched} of {len(scenes)} reconstructions keep their shape")

    asked = [scene for scene in scenes if scene.shape in KNOWN_SHAPES]
    sampled = sample(pipeline, [scene.caption for scene in asked])
    readings = [demo.classify(clip) for clip in sampled]
    for what in ("shape", "colour", "motion"):
        right = sum(
            getattr(reading, what) == getattr(scene, what) for reading, scene in zip(readings, asked, strict=True)
        )
        print(f"check: {right} of {len(asked)} samples show the {what} asked for")
    for shape in SHAPES:
        of_shape = [clip for clip, scene in zip(sampled, asked, strict=True) if scene.shape == shape]
        if of_shape:
            print(f"check: sampled {shape:8} at distance {demo.concept_distance(of_shape, shape):.3f} from real ones")
    rings = sample(pipeline, [scene.caption for scene in scenes if scene.shape == demo.NEW_SHAPE])
    print(f"check: asked for a ring, distance {demo.concept_distance(rings):.3f}: it does not know it")
    if sheets is not None:
        sheets.mkdir(parents=True, exist_ok=True)
        write_sheet(sheets / "real.png", clips[::4])
        write_sheet(sheets / "reconstructed.png", to_pixels(rebuilt)[::4])
        write_sheet(sheets / "sampled.png", sampled[::3])
        write_sheet(sheets / "asked_for_ring.png", rings)


def sample(
    pipeline: CogVideoXPipeline, prompts: list[str], steps: int = 20, guidance_scale: float = 3.0
) -> list[demo.Frames]:
    clips = pipeline(
        prompt=prompts,
        num_frames=demo.FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=[generator(0, "sample", index) for index in range(len(prompts))],
        output_type="np",
    ).frames
    return list((clips * 255).round().astype(np.uint8))


def any_scene(seed: int, *path: int | str) -> Scene:
    draw = np.random.default_rng(seed_for(seed, *path))
    return Scene(
        str(draw.choice(SHAPES)),
        str(draw.choice(list(COLOURS))),
        str(draw.choice(list(MOTIONS))),
        int(draw.integers(2**31)),
    )


def known_scene(seed: int, index: int) -> Scene:
    words = list(product(KNOWN_SHAPES, COLOURS, MOTIONS))[index % (len(KNOWN_SHAPES) * len(COLOURS) * len(MOTIONS))]
    return Scene(*words, seed_for(seed, "base", index) % 2**31)


def to_model(clips: demo.Frames) -> Tensor:
    """uint8 [B, F, H, W, 3] -> float32 [B, 3, F, H, W] in [-1, 1]."""
    return (torch.from_numpy(clips).float() / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous()


def to_pixels(video: Tensor) -> demo.Frames:
    """The inverse of ``to_model``."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def write_sheet(path: Path, clips: list[demo.Frames]) -> None:
    """One row per clip, one column per frame."""
    from PIL import Image

    Image.fromarray(np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips], axis=0)).save(path)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Linear warm-up over 100 steps, then a cosine to zero."""
    warm = min(1.0, (step + 1) / 100)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * (1 + math.cos(math.pi * step / steps)) / 2


def psnr(mse: float) -> float:
    """In dB, for pixels in [-1, 1]."""
    return 10 * math.log10(4 / mse)


def report(stage: str, step: int, steps: int, started: float, what: str) -> None:
    if (step + 1) % 100 == 0 or step + 1 == steps:
        print(f"{stage}: step {step + 1}/{steps}, {what}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
