#!/usr/bin/env python3
"""Every memory recipe and technique at full size on a GPU: measured peak and seconds per step against the planner's,
where a step's time goes, attention's kernels, and matrix products.

Models are made from their configurations with random weights, through the code that loads real ones: memory and speed
are real, quality is not. All of it takes longer than ten minutes: ``--only`` measures a piece (``PIECES``), and pieces
fill one file, `benchmarks/results/gpu_memory_<device>.json`, which is written after each row. Nothing is begun after
nine minutes; a table is printed last. With ``--tiny`` the same path runs on tiny models on a CPU, so that the time on a
GPU is not spent on its mistakes. `benchmarks/README.md` lists what is needed; PyAV and `datasets` are not.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.core.gpu import grow_segments

grow_segments()

import torch
from cases import cases
from parts import (
    ATTENTION,
    PRODUCTS,
    TOY_ATTENTION,
    TOY_PRODUCTS,
    Measurement,
    Row,
    attention_kernels,
    breakdown,
    products,
)
from record import Record
from torch import Tensor, nn

from finetune.caching.encode import release_memory
from finetune.cli.init import RECIPES
from finetune.cogvideox.denoise import ofs_of
from finetune.cogvideox.load import empty_transformer, place
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.objective import alpha_bar, velocity_losses
from finetune.cogvideox.spec import ModelSpec, read_spec, spec_of
from finetune.config.schema import RunConfig, load_config
from finetune.core.distributed import require_cudnn
from finetune.core.types import GIB, Batch, Bucket
from finetune.memory.adaln_offload import announced, prepare
from finetune.memory.quantized_linear import placement
from finetune.memory.runner import assert_recompute, undo
from finetune.optim.optimizers import begin
from finetune.parallel.gradient_release import single_process_strategy
from finetune.planner.cost_model import OF_ANOTHER, device_name, rates_of
from finetune.planner.estimate import longest_bucket
from finetune.planner.fake_run import OneProcess
from finetune.planner.step_time import step_cost

PLANS = ROOT / "benchmarks" / "results" / "memory_plans.json"
STOCK = ("cogvideox-2b-lora.yaml", "cogvideox-5b-lora.yaml")
"""Configurations without any technique but gradient checkpointing, for comparison."""
PIECES = {
    "2b": "^cogvideox-2b|^2B",
    "5b-lora": "^cogvideox-5b-lora",
    "5b-lora-techniques": "^5B LoRA",
    "5b-full": "^cogvideox-5b-full",
    "5b-full-techniques": "^5B full",
    "1.5": "^cogvideox-1.5",
    "attention": "^attention",
    "products": "^product",
    "breakdown": "^breakdown",
}
"""What ``--only`` takes beside regular expressions; each piece is meant to fit ten minutes of an H100."""
TAKEN_APART = ("cogvideox-5b-lora.yaml", "cogvideox-5b-lora-24gb.yaml", "cogvideox-5b-full-32gb.yaml")
"""Configurations of which one step is profiled."""


def random_tensors(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors as a file would give them, one at a time: norms scale by one, everything else is noise."""
    noise = torch.randn(1 << 22, device=device).mul_(0.02).to(dtype)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if re.search(r"norm\w*\.weight$", name):
            yield name, torch.ones(tensor.shape, dtype=dtype, device=device)
        else:
            repeats = -(-tensor.numel() // noise.numel())
            yield name, noise.repeat(repeats)[: tensor.numel()].view(tensor.shape)


def build(config: RunConfig, folder: Path, device: torch.device) -> nn.Module:
    """The transformer of a run with random weights, as ``trainers.assemble`` puts it together."""
    dtype = config.model.torch_dtype()
    start = torch.device("cpu") if config.memory.streams else device
    module = empty_transformer(folder, dtype=dtype, device="meta")
    place(module, random_tensors(module, dtype, start), start, placement(config.memory.base))
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # computed tables, which no file holds
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=start)
    config.method.apply(module, seed=config.train.seed)
    config.memory.apply(module, device)
    return module.train()


def random_batch(spec: ModelSpec, bucket: Bucket, dtype: torch.dtype, device: torch.device) -> Batch:
    """One clip of a bucket, as the loader gives it."""
    channels, frames, height, width = spec.latent_shape(bucket)
    shape = (1, channels, frames + spec.front_padding(frames), height, width)
    image = torch.randn(1, channels, 1, height, width, device=device) if spec.image_to_video else None
    return Batch(
        latents=torch.randn(shape, device=device),
        noise=torch.randn(shape, device=device),
        timesteps=torch.full((1,), 500, device=device),
        timesteps_on_host=(500,),
        prompt_embeds=torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, dtype=dtype, device=device),
        image_latents=image,
        slots=(0,),
        clips=("random",),
    )


