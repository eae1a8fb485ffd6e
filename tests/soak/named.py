"""Ten kills at ten named moments of one training on clips that somebody else made.

``python -m soak.named --clips FOLDER``: the folder holds the layouts of ``REAL``; the end has to equal that of a run
that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from soak import nursery
from soak.campaign import Campaign, Tally
from soak.job import Failed
from soak.probe import Plan
from soak.world import MEASURED, Scenario, World

REAL = ("steamboat_willie/metadata.jsonl", "cogvideox_samples")
"""CogKit's layout and CogVideo's."""
MOMENTS: dict[str, Plan] = {
    "when the dataset has been planned": Plan("planning", side="after"),
    "while the VAE is loaded": Plan("loading an encoder", seconds=0.005),
    "while the second clip is decoded": Plan("decoding", 2, side="before"),
    "when the second clip has been encoded": Plan("encoding", 2, side="after"),
    "in the middle of an entry's bytes": Plan("write", 2, side="during", within="writing an entry"),
    "while the model is loaded": Plan("loading the model", seconds=0.005),
    "after a backward pass": Plan("backward", 2, side="after"),
    "between clipping and the update": Plan("updating weights", 2, side="before"),
    "in the middle of a checkpoint's bytes": Plan("write", 2, side="during", within="writing a checkpoint"),
    "while an old checkpoint is removed": Plan("unlink", 2, side="before", within="pruning"),
}
"""In the order in which a run that is killed at each of them comes by."""


def scenario(clips: Path) -> Scenario:
    """A LoRA with EMA on every clip of both layouts, the cache empty at the beginning."""
    return Scenario(
        "train-real-clips",
        "train",
        "5b",
        tuple(str(clips / name) for name in REAL),
        {
            "data": {"buckets": ["9x48x80"], "holdout": 2},
            "method": {"kind": "lora", "rank": 64, "alpha": 64, "dropout": 0.1},
            "optimizer": {"kind": "adamw8bit", "lr": 1e-3},
            "train": {"steps": 8, "batch_size": 2, "ema_decay": 0.9},
            "validation": MEASURED,
            "checkpoint": {"every": 2, "keep_last": 1, "keep_best": True},
            "cache": {"decode_workers": 1},
        },
        cold=True,
    )


def run(clips: Path) -> dict[str, object]:
    """Kill at every moment of ``MOMENTS`` in turn; what happened, as JSON."""
    nursery.preload()
    begun, tally, failure = time.monotonic(), Tally(), ""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        world = World(Path(folder).resolve())
        world.prepare({"5b"})
        try:
            Campaign(world, scenario(clips), tally).deliberate(list(MOMENTS.values()))
            missed = [
                f"{name}: killed in {one['phase']}"
                for (name, plan), one in zip(MOMENTS.items(), tally.kills, strict=True)
                if one["phase"] != (plan.within or plan.at)
            ]
            failure = "; ".join(missed)
        except Failed as error:
            failure = str(error)
    killed = {name: one["phase"] for name, one in zip(MOMENTS, tally.kills, strict=False)}
    return {"kills": killed, "seconds": round(time.monotonic() - begun, 1), "failure": failure}


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=Path, required=True)
    result = run(parser.parse_args().clips)
    print(json.dumps(result, indent=1))
    return 1 if result["failure"] else 0


if __name__ == "__main__":
    sys.exit(main())
