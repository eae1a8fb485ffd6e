"""What the processor does around a training step: starting, planning, reading datasets and caches, filling a cache.

Processor seconds, of this process and its children, because a clock says mostly what else a machine was doing. Each
figure comes from a process of its own. Give a second checkout, and it is measured in turn with this one, case by case,
so that both see the same machine; the page's table has the medians.

    python benchmarks/processor.py [--before CHECKOUT] [--only start,rows] [--rounds 5]
        [--output benchmarks/results/processor.json] [--page docs/performance.md]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
ROWS = 500
"""Of the datasets that are read."""

ENTRIES = 10_000
"""Of the packed cache."""

CLIPS = 24
"""That are encoded."""

BUCKET = "49x480x720"
VAE_S = 0.1
"""What the VAE of the `precompute` case takes: it sleeps, as a processor does that waits for a GPU."""

CASES: dict[str, Callable[[Path], dict[str, float]]] = {}
GOALS = {
    "start to first step, s": "7",
    "plan of 5B, cold, s": "15",
    "check, ms a row": "3",
    "plan anew, ms a row": "1",
    "order of a million clips, s": "1",
    "training loop": "1",
    "precompute, ms": "10",
}


def case(function: Callable[[Path], dict[str, float]]) -> Callable[[Path], dict[str, float]]:
    """A function of a folder of its own that gives figures by their titles, with their units."""
    CASES[function.__name__] = function
    return function


def processor_s() -> float:
    """Of this process and of those of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def config_of(folder: Path, **changes: Any) -> Any:
    """A run of the tiny model in ``folder``."""
    from finetune.config.schema import RunConfig

    values = {
        "model": {"pretrained": str(folder / "model"), "dtype": "fp32"},
        "data": {"sources": [{"path": str(folder / "clips")}], "buckets": ["9x64x64"], "fps": 8, "holdout": 0},
        "cache": {"dir": str(folder / "cache"), "decode_workers": 2},
        "method": {"kind": "lora", "rank": 4, "alpha": 4},
        "train": {"steps": 200, "seed": 7},
        "validation": {"every": None},
        "checkpoint": {"every": None},
        "output_dir": str(folder / "run"),
    }
    return RunConfig.from_dict(values | changes, base=folder)


def write_clips(folder: Path, count: int) -> None:
    """Videos of the demo world, in ``clips``."""
    from finetune.testing import demo

    demo.write_clips(folder / "scenes", [demo.Scene("circle", "red", "left"), demo.Scene("square", "blue", "up")])
    _write_table(folder, [path.read_bytes() for path in sorted((folder / "scenes").rglob("*.mp4"))], count)


def _write_table(folder: Path, videos: list[bytes], count: int) -> None:
    """Files of which no two have the same bytes, older than any clock's tick, and their table."""
    clips = folder / "clips"
    clips.mkdir()
    rows = []
    for number in range(count):
        video = clips / f"{number:05d}.mp4"
        video.write_bytes(videos[number % len(videos)] + struct.pack(">I4sI", 12, b"free", number))
        os.utime(video, (1, 1))
        rows.append(json.dumps({"file_name": video.name, "prompt": f"a red circle, number {number}"}))
    table = clips / "metadata.jsonl"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.utime(table, (1, 1))


# ---------------------------------------------------------------------------------------------------------------- cases


@case
def start(folder: Path) -> dict[str, float]:
    """A process's first step from a complete cache, and the first that also encodes four clips."""
    from finetune.testing.tiny import build_tiny

    build_tiny(folder / "model")
    write_clips(folder, 4)
    (folder / "run.yaml").write_text(config_of(folder).to_yaml(), encoding="utf-8")
    titles = ("start to first step, encoding four clips, s", "start to first step, s")
    figures = {title: float(_in_child("first_step", folder)) for title in titles}
    begun = processor_s()
    words = ["train", "--config", str(folder / "run.yaml"), "--set", "train.steps=1"]
    subprocess.run([sys.executable, "-m", "finetune", *words], check=True, capture_output=True)
    return figures | {"`finetune train` of one step, from start to end, s": processor_s() - begun}


def first_step(folder: Path) -> float:
    """Processor seconds of a process up to the end of its first step."""

    class Stop(Exception):  # noqa: N818 - ends the run
        pass

    def stop(_: object) -> None:
        raise Stop

    import finetune

    try:
        finetune.train(folder / "run.yaml", on_step=stop)
    except Stop:
        return processor_s()
    raise AssertionError("no step was taken")


