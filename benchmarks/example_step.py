"""A training step beside that of diffusers' example, on a CPU: processor seconds, and memory above the loaded model.

    python benchmarks/example_step.py [--rounds 6] [--output benchmarks/results/example_step.json] [--page]

``Example`` takes a step as diffusers' ``examples/cogvideo/train_cogvideox_lora.py`` does: its model class, a LoRA by
``add_adapter``, autocast, gradient checkpointing, the loss by the scheduler's velocity, ``torch.optim.AdamW``. Like the
script it leaves a LoRA in bf16 where the model is, and Adam's states with it; ours are float32. The other side is this
package's lean block with attention's output kept. Weights and clip are the same, random and of no use.

Both sides are in one process and take their steps in turn, each first in half of the rounds, and the processor's
seconds are counted, not the clock's: so whatever else the machine does meets both. Memory is that of processes of
their own, one a side.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import Training, random_batch, random_tensors
from record import Record

from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.types import Batch, Bucket

LAYERS, HEADS = 4, 16
"""Of the model: 5B's JSON with so many blocks, 1024 wide."""

BUCKET = Bucket(9, 192, 256)
"""576 tokens of video, beside 226 of text."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK, ALPHA = 128, 64
RESULTS = Path(__file__).parent / "results" / "example_step.json"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MARKS = "<!-- example: written by benchmarks/example_step.py --page -->", "<!-- /example -->"


def write_model(folder: Path, layers: int, heads: int) -> Path:
    """5B's JSON with another size."""
    shutil.copytree(known_model("5b"), folder)
    path = folder / "transformer" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"num_layers": layers, "num_attention_heads": heads}), encoding="utf-8")
    return folder


