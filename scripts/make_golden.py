"""Run the golden runs anew and write ``tests/golden``, or with ``--check`` only say how far they are from it.

To be done on purpose: a change that is not arithmetic leaves every number as it is (``docs/numerics.md``).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from goldens import (
    FOLDER,
    METHODS,
    deviations,
    golden_config,
    golden_model,
    golden_run,
    read_golden,
    write_golden,
    write_stream_numbers,
)

from finetune.testing.tiny import VARIANTS


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for variant in args.variant:
        with tempfile.TemporaryDirectory() as scratch:
            model = golden_model(variant, Path(scratch) / "model")
            runs = {method: golden_run(golden_config(model, Path(scratch) / method, method)) for method in METHODS}
        if (FOLDER / f"{variant}.json").is_file():
            standing = read_golden(variant)["runs"]
            for method, run in runs.items():
                off = deviations(standing[method], run)
                lines.append(f"{variant} {method}: " + ", ".join(f"{kind} {by:.1e}" for kind, by in off.items()))
        if not args.check:
            lines.append(f"wrote {write_golden(variant, runs).relative_to(ROOT)}")
    if not args.check:
        lines.append(f"wrote {write_stream_numbers().relative_to(ROOT)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
