"""decord as a second reader: PyAV's pixels to the bit, by decord where it can be relied on, else by PyAV."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import probe
from fuzz import boxes
from test_video import FILES, media  # noqa: F401 - a fixture

from finetune.core.errors import ConfigError, DataError
from finetune.core.types import Bucket, Clip, ClipPlan
from finetune.datasets import decode as pyav
from finetune.datasets.decode_pool import DecodeJob, DecodePool, require_decoder

TO_PYAV = {
    *("av1.mp4", "av1_rotated.mp4"),  # cannot be opened
    *("open_gop.mp4", "open_gop_hevc.mp4", "edit_list.mp4", "stream.ts", "program.mpg", "b_frames.avi"),
}
"""What decord 0.6 cannot read, or gives wrong frames of without an error."""


@pytest.fixture
def real_decord():
    return pytest.importorskip("decord", reason="decord has no wheel for this machine")


@pytest.fixture
def by_pyav(monkeypatch) -> list[Path]:
    """The files of which a clip was decoded by PyAV."""
    paths: list[Path] = []
    read_clip = pyav.read_clip
    monkeypatch.setattr(pyav, "read_clip", lambda path, *plan: paths.append(path) or read_clip(path, *plan))
    return paths


def jobs_of(path: Path) -> list[DecodeJob]:
    """The same clip by each decoder: jumps over and into groups of pictures, and a frame that is repeated."""
    header = probe(path)
    last = header.frames - 1
    indices = (*range(3, last, 5), last - 1, last, last)
    plan = ClipPlan(indices, (60, 90), (4, 8), Bucket(len(indices), 48, 64))
    return [DecodeJob(path, header, plan, None, decoder) for decoder in ("pyav", "decord")]


def clips_of(path: Path, pool: DecodePool) -> list[Clip]:
    clips = [clip for _, clip in pool.decode_many(jobs_of(path))]
    assert all(isinstance(clip, Clip) for clip in clips), clips
    return clips


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_the_same_to_the_bit(media, real_decord, by_pyav, name):  # noqa: F811
    with DecodePool(workers=0) as pool:
        theirs, ours = clips_of(media / name, pool)
    assert torch.equal(ours.pixels, theirs.pixels)
    if real_decord.__version__ == "0.6.0":
        assert len(by_pyav) == (2 if name in TO_PYAV else 1)


def test_demo_clips_are_decoded_by_decord(demo_clips, real_decord, by_pyav):
    paths = sorted(demo_clips.glob("*.mp4"))
    assert len(paths) >= 4
    with DecodePool(workers=0) as pool:
        for path in paths:
            theirs, ours = clips_of(path, pool)
            assert torch.equal(ours.pixels, theirs.pixels)
    assert by_pyav == paths


def test_the_canary_of_open_groups(media, real_decord):  # noqa: F811
    """decord does give other frames of it, without an error."""
    path = media / "open_gop.mp4"
    theirs = dict(pyav.read_frames(path, [5, 11, 12, 30], probe(path)))
    ours = real_decord.VideoReader(str(path)).get_batch([5, 11, 12, 30]).asnumpy()
    if real_decord.__version__ == "0.6.0":
        assert not np.array_equal(ours, [*theirs.values()])


@pytest.mark.parametrize("change", ["pixels", "times", "count"])
def test_where_decord_sees_another_video_pyav_decodes(media, real_decord, by_pyav, monkeypatch, change):  # noqa: F811
    class Different(real_decord.VideoReader):
        def __len__(self):
            return super().__len__() + (change == "count")

        def get_frame_timestamp(self, numbers):
            return super().get_frame_timestamp(numbers) * (2 if change == "times" else 1)

        def get_batch(self, numbers):
            frames = super().get_batch(numbers).asnumpy().copy()
            frames[0, 0, 0, 0] ^= change == "pixels"
            return real_decord.nd.array(frames)

    monkeypatch.setattr(real_decord, "VideoReader", Different)
    with DecodePool(workers=0) as pool:
        theirs, ours = clips_of(media / "cfr.mp4", pool)
    assert torch.equal(ours.pixels, theirs.pixels) and len(by_pyav) == 2


# --- in a worker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["import os; os.abort()", "import os; os._exit(3)", "[].append(bytearray(2**40))"])
def test_a_decord_that_ends_its_worker_costs_no_clip(media, tmp_path, monkeypatch, fault):  # noqa: F811
    (tmp_path / "decord.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with DecodePool(workers=1) as pool:
        theirs, ours = clips_of(media / "cfr.mp4", pool)
    assert torch.equal(ours.pixels, theirs.pixels)


def test_hostile_files_end_as_with_pyav(media, real_decord, tmp_path):  # noqa: F811
    """A list of a thousand million frames, for which decord takes gigabytes; a file of which PyAV has an error too."""
    good = (media / "cfr.mp4").read_bytes()
    liar, damaged = tmp_path / "liar.mp4", tmp_path / "damaged.mp4"
    plain = boxes.spliced(good, boxes.find(good, "edts"), b"")
    liar.write_bytes(boxes.patched(plain, "stts", 8, (10**9).to_bytes(4, "big")))
    damaged.write_bytes(good)
    (_, job) = jobs_of(damaged)
    damaged.write_bytes((media / "vfr.mp4").read_bytes())
    with DecodePool(workers=1) as pool:
        theirs, ours = clips_of(liar, pool)
        ((_, error),) = pool.decode_many([job])
    assert torch.equal(ours.pixels, theirs.pixels)
    assert isinstance(error, DataError) and "has changed" in error.what and error.where == str(damaged)


def test_a_decord_that_is_not_installed_is_an_error_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    require_decoder("pyav")
    with pytest.raises(ConfigError, match="decord is not installed") as caught:
        require_decoder("decord")
    assert "PyAV gives the same pixels" in caught.value.fix