@case
def plan(folder: Path) -> dict[str, float]:
    """The shipped 5B LoRA configuration, with no estimate remembered and with all."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    command = [sys.executable, "-m", "finetune", "plan", "--config", str(ROOT / "configs" / "cogvideox-5b-lora.yaml")]
    figures = {}
    for title in ("plan of 5B, cold, s", "plan of 5B again, s"):
        begun = processor_s()
        subprocess.run([*command, "--card", "24GB"], check=True, capture_output=True)
        figures[title] = processor_s() - begun
    return figures


@case
def rows(folder: Path) -> dict[str, float]:
    """What a row costs: read and checked, planned, and planned once more."""
    from finetune.caching.check import check_dataset
    from finetune.caching.precompute import plan_cache
    from finetune.cogvideox.spec import read_spec
    from finetune.datasets.cache import Cache
    from finetune.testing.tiny import build_tiny

    build_tiny(folder / "model")
    write_clips(folder, ROWS)
    config = config_of(folder)
    spec, cache = read_spec(config.model.pretrained), Cache(config.cache.dir)

    def ms(work: Callable[[], object]) -> float:
        begun = processor_s()
        work()
        return 1000 * (processor_s() - begun) / ROWS

    work = {
        "check, ms a row": lambda: check_dataset(config, spec, progress=False),
        "plan of a dataset, ms a row": lambda: plan_cache(config, spec, cache, progress=False),
        "plan anew, ms a row": lambda: plan_cache(config, spec, Cache(cache.root), progress=False),
    }
    with cache.in_use("benchmark"):
        return {title: ms(function) for title, function in work.items()}


@case
def cache(folder: Path) -> dict[str, float]:
    """Starting a training from a packed cache, as ``cache_scale.py`` does with larger ones."""
    import cache_scale

    cache_scale.build(folder, ENTRIES // 2)
    return {f"cache of {ENTRIES:,} entries, to the first batch, s": cache_scale.start(folder)["start_cpu_s"]}


@case
def order(folder: Path) -> dict[str, float]:
    """The first step of an epoch of a million clips."""
    import torch  # noqa: F401 - an import

    from finetune.core.types import Bucket
    from finetune.datasets.schedule import Item, StepPlan

    figures = {}
    for title, repeats in (("order of a million clips, s", 1.0), ("the same with repeats 2.25, s", 2.25)):
        plan = StepPlan((Item(Bucket(49, 480, 720), repeats),) * 1_000_000, seed=7, batch_size=1, micro_batches=1)
        begun = processor_s()
        plan.step(0)
        figures[title] = processor_s() - begun
    return figures


@case
def loop(folder: Path) -> dict[str, float]:
    """Steps of the training loop beside a bare torch loop over the same model and batches, in one process."""
    import torch

    from finetune.caching.precompute import precompute
    from finetune.testing.tiny import build_tiny
    from finetune.trainers import loop as training

    torch.set_num_threads(1)
    build_tiny(folder / "model")
    write_clips(folder, 4)
    config = config_of(folder, tracking={"kind": "none"}, optimizer={"kind": "adamw"})
    precompute(config, progress=False)
    ours: list[float] = []
    bare: list[float] = []
    passes = training._Loop._passes
    begun = 0.0

    def timed_passes(loop: Any, step: int) -> None:
        """A bare step before ours, on the same weights and batch, which moves nothing."""
        nonlocal begun
        run = loop.run
        micro = run.data.training.training(step, run.data.plan.for_rank(step, 0, 1)[0])
        parameters = list(run.model.parameters.values())
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
        mark = time.thread_time()
        losses = run.model.losses(micro)
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        float(losses.detach().sum())
        optimizer.step()
        bare.append(time.thread_time() - mark)
        for parameter in parameters:
            parameter.grad = None
        begun = time.thread_time()
        passes(loop, step)

    def step_done(_: object) -> None:
        ours.append(time.thread_time() - begun)

    with mock.patch.object(training._Loop, "_passes", timed_passes):
        training.train(config, step_done)
    extra = statistics.median(mine - theirs for mine, theirs in zip(ours[20:], bare[20:], strict=True))
    return {"training loop over a bare torch loop, ms a step": 1000 * extra}


@case
def precompute(folder: Path) -> dict[str, float]:
    """Encoding clips of 49x480x720 that are decoded already, with a VAE that takes its time and no processor: clips a
    second, and what the thread that encodes does beside encoding.
    """
    import torch

    from finetune.caching import encode
    from finetune.caching.precompute import plan_cache
    from finetune.cogvideox.spec import read_spec
    from finetune.core.types import Clip
    from finetune.datasets.cache import Cache
    from finetune.testing.tiny import build_tiny

    torch.set_num_threads(1)
    build_tiny(folder / "model")
    _write_long_clips(folder, CLIPS)
    config = config_of(folder, data={"sources": [{"path": str(folder / "clips")}], "buckets": [BUCKET], "fps": 8})
    cache = Cache(config.cache.dir)
    latents = torch.randn(1, 16, 13, 60, 90)
    pixels = torch.zeros(3, 49, 480, 720, dtype=torch.uint8)
    thread, flush = threading.get_ident(), os.fsync
    encoding_s: list[float] = []
    flushes: list[int] = []

    def encode_video(vae: object, pixels: object) -> tuple[Any, Any]:
        begun = time.thread_time()
        encoded = latents.clone(), latents.abs()
        time.sleep(VAE_S)
        encoding_s.append(time.thread_time() - begun)
        return encoded

    def flush_counted(descriptor: int) -> None:
        if threading.get_ident() == thread:
            flushes.append(descriptor)
        flush(descriptor)

    with ExitStack() as stack:
        stack.enter_context(cache.in_use("benchmark"))
        jobs = plan_cache(config, read_spec(config.model.pretrained), cache, progress=False).latents
        for patch in (
            mock.patch.object(encode, "encode_video", encode_video),
            mock.patch.object(encode.DecodePool, "decode_many", lambda _, jobs: ((job, Clip(pixels)) for job in jobs)),
            mock.patch("finetune.cogvideox.load.load_vae", lambda *_, **__: _NoVae()),
            mock.patch.object(os, "fsync", flush_counted),
        ):
            stack.enter_context(patch)
        encoder = stack.enter_context(encode.ClipEncoder(config, cache, torch.device("cpu"), workers=0))
        encoder.encode(jobs[:1], progress=False)  # imports
        jobs = jobs[1:]
        encoding_s.clear()
        flushes.clear()
        begun, mark = time.perf_counter(), time.thread_time()
        encoder.encode(jobs, progress=False)
        beside_s, clock_s = time.thread_time() - mark - sum(encoding_s), time.perf_counter() - begun
    return {
        f"precompute, clips a second by the clock, of a VAE that takes {VAE_S} s": len(jobs) / clock_s,
        "precompute, ms of the encoding thread a clip, beside the VAE": 1000 * beside_s / len(jobs),
        "precompute, flushes that the encoding thread waits for, a clip": len(flushes) / len(jobs),
    }


class _NoVae(SimpleNamespace):
    device = SimpleNamespace(type="cpu")
    dtype = None
    tile_sample_min_height = tile_sample_min_width = 1

    def enable_tiling(self) -> None:
        """Nothing to tile."""

    disable_tiling = enable_tiling


def _write_long_clips(folder: Path, count: int) -> None:
    """H.264 of 49 black frames of 480x720, a file for each clip."""
    import av
    import numpy as np

    video = folder / "one.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 480, 720, "yuv420p"
        for _ in range(49):
            frame = av.VideoFrame.from_ndarray(np.zeros((480, 720, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _write_table(folder, [video.read_bytes()], count)


# -------------------------------------------------------------------------------------------------------- running them


def _in_child(name: str, folder: Path, root: Path = ROOT) -> Any:
    """What a case or ``first_step`` gives in a process of its own, over the package in ``root``."""
    command = [sys.executable, str(Path(__file__)), "--run", name, "--folder", str(folder)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(names: list[str], roots: dict[str, Path], rounds: int, record: Any) -> None:
    """Every case in turn over each of the checkouts, so often, each time in a process and a folder of its own."""
    for name in names:
        rows: dict[str, dict[str, list[float]]] = {}
        for _ in range(rounds):
            for label, root in roots.items():
                with tempfile.TemporaryDirectory() as folder:
                    for title, figure in _in_child(name, Path(folder), root).items():
                        rows.setdefault(title, {}).setdefault(label, []).append(figure)
        for title, figures in rows.items():
            row: dict[str, Any] = {"what": title, "rounds": rounds, "load_average": round(os.getloadavg()[0], 1)}
            for label, values in figures.items():
                row[label] = round(statistics.median(values), 3)
                row[f"{label}, least and most"] = [round(min(values), 3), round(max(values), 3)]
            record.add(row)
            print(json.dumps(row), flush=True)


def write_table(result: Path, page: Path) -> None:
    """The medians as a table between the marks of a page."""
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    lines = ["| what | before | now | goal |", "|---|---|---|---|"]
    for row in rows:
        goal = next((goal for name, goal in GOALS.items() if row["what"].startswith(name)), "")
        lines.append(f"| {row['what']} | {row.get('before', '')} | {row.get('now', '')} | {goal} |")
    text = page.read_text(encoding="utf-8")
    head, rest = text.split("<!-- processor: written by benchmarks/processor.py --page -->\n")
    _, tail = rest.split("<!-- /processor -->")
    mark = "<!-- processor: written by benchmarks/processor.py --page -->\n"
    page.write_text(f"{head}{mark}\n{chr(10).join(lines)}\n\n<!-- /processor -->{tail}", encoding="utf-8")


def main() -> None:
    """Measure, print, keep, and write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "processor.json")
    parser.add_argument("--page", type=Path, help="write the table into it")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        figures = first_step(args.folder) if args.run == "first_step" else CASES[args.run](args.folder)
        print(json.dumps(figures))
        return
    from record import Record

    roots = {**({"before": args.before.resolve()} if args.before else {}), "now": ROOT}
    record = Record(args.output, f"{os.cpu_count()} cores", key="what")
    measure([name for name in args.only.split(",") if name], roots, args.rounds, record)
    if args.page:
        write_table(args.output, args.page)


if __name__ == "__main__":
    main()