class Training:
    """A run of random weights and one random clip, step by step.

    Args:
        config: of the run.
        folder: of the model's configurations.
        bucket: of the clip.
        device: where it trains.
    """

    def __init__(self, config: RunConfig, folder: Path, bucket: Bucket, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config, self.spec = config, read_spec(str(folder))
        self.module = build(config, folder, device)
        self.strategy = single_process_strategy(
            OneProcess,
            self.module,
            config.method.trainable(self.module),
            memory=config.memory,
            device=device,
            max_norm=config.train.max_grad_norm,
        )
        self.strategy.start(config.optimizer, None)
        self.schedule = alpha_bar(self.spec).float().to(device)
        self.batch = random_batch(self.spec, bucket, config.model.torch_dtype(), device)
        self.steps = 0

    def step(self) -> tuple[float, float]:
        """One optimizer step, as the loop takes it; loss and gradient norm."""
        begin(self.strategy.optimizer, seed=0, step=self.steps)
        conditions = self.batch.timesteps_on_host, ofs_of(self.spec)
        prepare(self.module, *conditions)
        with self.strategy.micro_batch(last=True), announced(self.module, *conditions):
            loss = velocity_losses(self.strategy.model, self.spec, self.schedule, self.batch).sum()
            self.strategy.backward(loss)
        norm = float(self.strategy.clip(self.config.train.max_grad_norm or math.inf))
        self.strategy.step()
        self.steps += 1
        return float(loss.detach()), norm


def measure(config: RunConfig, folder: Path, bucket: Bucket, device: torch.device, steps: int) -> dict[str, Any]:
    """Peak and seconds of optimizer steps after the first, in which the optimizer makes its states."""
    training = Training(config, folder, bucket, device)
    loaded = allocated(device)
    durations, losses, norm = [], [], math.nan
    for step in range(steps + 1):
        if step == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronise(device)
        begun = time.perf_counter()
        with assert_recompute(training.module, config.memory):
            loss, norm = training.step()
        synchronise(device)
        durations.append(time.perf_counter() - begun)
        losses.append(loss)
    found = {
        "s_per_step": round(statistics.median(durations[1:]), 4),
        "s_first_step": round(durations[0], 3),
        "loss": [round(value, 4) for value in losses],
        "grad_norm": round(norm, 6),
    }
    if not all(map(math.isfinite, (*losses, norm))):
        raise RuntimeError(f"losses {losses}, gradient norm {norm}")
    if device.type == "cuda":
        found |= {
            "peak_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 3),
            "loaded_gib": round(loaded / GIB, 3),
        }
    undo(training.module)
    return found


def take_apart(config: RunConfig, folder: Path, bucket: Bucket, device: torch.device) -> dict[str, Any]:
    """Where one step's time goes, after one that is not looked at."""
    training = Training(config, folder, bucket, device)
    training.step()
    found = breakdown(training.step, device)
    undo(training.module)
    return found


def predicted_seconds(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What the planner says that a step takes, and its parts; nothing of a card that it does not know."""
    rates = rates_of(device_name(device))
    if rates.source == OF_ANOTHER:
        return {}
    step = step_cost(config, spec_of(config.model, shipped=True), config.memory, rates)
    parts = {each.name: {k: round(v, 4) for k, v in asdict(each).items() if k != "name"} for each in step.passes}
    return {"predicted_s": round(step.step_s, 3), "predicted_parts": parts, "rates": rates.source}


def allocated(device: torch.device) -> int:
    """Bytes on a GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def synchronise(device: torch.device) -> None:
    """Wait for what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def runs() -> Iterator[tuple[str, RunConfig]]:
    """What is measured, by name: the stock configurations, every recipe, and techniques that no recipe has."""
    for name in (*STOCK, *(recipe.name for recipe in RECIPES)):
        yield name, load_config(ROOT / "configs" / name)
    yield from cases()


def predictions() -> dict[str, float]:
    """GiB that the planner gives for each of ``runs``, as far as `benchmarks/memory.py` has asked it."""
    if not PLANS.is_file():
        return {}
    found = json.loads(PLANS.read_text(encoding="utf-8"))
    return {
        **{name: plan["training_gib"] for name, plan in found["plans"].items()},
        **found["examples"],
        **found.get("techniques", {}),
    }


def tiny_folder(target: Path, variant: str) -> Path:
    """A folder with a tiny model's configurations."""
    from finetune.testing.tiny import build_tiny

    return build_tiny(target / variant, variant=variant)


def main() -> int:
    """Measure, print, write; 1 if anything failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that are timed, after one that is not")
    parser.add_argument(
        "--only",
        default="",
        help=f"a piece ({', '.join(PIECES)}), or a regular expression that a configuration's name must contain",
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no further configuration after so long")
    parser.add_argument("--output", type=Path, help="the JSON file; by default beside the other results")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: does the path run?")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("there is no CUDA device; --tiny runs the same path on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu") if args.tiny else torch.device("cuda", 0)
    require_cudnn(device)
    name_of_device = "cpu, tiny models" if args.tiny else torch.cuda.get_device_name(device)
    slug = re.sub(r"\W+", "_", name_of_device.lower()).strip("_")
    output = args.output or (None if args.tiny else ROOT / "benchmarks" / "results" / f"gpu_memory_{slug}.json")
    record = Record(output, name_of_device, key="config")
    print(name_of_device, ", ".join(f"{name} {version}" for name, version in record.about["versions"].items()))
    begun, rows, failed = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, work in measurements(args, device, Path(scratch)):
            if not re.search(PIECES.get(args.only, args.only), name):
                continue
            row: Row = {"config": name}
            rows.append(row)
            if time.monotonic() - begun > args.seconds:
                row["skipped"] = f"{args.seconds:g} s were over"
                continue  # an earlier row of it is better than none
            try:
                row |= work()
            except Exception as error:  # the others are worth measuring
                failed += 1
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                traceback.print_exc()
            release_memory()  # the page-locked too: the next row is another state, with buffers of other sizes
            record.add(row)
            print(line(row), flush=True)
    print(f"\n{name_of_device}, {time.monotonic() - begun:.0f} s")
    print("\n".join(line(row) for row in rows))
    return 1 if failed else 0


def measurements(args: argparse.Namespace, device: torch.device, scratch: Path) -> Iterator[Measurement]:
    """Everything there is to measure, by name."""
    predicted = predictions()

    def place(config: RunConfig) -> tuple[Path, Bucket]:
        folder = json_folder(config.model.pretrained)
        if args.tiny:
            return tiny_folder(scratch, folder.name), Bucket(9, 64, 64)
        return folder, longest_bucket(config, read_spec(str(folder)))

    def of_run(name: str, config: RunConfig) -> Row:
        folder, bucket = place(config)
        row: Row = {"predicted_gib": predicted.get(name), "bucket": str(bucket)}
        return row | predicted_seconds(config, device) | measure(config, folder, bucket, device, args.steps)

    def of_step(config: RunConfig) -> Row:
        folder, bucket = place(config)
        return {"bucket": str(bucket)} | predicted_seconds(config, device) | take_apart(config, folder, bucket, device)

    for name, config in runs():
        yield name, partial(of_run, name, config)
    yield from attention_kernels(device, TOY_ATTENTION if args.tiny else ATTENTION)
    yield from products(device, TOY_PRODUCTS if args.tiny else PRODUCTS)
    for name in TAKEN_APART:
        yield f"breakdown {name}", partial(of_step, load_config(ROOT / "configs" / name))


def line(row: Row) -> str:
    """A row of the table."""
    if said := row.get("failed") or row.get("skipped") or row.get("absent"):
        return f"{row['config']:<44} {said}"
    if "s_per_step" not in row:
        shown = {key: value for key, value in row.items() if key not in ("config", "longest_s", "predicted_parts")}
        return f"{row['config']:<44} " + ", ".join(f"{key} {value}" for key, value in shown.items())
    peak, predicted, seconds = row.get("peak_gib"), row["predicted_gib"], row.get("predicted_s")
    memory = f"{peak:6.2f} GiB" if peak is not None else "   not measured"
    if peak is not None and predicted:
        memory += f", predicted {predicted:6.2f} ({(predicted / peak - 1) * 100:+.1f} %)"
    planned = f", predicted {seconds:.3f} ({(seconds / row['s_per_step'] - 1) * 100:+.1f} %)" if seconds else ""
    return f"{row['config']:<44} {memory}  {row['s_per_step']:8.3f} s/step{planned}"


if __name__ == "__main__":
    sys.exit(main())
