#!/usr/bin/env python3
"""Every memory recipe and technique at full size on a GPU: measured peak against the planner's, and seconds per step.

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.core.gpu import grow_segments

grow_segments()

import torch
from cases import cases
from record import Record
from torch import Tensor, nn

from finetune.caching.encode import release_memory
from finetune.cli.init import RECIPES
from finetune.cogvideox.load import empty_transformer, place
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.objective import alpha_bar, velocity_losses
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.schema import RunConfig, load_config
from finetune.core.distributed import require_cudnn
from finetune.core.types import GIB, Batch, Bucket
from finetune.memory.quantized_linear import placement
from finetune.memory.runner import assert_recompute, undo
from finetune.optim.optimizers import begin
from finetune.parallel.gradient_release import single_process_strategy
from finetune.planner.estimate import longest_bucket
from finetune.planner.fake_run import OneProcess

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
}
"""What ``--only`` takes beside regular expressions; each piece is meant to fit ten minutes of an H100."""


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
        prompt_embeds=torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, dtype=dtype, device=device),
        image_latents=image,
        slots=(0,),
        clips=("random",),
    )


def measure(config: RunConfig, folder: Path, bucket: Bucket, device: torch.device, steps: int) -> dict[str, Any]:
    """Peak and seconds of optimizer steps after the first, in which the optimizer makes its states."""
    spec, dtype = read_spec(str(folder)), config.model.torch_dtype()
    torch.manual_seed(0)
    module = build(config, folder, device)
    strategy = single_process_strategy(
        OneProcess,
        module,
        config.method.trainable(module),
        memory=config.memory,
        device=device,
        max_norm=config.train.max_grad_norm,
    )
    strategy.start(config.optimizer, None)
    schedule = alpha_bar(spec).float().to(device)
    batch = random_batch(spec, bucket, dtype, device)
    loaded = allocated(device)
    durations, losses, norm = [], [], math.nan
    for step in range(steps + 1):
        if step == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronise(device)
        begun = time.perf_counter()
        begin(strategy.optimizer, seed=0, step=step)
        with assert_recompute(module, config.memory), strategy.micro_batch(last=True):
            loss = velocity_losses(strategy.model, spec, schedule, batch).sum()
            strategy.backward(loss)
        norm = strategy.clip(config.train.max_grad_norm or math.inf)
        strategy.step()
        synchronise(device)
        durations.append(time.perf_counter() - begun)
        losses.append(float(loss.detach()))
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
    undo(module)
    return found


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
    predicted = predictions()
    begun, rows, failed = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in runs():
            if not re.search(PIECES.get(args.only, args.only), name):
                continue
            row: dict[str, Any] = {"config": name, "predicted_gib": predicted.get(name)}
            rows.append(row)
            if time.monotonic() - begun > args.seconds:
                row["skipped"] = f"{args.seconds:g} s were over"
                continue  # an earlier row of it is better than none
            folder = json_folder(config.model.pretrained)
            bucket = longest_bucket(config, read_spec(str(folder)))
            if args.tiny:
                folder, bucket = tiny_folder(Path(scratch), folder.name), Bucket(9, 64, 64)
            row["bucket"] = str(bucket)
            try:
                row |= measure(config, folder, bucket, device, args.steps)
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


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if said := row.get("failed") or row.get("skipped"):
        return f"{row['config']:<44} {said}"
    peak, predicted = row.get("peak_gib"), row["predicted_gib"]
    memory = f"{peak:6.2f} GiB" if peak is not None else "   not measured"
    if peak is not None and predicted:
        memory += f", predicted {predicted:6.2f} ({(predicted / peak - 1) * 100:+.1f} %)"
    return f"{row['config']:<44} {memory}  {row['s_per_step']:8.3f} s/step"


if __name__ == "__main__":
    sys.exit(main())
