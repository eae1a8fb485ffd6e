"""Entries are stored in the background: in any order, bounded in number, and with errors that say whose they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from broken_disk import disk

from finetune.caching.encode import EncodeJob
from finetune.caching.writing import EntryWriter
from finetune.core.errors import CacheError, DataError
from finetune.datasets.cache import Cache

JOBS = [EncodeJob({"kind": "prompts", "text": f"caption {number}"}) for number in range(24)]


def test_the_encoder_is_not_kept_waiting_and_is_not_let_run_ahead():
    first, stored = threading.Event(), []
    with EntryWriter() as writer:

        def write(number: int) -> int:
            if number == 0:
                assert first.wait(60)
            stored.append(number)
            return 10

        handed_over = 0

        def encode() -> None:
            nonlocal handed_over
            for number, job in enumerate(JOBS):
                writer.store(job, lambda number=number: write(number))
                handed_over += 1

        encoder = threading.Thread(target=encode)
        encoder.start()
        encoder.join(0.5)
        assert encoder.is_alive() and handed_over == 8, "the first is not stored, so the ninth waits"
        assert sorted(stored) == list(range(1, 8)), "others finish before it"
        first.set()
        encoder.join(60)
        result = writer.finish()
    assert sorted(stored) == list(range(24)) and (result.encoded, result.bytes) == (24, 240)


def test_failures_come_in_the_order_of_the_clips_and_name_them():
    late = threading.Event()

    def changed() -> int:
        assert late.wait(60)
        raise DataError("the file changed")

    with EntryWriter() as writer:
        writer.store(JOBS[0], changed)
        writer.fail(JOBS[1], DataError("no frame", where="a.mp4", fix="leave it out"))
        writer.store(JOBS[2], lambda: 5)
        late.set()
        result = writer.finish()
    assert [failure.key for failure in result.failures] == [JOBS[0].key, JOBS[1].key] and result.encoded == 1
    assert [failure.error.where for failure in result.failures] == ["caption 'caption 0'", "caption 'caption 1': a.mp4"]
    assert "data.unreadable_clips: skip" in result.failures[0].error.fix


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ending", [stop, lambda: None])
def test_what_was_handed_over_is_stored_whatever_ends_the_work(ending: Callable[[], None]):
    stored: list[int] = []

    def full() -> int:
        raise CacheError("the cache cannot be written: no space left", where="/cache/latents/ab", fix="make room")

    failing = threading.Event()

    def full_at_last() -> int:
        assert failing.wait(60)
        return full()

    with pytest.raises((KeyboardInterrupt, CacheError)) as caught, EntryWriter() as writer:
        writer.store(JOBS[0], full_at_last)
        for number, job in enumerate(JOBS[1:6]):
            writer.store(job, lambda number=number: stored.append(number) or 1)
        failing.set()
        ending()
        writer.finish()
    assert sorted(stored) == [0, 1, 2, 3, 4]
    if ending is stop:
        note = "caption 'caption 0' was not stored either: the cache cannot be written: no space left"
        assert caught.value.__notes__ == [note]
    else:
        assert isinstance(caught.value, CacheError)
        assert caught.value.where == "/cache/latents/ab (caption 'caption 0')"


def test_remembering_digests_waits_for_no_disk(tmp_path):
    """Nothing is lost with them, and a hundred thousand videos would be two hundred thousand flushes."""
    root = tmp_path / "cache"
    root.mkdir()
    videos = [tmp_path / f"{number}.mp4" for number in range(5)]
    for number, video in enumerate(videos):
        video.write_bytes(b"%d" % number)
        os.utime(video, (1, 1))
    with disk() as seen:
        stamps = [Cache(root).stamp(video) for video in videos]
    assert seen.calls.count("_rename") == 5 and seen.calls.count("_sync") == 1, "one for the folder that is made"
    with disk() as seen:
        assert [Cache(root).stamp(video) for video in videos] == stamps
    assert not seen.calls
    for memo in (root / "digests").iterdir():
        memo.write_bytes(memo.read_bytes()[:40] + b"\0" * 20)  # as a power cut may leave it
    assert [Cache(root).stamp(video) for video in videos] == stamps
