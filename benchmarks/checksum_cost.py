"""What verifying the cache costs, as a share of the time in which an epoch's training batches are made.

Entries have the size of CogVideoX-5B at 49x480x720. Each epoch is read by a process that has verified nothing yet, from
files in the page cache. That is the worst case: a first epoch usually waits for a disk, and later ones verify nothing.
Every batch is made with and without verification in turn, on one thread; medians of the thread's own time are compared,
so that what else the machine does is measured as little as can be. It still is: on cores that several processes fight
over, the processor's caches are cold, and memory is what hashing waits for.

    python benchmarks/checksum_cost.py [--clips 24] [--rounds 25] [--output benchmarks/results/checksum_cost.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from finetune.cogvideox.config import DropoutConfig
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.checksums import digest_of
from finetune.core.types import Bucket, ClipPlan
from finetune.datasets import cache as reading
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.dataloader import BatchMaker
from finetune.datasets.manifests import ManifestItem
from finetune.datasets.schedule import MicroBatch

BUCKET = Bucket(49, 480, 720)


def write_entries(cache: Cache, spec: ModelSpec, clips: int) -> list[ManifestItem]:
    """Random latents and embeddings of the true shapes and dtypes."""
    items = []
    encoding = Encoding("benchmark", "benchmark", "bf16", spec.max_text_seq_length, "fp16", None, "benchmark")
    for number in range(clips):
        address = encoding.latents_address(f"{number:032d}", ClipPlan(tuple(range(49)), (480, 720), (0, 0), BUCKET))
        prompt = encoding.prompt_address(f"caption {number}")
        mean = torch.randn(spec.latent_shape(BUCKET))
        cache.write_latents(address, mean, mean.abs(), None)
        embeds = torch.randn(spec.max_text_seq_length, spec.text_embed_dim).bfloat16()
        cache.write_prompt(prompt, embeds, tokens=40)
        items.append(
            ManifestItem(
                f"{number}.mp4", "", "", BUCKET, 1.0, False, digest_of(address), digest_of(prompt), f"{number}"
            )
        )
    return items


def batch_s(spec: ModelSpec, root: Path, item: ManifestItem, *, verify: bool) -> float:
    """Seconds to make one clip's batch in a cache object that has verified nothing."""
    maker = BatchMaker(spec, Cache(root), [item], torch.zeros(1), DropoutConfig(caption_dropout=0), seed=1)
    real = reading.fault_of
    if not verify:
        reading.fault_of = lambda content, kind, key: ""
    try:
        begun = time.thread_time()
        maker.training(0, MicroBatch(items=(0,), slots=(0,)))
        return time.thread_time() - begun
    finally:
        reading.fault_of = real


def measure(clips: int, rounds: int) -> dict[str, object]:
    """Figures from ``rounds`` epochs of each sort."""
    torch.set_num_threads(1)
    spec = read_spec(str(known_model("5b")))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        items = write_entries(Cache(root), spec, clips)
        for item in items:  # files into the page cache, code into memory
            batch_s(spec, root, item, verify=True)
        pairs = [
            tuple(batch_s(spec, root, item, verify=verify) for verify in (False, True))
            for _ in range(rounds)
            for item in items
        ]
        size = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    plain = statistics.median(without for without, _ in pairs)
    extra = statistics.median(checked - without for without, checked in pairs)
    return {
        "clips": clips,
        "rounds": rounds,
        "mib_per_clip": round(size / clips / 2**20, 2),
        "ms_per_clip_without": round(1000 * plain, 2),
        "ms_per_clip_for_verification": round(1000 * extra, 3),
        "share_of_first_epoch": round(extra / plain, 4),
        "share_of_ten_epochs": round(extra / plain / 10, 4),
        "machine": f"{platform.machine()}, {platform.system()}, torch {torch.__version__}",
        "load_average": round(os.getloadavg()[0], 1),
        "niceness": os.nice(0),
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checksum_cost.json")
    args = parser.parse_args()
    figures = json.dumps(measure(args.clips, args.rounds), indent=1)
    print(figures)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(figures + "\n")


if __name__ == "__main__":
    main()
