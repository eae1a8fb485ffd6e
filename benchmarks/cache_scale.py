"""What a packed cache of 100 000 entries costs: opening it, starting a training from it, a step, a random read.

Entries are as small as the tiny model's, so that they are written fast; there are as many to a shard as there would be
of CogVideoX-5B's. Reading is measured on entries of the true size, from shards that are not in memory, beside reading
the same bytes from the same places with nothing else done. What a million entries would cost is the line through the
measured sizes. Each figure comes from a process of its own, and is the time beyond its imports.

    python benchmarks/cache_scale.py [--entries 10000 100000] [--output benchmarks/results/cache_scale.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.datasets.cache import Cache
from finetune.datasets.manifests import FileStamp, Manifest, ManifestItem, portable

sys.path.insert(0, str(Path(__file__).parent))

PER_SHARD = 350
"""Entries of 5B at 49x480x720, latents and captions in turn, to a shard of 1 GiB."""

LARGE = 150
"""Clips of the true size, 4.3 MiB and 1.8 MiB with their captions, that reading is measured on."""


def config_of(folder: Path) -> Any:
    """A run of the tiny model that trains from the cache alone."""
    from finetune.config.schema import RunConfig

    return RunConfig.from_dict(
        {
            "model": {"pretrained": str(folder / "model")},
            "data": {"sources": [{"path": str(folder / "clips")}], "buckets": ["9x32x32"], "fps": 8},
            "cache": {"dir": str(folder / "cache"), "mode": "require"},
            "method": {"kind": "lora", "rank": 4, "alpha": 4},
            "train": {"steps": 10, "seed": 7},
            "output_dir": str(folder / "run"),
        },
        base=folder,
    )


def build(folder: Path, clips: int) -> None:
    """A cache of ``clips`` clips and as many captions, all packed, with its manifest and empty source files."""
    import torch

    from finetune.caching.request import encoding_of, make_request
    from finetune.cogvideox.spec import read_spec
    from finetune.core.checksums import canonical_json, digest_of
    from finetune.core.types import ClipPlan
    from finetune.datasets.entries import serialise
    from finetune.testing.tiny import build_tiny

    build_tiny(folder / "model")
    config = config_of(folder)
    spec, cache = read_spec(config.model.pretrained), Cache(config.cache.dir)
    local = encoding_of(config, spec, cache, fetch=False)
    encoding = replace(local, vae="elsewhere", text_encoder="elsewhere")
    bucket = config.data.buckets[0]
    plan = ClipPlan(tuple(range(bucket.frames)), (bucket.height, bucket.width), (0, 0), bucket)
    mean = torch.randn(spec.latent_shape(bucket)).half()
    embeds = torch.randn(spec.max_text_seq_length, spec.text_embed_dim)
    (folder / "clips").mkdir()
    shard: list[tuple[Any, str, bytes]] = []
    items, inputs, rows = [], {}, []

    def add(address: dict[str, Any], tensors: dict[str, torch.Tensor], **metadata: str) -> str:
        key = digest_of(address)
        content = serialise(tensors, {"key": key, "address": canonical_json(address), **metadata})
        shard.append((address["kind"], key, content))
        if len(shard) == PER_SHARD:
            cache.shards.write(shard)
            shard.clear()
        return key

    empty = add(encoding.prompt_address(""), {"prompt_embeds": embeds}, tokens="1")
    for number in range(clips):
        video = folder / "clips" / f"{number}.mp4"
        video.touch()
        os.utime(video, (1, 1))
        inputs[str(video)] = FileStamp(0, 1_000_000_000, f"{number:032d}")
        caption = f"a red kite over the sea at dusk, number {number}"
        rows.append(json.dumps({"file_name": video.name, "caption": caption}))
        latents = add(
            encoding.latents_address(f"{number:032d}", plan),
            {"latents_mean": mean, "latents_std": mean},
            made_with="{}",
        )
        prompt = add(encoding.prompt_address(caption), {"prompt_embeds": embeds}, tokens="9")
        items.append(
            ManifestItem(
                f"{number}.mp4",
                f"metadata.jsonl:{number}",
                caption,
                bucket,
                1.0,
                False,
                latents,
                prompt,
                f"{number:032d}",
            )
        )
    if shard:
        cache.shards.write(shard)
    table = folder / "clips" / "metadata.jsonl"
    table.write_text("\n".join(rows) + "\n")
    os.utime(table, (1, 1))
    inputs[str(table)] = FileStamp(table.stat().st_size, 1_000_000_000, "t" * 32)
    request = portable(make_request(config, spec, local), config.base)
    cache.save_manifest(Manifest(tuple(items), empty, request, inputs), config.base)


def rss_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """The most memory that this process has had; ``getrusage`` would count what it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def open_cache(folder: Path) -> dict[str, Any]:
    """List what is in the cache, as the first thing a job does."""
    import pyarrow.parquet  # noqa: F401 - an import

    before, begun, cpu = rss_mib(), time.perf_counter(), time.process_time()
    cache = Cache(folder / "cache")
    entries = sum(len(keys) for keys in cache.all_keys().values())
    seconds = time.perf_counter() - begun
    return {
        "entries": entries,
        "shards": len(cache.shards.paths()),
        "open_s": round(seconds, 3),
        "open_cpu_s": round(time.process_time() - cpu, 3),
        "open_mib": round(rss_mib() - before),
        "open_peak_mib_with_imports": round(peak_mib()),
    }


