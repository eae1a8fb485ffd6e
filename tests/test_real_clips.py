"""Other people's datasets, as they are: CogKit's layout at 30 fps and CogVideo's at 8, to a verified export.

Needs a folder of real clips in FINETUNE_REAL_CLIPS; skips with a reason where there is none.
"""

from __future__ import annotations

import pytest
from worlds import run_config

from finetune import export
from finetune.trainers.loop import train

LAYOUTS = {"steamboat_willie": ("metadata.jsonl", 5), "cogvideox_samples": ("", 3)}


@pytest.mark.parametrize(("layout", "method"), [("steamboat_willie", "full"), ("cogvideox_samples", "lora")])
def test_real_clips_train_unchanged(real_clips, tiny_model, tmp_path, layout, method):
    name, clips = LAYOUTS[layout]
    config = run_config(
        tiny_model(width=96),
        real_clips / layout / name,
        tmp_path / "run",
        data={"buckets": ["9x64x96"], "holdout": 1},
        method={"lora": {"kind": "lora", "rank": 4, "alpha": 4}, "full": {"kind": "full"}}[method],
        train={"steps": 2},
        validation={"every": 2, "timesteps": 2, "at_start": True},
    )
    report = train(config)
    assert report.step == 2 and report.heldout_before is not None
    exported = export(report.run_dir)
    assert exported.max_abs_diff <= exported.tolerance
    assert f"{clips - 1}" in (exported.folder / "README.md").read_text()
