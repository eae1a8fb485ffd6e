"""Encoding datasets that are larger than the disk: their clips come row by row, are encoded, recorded and deleted.

A half of the room that a source's ``stream_room`` gives is read ahead while the other half is encoded. A row is
recorded when its latents are in the cache, and only then do its media go; so a process that is killed reads again what
it had in hand, and no more. What is planned, checked and trained on afterwards comes from the record
(``datasets.streams``).

Entries have files of their own until the end, for any job may want one at once; ``precompute`` then packs them into
shards. That takes the room of one more shard, for their files go as soon as a shard stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.caching.check import row_files_of, workers_for
from finetune.caching.encode import ClipEncoder, ClipJob, clip_bytes, clip_job
from finetune.caching.planned_clips import PlannedClip
from finetune.caching.request import encoding_of
from finetune.caching.writing import EncodeResult
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CacheError, DataError, raise_all
from finetune.core.files import disk_fix, require_space
from finetune.core.terminal import Bar
from finetune.datasets.cache import Cache, Encoding
from finetune.datasets.geometry import plan_clips
from finetune.datasets.parts import Part
from finetune.datasets.rows import MediaPlace, RowReport
from finetune.datasets.samples import usable_sample
from finetune.datasets.sources import SourceConfig
from finetune.datasets.streams import (
    Arrival,
    Line,
    Listing,
    StreamReader,
    append,
    record_probe,
    row_of,
    scratch_folder,
)


def encode_streams(
    config: RunConfig,
    spec: ModelSpec,
    cache: Cache,
    ranks: ProcessGroup,
    *,
    part: Part | None,
    progress: bool,
) -> list[EncodeResult]:
    """Read the streams among a run's sources to their end, and encode their clips; those that are encoded are passed
    over without being read.

    Args:
        config: the run's configuration.
        spec: of its model.
        cache: what is filled.
        ranks: processes that share the work; each has its share of the room on the disk.
        part: of the dataset, whose rows alone are read.
        progress: draw a bar.

    Returns:
        What each process did; clips that failed are in the records.

    Raises:
        CacheError: if the disk or the GPU is too small.
        DataError: if a stream could not be read to its end, after all that could be read is encoded.
        ModelError: if an encoder cannot be found.
    """
    sources = [(source, stream) for source in config.data.sources if (stream := source.stream(config.base))]
    if not sources:
        return []
    place = MediaPlace.of(config.cache.dir, part)

    def list_files() -> list[Listing]:
        for _, stream in sources:
            require_space(
                place.folder,
                stream.room,
                kind=CacheError,
                what=f"the stream_room of {stream.path}",
                fix="make room, or lower stream_room",
            )
        return [stream.listed(place.records, config.base) for _, stream in sources]

    listings = ranks.run_on_main(list_files)
    encoding = ranks.run_on_main(lambda: encoding_of(config, spec, cache, fetch=True))
    readers = [*([] if part is None else [(part.number - 1, part.of)]), (ranks.rank, ranks.world)]

    def encode_share() -> EncodeResult:
        results: list[EncodeResult] = []
        lost: list[DataError] = []
        workers = workers_for(config, len(listings) + 64, ranks.world)
        with ExitStack() as stack:
            encoder = stack.enter_context(ClipEncoder(config, cache, ranks.device, workers))
            scratch = stack.enter_context(scratch_folder(place.folder))
            bar = stack.enter_context(Bar(desc="encoding streams", disable=not progress))
            for (source, stream), listing in zip(sources, listings, strict=True):
                folder = stream.folder(place.records, config.base)
                room = stream.room // ranks.world
                reader = StreamReader(stream, listing, folder, scratch, room, spec.image_to_video, readers)
                rows = _StreamRows(config, spec, encoding, source, place.folder, reader.most, cache.keys("latents"))
                name = ".".join(f"{number}-{of}" for number, of in readers)
                for window in _read_ahead(reader.windows(rows.is_wanted)):
                    results.append(_encode_window(window, rows, encoder, cache, spec))
                    _record(window, folder, name)
                    for arrival in window:
                        for path in (arrival.video, arrival.image):
                            if path is not None:
                                path.unlink(missing_ok=True)
                    bar.update(sum("at" in arrival.line for arrival in window))
                lost += reader.lost
        raise_all(DataError, lost, what="{n} files could not be read to their end; what was read of them is encoded")
        return EncodeResult(sum(one.encoded for one in results), sum(one.bytes for one in results))

    return ranks.run_on_all(encode_share)


def _read_ahead(windows: Iterator[list[Arrival]]) -> Iterator[list[Arrival]]:
    """The same, of which the next one is read while one is in hand."""
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as ahead:
        following = ahead.submit(next, windows, None)
        try:
            while (window := following.result()) is not None:
                following = ahead.submit(next, windows, None)
                yield window
        finally:
            with suppress(Exception):  # of one that is not wanted any more
                following.result()
            windows.close()  # type: ignore[attr-defined]  # of a generator: ends its worker


def _record(window: Sequence[Arrival], folder: Path, reader: str) -> None:
    try:
        for file in dict.fromkeys(arrival.file for arrival in window):
            append(folder, file, reader, [arrival.line for arrival in window if arrival.file == file])
    except OSError as error:
        what = f"the record of a stream cannot be written: {error.strerror}"
        raise CacheError(what, where=str(folder), fix=f"{disk_fix(error)}; what is encoded stays") from error


@dataclass
class _StreamRows:
    """From what stands in a row of one source to the clips that training takes of it."""

    config: RunConfig
    spec: ModelSpec
    encoding: Encoding
    source: SourceConfig
    media: Path
    most: int
    """Bytes of media that a row may have."""
    there: set[str]
    """Keys of latents that are in the cache, or cannot be."""

    def jobs(self, line: Line, where: str) -> list[ClipJob]:
        """The clips of a row, whose media are named as if they stayed; none where it cannot be used, as who reads the
        record will say.
        """
        report = RowReport()
        row = row_of(line, where, self.media, report)
        row_files = row_files_of(self.config, self.spec)  # of a control or a mask, a stream has none
        sample = usable_sample(row, self.source, self.config.data, base=self.config.base, row_files=row_files)
        probe = report.streamed.media[sample.video].probe if sample else None
        if sample is None or probe is None or isinstance(probe, DataError):
            return []
        try:
            plans = plan_clips(probe, self.config.data, self.config.data.fps or self.spec.native_fps, where)
        except DataError:
            return []
        stamps = {path: media.stamp for path, media in report.streamed.media.items()}
        clips = [PlannedClip(where, sample, probe, plan, self.source.split == "holdout") for plan in plans]
        return [
            clip_job(clip, plan, stamps, self.encoding, self.spec)
            for clip in clips
            for plan in (clip.plan, *([replace(clip.plan, flip=True)] if sample.random_flip else []))
        ]

    def is_wanted(self, line: Line) -> bool:
        """Whether a row that is recorded is to be read again: its clips are cut or encoded otherwise now, or went."""
        if "room" in line:
            return bool(line["room"] <= self.most)
        failed = line.get("failed", {})
        return any(job.key not in self.there and job.key not in failed for job in self.jobs(line, ""))


def _encode_window(
    window: Sequence[Arrival], rows: _StreamRows, encoder: ClipEncoder, cache: Cache, spec: ModelSpec
) -> EncodeResult:
    """Encode what lies on the disk, and write down in each row's line what became of it."""
    probes = dict(encoder.pool.probe_many(dict.fromkeys(one.video for one in window if one.video is not None)))
    missing: dict[str, ClipJob] = {}
    keys: dict[str, list[Line]] = {}
    for arrival in window:
        if arrival.video is None:
            continue
        line = arrival.line
        line["probe"] = record_probe(probes[arrival.video])
        jobs = rows.jobs(line, f"{arrival.file.name}, row {line['at'][1] + 1} of group {line['at'][0]}")
        line["keys"] = [job.key for job in jobs]
        for job in jobs:
            keys.setdefault(job.key, []).append(line)
            if job.key not in rows.there:
                missing[job.key] = _on_disk(job, arrival)
    tensors = sum(_bytes_of(job, spec) for job in missing.values())
    require_space(cache.root, tensors, kind=CacheError, what="the next clips", fix="make room (`finetune cache gc`)")
    result = encoder.encode(list(missing.values()), progress=False)
    for failure in result.failures:
        for line in keys[failure.key]:
            line.setdefault("failed", {})[failure.key] = [failure.error.what, failure.error.fix]
    rows.there |= missing.keys()
    return result


def _bytes_of(job: ClipJob, spec: ModelSpec) -> int:
    address = job.address
    draws, further = address["image_draws"] or 0, address.get("condition_frames")
    return clip_bytes(spec, job.plan.bucket, address["dtype"], draws=draws, condition_frames=further)


def _on_disk(job: ClipJob, arrival: Arrival) -> ClipJob:
    """A clip whose files are read where they lie now."""
    assert arrival.video is not None
    stamp = replace(job.stamp, mtime_ns=arrival.video.stat().st_mtime_ns)
    if job.image is None or job.image_stamp is None or arrival.image is None:
        return replace(job, video=arrival.video, stamp=stamp)
    image_stamp = replace(job.image_stamp, mtime_ns=arrival.image.stat().st_mtime_ns)
    return replace(job, video=arrival.video, stamp=stamp, image=arrival.image, image_stamp=image_stamp)