class Example:
    """The example's training, one clip a step.

    Args:
        folder: of the model's JSON.
        dtype: of the model, and what autocast computes in.
        batch: of one clip.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, batch: Batch) -> None:
        from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
        from peft import LoraConfig

        self.scheduler = CogVideoXDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        config = CogVideoXTransformer3DModel.load_config(folder / "transformer")
        self.transformer = CogVideoXTransformer3DModel.from_config(config).to(dtype)
        torch.manual_seed(0)  # the weights that ``Training`` makes
        tensors = dict(random_tensors(self.transformer, dtype, torch.device("cpu")))
        self.transformer.load_state_dict(tensors)
        self.transformer.requires_grad_(False)
        self.transformer.enable_gradient_checkpointing()
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.transformer.add_adapter(
            LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=True, target_modules=targets)
        )
        self.parameters = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
        self.transformer.train()
        self.dtype, self.batch = dtype, batch

    def step(self) -> float:
        """One optimizer step; its loss."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        batch, config = self.batch, self.transformer.config
        model_input = batch.latents.transpose(1, 2).to(self.dtype)  # [B, F, C, H, W]
        noise = batch.noise.transpose(1, 2).to(self.dtype)
        frames, height, width = (model_input.shape[axis] // size for axis, size in ((1, 1), (3, 2), (4, 2)))
        base = (config.sample_width // config.patch_size, config.sample_height // config.patch_size)
        rotary = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid((height, width), *base),
            grid_size=(height, width),
            temporal_size=frames,
        )
        noisy = self.scheduler.add_noise(model_input, noise, batch.timesteps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.transformer(
                hidden_states=noisy,
                encoder_hidden_states=batch.prompt_embeds,
                timestep=batch.timesteps,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
        prediction = self.scheduler.get_velocity(output.float(), noisy, batch.timesteps)
        weights = 1 / (1 - self.scheduler.alphas_cumprod[batch.timesteps])
        weights = weights.reshape(-1, *(1,) * (prediction.ndim - 1))
        loss = (weights * (prediction - model_input) ** 2).reshape(len(model_input), -1).mean(dim=1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class Ours(Training):
    """This package's training, with a lean block that keeps attention's output. Arguments as of ``Example``."""

    def __init__(self, folder: Path, dtype: torch.dtype, batch: Batch) -> None:
        values = {
            "model": {"pretrained": str(folder), "dtype": next(name for name in DTYPES if DTYPES[name] == dtype)},
            "data": {"sources": [{"path": "clips"}], "buckets": [str(BUCKET)]},
            "method": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "train": {"steps": 1},
            "memory": {"checkpointing": "selective", "block": "lean"},
            "output_dir": "run",
        }
        super().__init__(RunConfig.from_dict(values, base=folder), folder, BUCKET, torch.device("cpu"))
        self.batch = batch


SIDES: dict[str, Any] = {"example": Example, "ours": Ours}


def batch_for(folder: Path, bucket: Bucket, dtype: torch.dtype) -> Batch:
    """The clip of both sides."""
    torch.manual_seed(1)
    return random_batch(read_spec(str(folder)), bucket, dtype, torch.device("cpu"))


def measure(folder: Path, name: str, rounds: int) -> dict[str, Any]:
    """A case: medians, and the least and most, of both sides' steps after the first of each; their ratio round by
    round; and the losses of the first step, which are those of the same weights.
    """
    dtype = DTYPES[name]
    batch = batch_for(folder, BUCKET, dtype)
    sides: dict[str, Any] = {side: make(folder, dtype, batch) for side, make in SIDES.items()}
    losses = {side: training.step() for side, training in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sorted(sides, reverse=number % 2 == 1):
            begun = time.process_time()
            sides[side].step()
            seconds[side].append(time.process_time() - begun)
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["example"], strict=True)]
    row: dict[str, Any] = {"case": name, "rounds": rounds, "load_average": round(os.getloadavg()[0], 1)}
    for title, values in ({f"{side} step, s": seconds[side] for side in sides} | {"step, ratio": ratios}).items():
        row[title] = round(statistics.median(values), 3)
        row[f"{title}, least and most"] = [round(min(values), 3), round(max(values), 3)]
    loss = losses["ours"]
    row["first losses"] = [round(losses["example"], 4), round(loss if isinstance(loss, float) else loss[0], 4)]
    return row


def peaks_mib(folder: Path, name: str, side: str) -> tuple[float, float]:
    """MiB that a step takes at most above the loaded model, with Adam's states; and above these, with the gradients."""
    dtype = DTYPES[name]
    small = write_model(folder.with_name(f"{folder.name}-small"), 1, 1)
    SIDES[side](small, dtype, batch_for(small, Bucket(1, 64, 64), dtype)).step()  # imports
    batch = batch_for(folder, BUCKET, dtype)
    training = SIDES[side](folder, dtype, batch)
    loaded = _status_mib("VmRSS")
    training.step()
    before = _status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most so far is forgotten
    training.step()
    most = _status_mib("VmHWM")
    return most - loaded, most - before


def _status_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.M)
    return int(kib) / 1024


def peaks_in_child(name: str, side: str) -> list[int]:
    """``peaks_mib`` of a process of its own, in which what is freed goes back to the system."""
    command = [sys.executable, __file__, "--peak", name, side]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [round(each) for each in json.loads(done.stdout.splitlines()[-1])]


def table(rows: list[dict[str, Any]]) -> str:
    """What the page shows."""
    lines = [
        "| | example, CPU s a step | ours | ours over the example's | example, MiB above the model | ours | ratio"
        " | example, MiB of a step | ours | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["case"]]
        for title in ("example step, s", "ours step, s", "step, ratio"):
            least, most = row[f"{title}, least and most"]
            cells.append(f"{row[title]:.2f} ({least:.2f} to {most:.2f})")
        for theirs, ours in zip(row["example peaks, MiB"], row["ours peaks, MiB"], strict=True):
            cells += [f"{theirs}", f"{ours}", f"{ours / theirs:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, keep, and write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write docs/performance.md from the kept results alone")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.page:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
        head, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        tail = rest.split(MARKS[1])[1]
        PAGE.write_text(f"{head}{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}{tail}", encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "model", LAYERS, HEADS)
        if args.peak:
            print(json.dumps(peaks_mib(folder, *args.peak)))
            return
        processor = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        record = Record(args.output, f"{processor[0]}, {os.cpu_count()} cores, 1 thread", key="case")
        for name in args.only:
            row = measure(folder, name, args.rounds)
            row |= {f"{side} peaks, MiB": peaks_in_child(name, side) for side in SIDES}
            record.add(row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
