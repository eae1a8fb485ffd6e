"""The real trainer at full size, with random weights made on the device from the models' configurations.

Memory and speed are real, quality is not. ``make test-gpu`` prints peak GiB and s/step; with FINETUNE_GPU_RESULTS=FILE
the rows are kept as JSON. Nothing here needs decord or ``datasets``. The same path runs at tiny size on the CPU first
(``test_the_path_on_a_cpu``), so that the time on a GPU is not spent on its mistakes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from worlds import fabricate_cache, run_config

from finetune.export import export
from finetune.facts import known_model, read_facts
from finetune.trainers.loop import train

LORA = {"kind": "lora", "rank": 128, "alpha": 64}
FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, object]]]:
    """Rows to print at the end and, on request, to keep."""
    rows: list[dict[str, object]] = []
    yield rows
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if target := os.environ.get("FINETUNE_GPU_RESULTS"):
        import accelerate
        import diffusers
        import peft
        import transformers

        about = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, peft, accelerate)},
        }
        Path(target).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def random_model(variant: str, folder: Path, device: torch.device) -> Path:
    """A folder with a full-size transformer of random bf16 weights, and the other components' configurations."""
    from diffusers import CogVideoXTransformer3DModel

    shutil.copytree(known_model(variant), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = CogVideoXTransformer3DModel.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def drive(model: Path, output: Path, bucket: str, method: dict[str, object]) -> dict[str, object]:
    """Train two steps, resume for two more, export; what it took."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def config(steps: int):
        return run_config(
            model,
            output / "no-videos-here",
            output / "run",
            data={"sources": [{"path": str(output / "no-videos-here")}], "buckets": [bucket]},
            cache={"mode": "require"},
            method=method,
            optimizer={"kind": "adamw8bit", "lr": 1e-4},
            train={"steps": steps},
        )

    fabricate_cache(config(2))
    first = train(config(2))
    assert first.step == 2
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    second = train(config(5))
    assert second.step == 5
    torch.cuda.empty_cache() if torch.cuda.is_available() else None
    begun = time.perf_counter()
    exported = export(output / "run", output / "export")
    assert exported.max_abs_diff <= exported.tolerance
    return {
        "peak_gib": second.peak_gib,
        "s_per_step": second.s_per_step or 0.0,
        "export_s": time.perf_counter() - begun,
        "export_max_abs_diff": exported.max_abs_diff,
    }


@pytest.mark.parametrize("method", [LORA | {"rank": 4}, FULL], ids=["lora", "full"])
def test_the_path_on_a_cpu(tiny_model, tmp_path, method):
    row = drive(tiny_model("5b-i2v"), tmp_path, "9x64x64", method)
    assert row["peak_gib"] > 0


def test_training_from_a_complete_cache_imports_no_decoder(tiny_model, tmp_path):
    config = run_config(
        tiny_model(),
        tmp_path / "no-videos-here",
        tmp_path / "run",
        cache={"mode": "require"},
        tracking={"kind": "tensorboard"},
        train={"steps": 1},
    )
    fabricate_cache(config)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    script = f"""
import sys
for name in ("decord", "datasets", "av", "imageio", "imageio_ffmpeg"):
    sys.modules[name] = None  # as if it were not installed
from finetune import load_config, train
try:
    import decord
except ModuleNotFoundError:
    print("blocked")
print("steps", train(load_config({str(tmp_path / "run.yaml")!r})).step)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "blocked" in finished.stdout and "steps 1" in finished.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant,method",
    [("2b", LORA), ("5b", LORA), ("5b-i2v", LORA), ("2b", FULL)],
    ids=["2b-lora", "5b-lora", "5b-i2v-lora", "2b-full"],
)
def test_full_size(tmp_path, results, variant, method):
    model = random_model(variant, tmp_path / "model", torch.device("cuda"))
    try:
        row = drive(model, tmp_path, "49x480x720", method)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)  # tens of GB each
    results.append({"case": f"{variant} {method['kind']} 49x480x720"} | row)
    assert row["peak_gib"] < 80


@pytest.mark.gpu
def test_encoders_at_full_size(results):
    """One 49x480x720 clip through the VAE, untiled, and one caption through T5 v1.1 XXL."""
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    from finetune.cogvideox import encode_prompts, encode_video
    from finetune.tiny import tiny_text

    folder = known_model("5b")
    facts = read_facts(str(folder))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            vae = AutoencoderKLCogVideoX.from_config(json.loads((folder / "vae" / "config.json").read_text())).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    pixels = torch.randint(0, 256, (1, 3, 49, 480, 720), dtype=torch.uint8)

    def timed(name, work):
        work()  # warm-up
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        row = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "s": time.perf_counter() - begun}
        results.append({"case": name} | row)
        return result

    with torch.no_grad():
        mean, std = timed("vae encode 49x480x720", lambda: encode_video(vae, pixels))
    assert mean.shape == std.shape == (1, 16, 13, 60, 90)
    vae.cpu()
    torch.cuda.empty_cache()

    config = T5Config(**json.loads((folder / "text_encoder" / "config.json").read_text()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            encoder = T5EncoderModel(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer, _ = tiny_text()
    with torch.no_grad():
        embeds = timed("t5 encode 1 caption", lambda: encode_prompts(tokenizer, encoder, ["a red circle"], facts))
    assert embeds.shape == (1, 226, 4096)
