"""The first hour, for real: a shape that the shipped base has never seen appears with the adapter and not without."""

from __future__ import annotations

from finetune.testing.demo import NEW_SHAPE
from finetune.testing.quickstart import NEW_SCENES, OLD_SCENES, main


def test_the_quickstart_teaches_the_new_shape_and_keeps_the_old_ones(tmp_path, capsys):
    outcome = main(tmp_path / "quickstart")
    said = capsys.readouterr().out
    new, old = len(NEW_SCENES), len(OLD_SCENES)
    assert outcome.rings[0] == 0, "the base must not know the shape, or there is nothing to learn"
    assert outcome.rings[1] >= new - 1
    assert outcome.distances[1] < 0.85 * outcome.distances[0]
    assert outcome.old[1] >= outcome.old[0] - 1 and outcome.old[1] >= old - 1
    before, after = outcome.train.heldout_before, outcome.train.heldout_after
    assert before is not None and after is not None and after < 0.75 * before
    assert outcome.export.max_abs_diff <= outcome.export.tolerance
    assert outcome.picture.read_bytes().startswith(b"\x89PNG")
    for made in (outcome.picture, outcome.export.folder, outcome.train.run_dir):
        assert str(made) in said
    assert NEW_SHAPE in said and "finetune init" in said

    again = main(tmp_path / "quickstart")
    assert "nothing was encoded" in capsys.readouterr().out
    assert again.train.step == outcome.train.step and again.distances == outcome.distances
