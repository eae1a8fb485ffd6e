"""The first hour, for real: a shape that the shipped base has never seen appears with the adapter and not without."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.core.errors import ConfigError
from finetune.inference.request import GenerateRequest
from finetune.testing import quickstart
from finetune.testing.demo import NEW_SHAPE, held_out, lesson
from finetune.testing.quickstart import CONFIG, NEW_SCENES, OLD_SCENES, Outcome


def assert_told(outcome: Outcome, printed: str) -> None:
    """All that was made is there, verified and named."""
    assert outcome.export.max_abs_diff <= outcome.export.tolerance
    assert outcome.picture.read_bytes().startswith(b"\x89PNG")
    for made in (outcome.picture, outcome.export.folder, outcome.train.run_dir):
        assert str(made) in printed
    assert NEW_SHAPE in printed and "finetune init" in printed


@pytest.mark.slow
def test_the_quickstart_teaches_the_new_shape_and_keeps_the_old_ones(tmp_path, capsys):
    outcome = quickstart.main(tmp_path / "quickstart")
    assert_told(outcome, capsys.readouterr().out)
    assert outcome.rings[0] == 0, "the base must not know the shape, or there is nothing to learn"
    assert outcome.rings[1] >= len(NEW_SCENES) - 1
    assert outcome.distances[1] < 0.85 * outcome.distances[0]
    assert outcome.old[1] >= outcome.old[0] - 1 and outcome.old[1] >= len(OLD_SCENES) - 1
    before, after = outcome.train.heldout_before, outcome.train.heldout_after
    assert before is not None and after is not None and after < 0.75 * before


def test_a_tenth_of_the_quickstart_learns_and_a_second_call_goes_on(tmp_path, capsys, monkeypatch):
    """All five steps of it; the whole lesson is a slow test."""
    text = CONFIG.read_text(encoding="utf-8")
    changes = {
        "steps: 600": "steps: 60",
        "num_inference_steps: 25": "num_inference_steps: 2",
        "sample_every: 300": "sample_every: 60",
    }
    for whole, short in changes.items():
        assert whole in text
        text = text.replace(whole, short)
    (tmp_path / "short.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(quickstart, "CONFIG", tmp_path / "short.yaml")
    monkeypatch.setattr(quickstart, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(quickstart, "lesson", lambda: lesson()[::4])
    monkeypatch.setattr(quickstart, "held_out", lambda: held_out()[::2])
    for scenes in ("NEW_SCENES", "OLD_SCENES"):
        monkeypatch.setattr(quickstart, scenes, getattr(quickstart, scenes)[:1])
    outcome = quickstart.main(tmp_path / "quickstart")
    assert_told(outcome, capsys.readouterr().out)
    before, after = outcome.train.heldout_before, outcome.train.heldout_after
    assert before is not None and after is not None and after < 0.95 * before

    class SamplingError(Exception):
        """Four of five steps are done."""

    def generate(_request: GenerateRequest) -> None:
        raise SamplingError

    def checkpoints(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (folder / "run" / "checkpoints").rglob("*.*")}

    moved, trained = tmp_path / "moved", checkpoints(tmp_path / "quickstart")
    (tmp_path / "quickstart").rename(moved)  # its checkpoints have the old place of the model
    (moved / "run.yaml").write_text(f"# mine\n{text}", encoding="utf-8")
    monkeypatch.setattr(quickstart, "generate", generate)
    with pytest.raises(SamplingError):
        quickstart.main(moved)
    assert "nothing was encoded" in capsys.readouterr().out and (moved / "run.yaml").read_text().startswith("# mine")
    assert trained == checkpoints(moved), "nor was anything trained"


def test_a_quickstart_writes_into_no_folder_of_others(tmp_path):
    for name in ("run.yaml", "clips/metadata.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="no quickstart made"):
        quickstart.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "clips"}
    assert (tmp_path / "clips" / "metadata.jsonl").read_text() == "mine"