def start(folder: Path) -> dict[str, Any]:
    """From the configuration to the first batch, and then steps at the beginning and late in the run."""
    import pyarrow.parquet  # noqa: F401 - an import
    import torch

    from finetune.caching.request import find_manifest
    from finetune.cogvideox.spec import read_spec
    from finetune.core.distributed import ProcessGroup
    from finetune.trainers.setup import _run_data

    torch.set_num_threads(1)
    config = config_of(folder)
    spec = read_spec(config.model.pretrained)
    before, begun, cpu = rss_mib(), time.perf_counter(), time.process_time()
    cache = Cache(config.cache.dir)
    manifest = find_manifest(config, spec, cache)
    assert manifest is not None
    data = _run_data(config, spec, manifest, cache, ProcessGroup.current())
    plan, maker = data.plan, data.training

    def step_ms(number: int) -> float:
        begun = time.perf_counter()
        for micro in plan.for_rank(number, 0, 1):
            maker.training(number, micro)
        return 1000 * (time.perf_counter() - begun)

    step_ms(0)
    seconds = time.perf_counter() - begun
    figures: dict[str, Any] = {"start_s": round(seconds, 2), "start_cpu_s": round(time.process_time() - cpu, 2)}
    figures["start_mib"] = round(rss_mib() - before)
    last = len(manifest.items) - 1
    for name, first in (("first", 1), ("middle", last // 2), ("next_epoch", last + 300)):
        figures[f"step_ms_{name}"] = round(statistics.median(step_ms(first + n) for n in range(300)), 3)
    return figures


def read(folder: Path) -> dict[str, Any]:
    """Random entries of the true size, each read once from shards that are not in memory, and verified."""
    import torch
    from checksum_cost import write_entries

    from finetune.cogvideox.model_files import known_model
    from finetune.cogvideox.spec import read_spec
    from finetune.datasets.cache_packing import pack

    cache = Cache(folder / "large")
    items = write_entries(cache, read_spec(str(known_model("5b"))), LARGE)
    pack(cache)
    os.sync()
    order = random.Random(0).sample(items, len(items))
    rounds = []
    for _ in range(3):
        fresh = Cache(cache.root)
        places = fresh.shards.entries()
        _forget(fresh)
        begun = time.perf_counter()
        size = 0
        for item in order:
            for kind, key in (("latents", item.latents_key), ("prompts", item.prompt_key)):
                packed = places[kind][key]
                buffer = torch.empty(packed.size, dtype=torch.uint8)
                descriptor = os.open(packed.shard, os.O_RDONLY)
                size += os.preadv(descriptor, [buffer.numpy().data], packed.offset)
                os.close(descriptor)
        raw_s = time.perf_counter() - begun
        _forget(fresh)
        begun = time.perf_counter()
        for item in order:
            fresh.read(item)
        rounds.append((raw_s, time.perf_counter() - begun, size))
    raw, ours = (statistics.median(one[index] for one in rounds) for index in (0, 1))
    return {
        "clips": LARGE,
        "mib": round(rounds[0][2] / 2**20),
        "raw_mib_per_s": round(rounds[0][2] / 2**20 / raw),
        "cache_mib_per_s": round(rounds[0][2] / 2**20 / ours),
        "ratio": round(ours / raw, 2),
    }


def _forget(cache: Cache) -> None:
    """Drop the shards' pages from memory."""
    for shard in cache.shards.paths():
        descriptor = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


PHASES = {"open": open_cache, "start": start, "read": read}


def measured(phase: str, folder: Path) -> dict[str, Any]:
    """The figures of a phase, from a process of its own."""
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def modelled(rows: list[dict[str, Any]], entries: int) -> dict[str, Any]:
    """The line through two sizes, at a third."""
    small, large = rows[0], rows[-1]
    share = (entries - small["entries"]) / (large["entries"] - small["entries"])
    figures = {
        name: round(small[name] + share * (large[name] - small[name]), 1)
        for name in ("open_s", "open_cpu_s", "open_mib", "start_s", "start_cpu_s", "start_mib")
    }
    return {"entries": entries, "modelled": True, **figures}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cache_scale.json")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(PHASES[args.phase](args.folder)))
        return
    from record import Record

    device = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    record = Record(args.output, device, key="entries")
    rows = []
    for entries in args.entries:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            build(Path(folder), entries // 2)
            row = {"build_s": round(time.perf_counter() - begun, 1)}
            row = measured("open", Path(folder)) | measured("start", Path(folder)) | row
        row["load_average"] = round(os.getloadavg()[0], 1)
        rows.append(row)
        record.add(row)
        print(json.dumps(row), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        row = {"entries": "of the true size"} | measured("read", Path(folder))
        record.add(row | {"load_average": round(os.getloadavg()[0], 1)})
        print(json.dumps(row), flush=True)
    if len(rows) > 1:
        record.add(modelled(rows, 1_000_000))
        print(json.dumps(modelled(rows, 1_000_000)))


if __name__ == "__main__":
    main()
