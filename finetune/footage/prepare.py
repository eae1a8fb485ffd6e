"""``prepare``: a tree of videos becomes a folder of clips, stage by stage; each takes up what an earlier call left."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from finetune.core import locks
from finetune.core.checksums import digest_file
from finetune.core.errors import ConfigError, DataError, is_refusal
from finetune.core.files import atomic_write_bytes, atomic_write_text, disk_fix, require_space, require_writable
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets.cache import YOUNG_S
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.geometry import seconds_of
from finetune.datasets.rows import VIDEO, RowReport, list_folder
from finetune.footage.cutting import CutPlan
from finetune.footage.duplicates import drop_duplicates
from finetune.footage.filters import ClipShape, Limits, Span, spans_of
from finetune.footage.ledger import (
    CLIPS,
    LEDGER,
    METADATA,
    STATE,
    Source,
    State,
    clip_name,
    clips_there,
    read_rows,
    write_dataset,
    write_ledger,
)
from finetune.footage.measure import Footage
from finetune.footage.pool import CutRequest, MadeClip, MeasureRequest, PreparePool
from finetune.footage.report import write_report
from finetune.footage.scenes import DetectorName, require_extra
from finetune.footage.scorers import FRAMES, SHORT_SIDE, ScorerRule, load_scorer, score

_BYTES_PER_PIXEL = 0.15
"""Of an encoded clip, about, for the question whether the disk has room."""


PAGE = "ledger.html"


@dataclass(frozen=True)
class PrepareRequest:
    """Which footage becomes which clips."""

    raw: Path
    out: Path
    shape: ClipShape = field(default_factory=ClipShape)
    limits: Limits = field(default_factory=Limits)
    detector: DetectorName = "adaptive"
    threshold: float | None = None
    """Of the detector; None for its own default."""
    scorers: tuple[str, ...] = ()
    """As ``scorers.load_scorer`` reads them."""
    report: bool = False
    """Write the ledger as a page, too."""
    workers: int = 2
    """Processes; 0 reads the files in this one, without limits on memory and time."""


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` made; ``str()`` of it is what the command prints."""

    out: Path
    sources: int
    clips: int
    copied: int
    """Clips that this call made without encoding."""
    encoded: int
    """Clips that this call encoded; the others were there."""
    seconds: dict[str, float]
    """Of footage by what became of it: ``kept``, or a reason."""
    unreadable: tuple[str, ...]
    """Sources of which nothing can be read, with why."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        share = 100 / total if total else 0.0
        there = self.clips - self.copied - self.encoded
        lines = [
            f"{self.clips} clips from {self.sources} videos in {self.out}"
            f" ({self.encoded} encoded, {self.copied} copied, {there} were there)",
            f"{'footage':>12}: {total:10.1f} s",
            *(
                f"{name:>12}: {seconds:10.1f} s {seconds * share:5.1f} %"
                for name, seconds in sorted(self.seconds.items(), key=lambda item: (item[0] != "kept", -item[1]))
            ),
        ]
        return "\n".join(lines)


def prepare(request: PrepareRequest, *, progress: bool = True) -> PrepareReport:
    """Make a dataset from a tree of videos.

    Killed at any moment, the same call goes on and ends with the same files. Originals are only read.

    Raises:
        ConfigError: if a library is missing, a scorer cannot be used, or one of the folders cannot.
        DataError: if the tree holds no video, nothing of it is left, or the disk is full.
    """
    require_extra(request.detector)
    rules = tuple(load_scorer(text) for text in request.scorers)
    _check_folders(request)
    state = State(request.out)
    with _locked(request.out), _clear_when_full(request.out):
        (request.out / CLIPS).mkdir(exist_ok=True)
        state.clean(request.out)
        read_rows(request.out / METADATA)  # which may have been edited, and is needed in the end
        notes, paths = _videos(request)
        sources, unreadable = _measured_sources(request, state, paths, progress)
        drop_duplicates([(source.name, source.spans) for source in sources], request.limits.duplicate_bits)
        for rule in rules:
            _apply_scorer(request, state, sources, rule, progress)
        copied, encoded = _cut_clips(request, sources, progress)
        left = bool(_kept(sources))
        deleted = write_dataset(request.out, sources) if left else []
        write_ledger(request.out, sources)
        if request.report:
            page = write_report(sources, request.limits, workers=request.workers, progress=progress)
            atomic_write_text(request.out / PAGE, page)
        if not left:
            raise _nothing_left(request.out, sources)
        if deleted:
            notes.append(f"{len(deleted)} clips of an earlier call are no longer wanted, and were deleted")
        return _finish(request, sources, unreadable, notes, (copied, encoded))


# --- folders ----------------------------------------------------------------------------------------------------------


def _check_folders(request: PrepareRequest) -> None:
    raw, out = request.raw, request.out
    if request.workers < 0:
        raise ConfigError(f"{request.workers} processes are none", where="workers", fix="give 0 or more")
    if request.threshold is not None and request.threshold <= 0:
        fix = "give a number above 0, or leave it out"
        raise ConfigError(f"a threshold of {request.threshold:g} finds no scenes", where="threshold", fix=fix)
    if not raw.is_dir():
        what = "there is no such folder" if not raw.exists() else "this is a file, not a folder"
        raise ConfigError(what, where=str(raw), fix="name the folder that holds the footage")
    if _is_inside(raw, out):
        what = "the footage lies inside the folder that the clips go to"
        raise ConfigError(what, where=str(out), fix="name another folder with --out; originals are never touched")
    if out.exists() and not out.is_dir():
        raise ConfigError("this is a file, not a folder", where=str(out), fix="name another folder with --out")
    if out.is_dir() and not (out / STATE).is_dir() and any(out.iterdir()):
        what = "the folder holds files that prepare did not make"
        raise ConfigError(what, where=str(out), fix="name a new or empty folder with --out")
    require_writable(out, kind=ConfigError, what="the dataset", where=str(out))
    require_writable(out / STATE, kind=ConfigError, what="the dataset", where=str(out))


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        with locks.hold(out / STATE / "lock", "finetune prepare"):
            yield
    except locks.HeldError as holder:
        fix = "wait for it, or name another folder with --out"
        raise ConfigError(f"another call works in this folder: {holder}", where=str(out), fix=fix) from None
    except locks.NoLocksError:
        fix = "name a folder on a disk of this machine with --out"
        raise ConfigError("the file system has no locks", where=str(out), fix=fix) from None


@contextmanager
def _clear_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_refusal(error):
            raise
        what = f"the dataset cannot be written: {error.strerror or error}"
        raise DataError(what, where=str(error.filename or out), fix=disk_fix(error)) from error


def _videos(request: PrepareRequest) -> tuple[list[str], list[Path]]:
    """What is to be said of the tree, and its videos, in order; folders that ``prepare`` made are none of it."""
    listing = RowReport()
    files = list_folder(request.raw, listing, allow_outside=True)
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(request.raw)}
    made = {folder for folder in folders if (folder / STATE).is_dir()}
    videos = [file for file in files if file.suffix.lower() in VIDEO.suffixes and not made.intersection(file.parents)]
    notes = [*listing.notes, *(f"{error.what} ({error.where})" for error in listing.errors)]
    if made:
        notes.append(f"left out, because prepare made them: {', '.join(sorted(map(str, made)))}")
    if not videos:
        fix = f"known are {' '.join(VIDEO.suffixes)}"
        raise DataError("; ".join(["the folder holds no videos", *notes]), where=str(request.raw), fix=fix)
    return notes, sorted(videos)


# --- stages -----------------------------------------------------------------------------------------------------------


def _measured_sources(
    request: PrepareRequest, state: State, paths: Sequence[Path], progress: bool
) -> tuple[list[Source], list[str]]:
    """Every source with its spans; and those that cannot be read, with why."""
    sources = _digested(request, state, paths, progress)
    originals: dict[str, Source] = {}
    for source in sources:
        originals.setdefault(source.digest, source)
    measured = _measured(request, state, originals, progress)
    unreadable = []
    for source in sources:
        footage = measured.footage.get(source.digest)
        if footage is None:
            fault = measured.faults[source.digest].what
            whole = Span(0.0, measured.seconds.get(source.digest, 0.0))
            source.spans = [whole.dropped("unreadable", None, None, fault)]
            unreadable.append(f"{source.name}: {fault}")
        elif source is not originals[source.digest]:
            whole = Span(0.0, seconds_of(footage.header))
            source.spans = [whole.dropped("copy", None, None, originals[source.digest].name)]
        else:
            source.spans = spans_of(footage, request.shape, request.limits)
            source.header = footage.header
    return sources, unreadable


@dataclass
class _Measured:
    """What is known of sources, by digest."""

    footage: dict[str, Footage]
    faults: dict[str, DataError] = field(default_factory=dict)
    """Why there is no footage of the others."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long those are that this call has measured, as their headers say."""


def _measured(request: PrepareRequest, state: State, sources: Mapping[str, Source], progress: bool) -> _Measured:
    """Measure every source that no earlier call has measured."""
    arguments = request.detector, request.threshold
    earlier = ((digest, state.footage(digest, *arguments)) for digest in sources)
    measured = _Measured({digest: footage for digest, footage in earlier if footage is not None})
    missing = {source.path: source for digest, source in sources.items() if digest not in measured.footage}
    with DecodePool(workers=request.workers) as pool:
        bar = Bar(pool.probe_many(missing), total=len(missing), desc="reading headers", disable=not progress)
        for path, header in bar:
            if isinstance(header, DataError):
                measured.faults[missing[path].digest] = header
            else:
                measured.seconds[missing[path].digest] = seconds_of(header)
    # The longest first: begun last, it would leave the other workers idle.
    ordered = sorted(measured.seconds, key=lambda digest: -measured.seconds[digest])
    jobs = (
        (sources[digest], MeasureRequest(sources[digest].path, *arguments, measured.seconds[digest]))
        for digest in ordered
    )
    total = round(sum(measured.seconds.values()))
    with (
        PreparePool[Source](request.workers) as measuring,
        Bar(total=total, desc="measuring footage, seconds", disable=not progress) as bar,
    ):
        for source, answer in measuring.run(jobs):
            if isinstance(answer, DataError):
                measured.faults[source.digest] = answer
            elif not _is_unchanged(source):
                measured.faults[source.digest] = DataError(_CHANGED)
            elif isinstance(answer, Footage):
                state.write_footage(source.digest, *arguments, answer)
                measured.footage[source.digest] = answer
            bar.update(round(measured.seconds[source.digest]))
    return measured


def _digested(request: PrepareRequest, state: State, paths: Sequence[Path], progress: bool) -> list[Source]:
    known = state.digests()

    def read(path: Path) -> tuple[str, tuple[int, int, str]]:
        name = path.relative_to(request.raw).as_posix()
        try:
            status = path.stat()
            if not path.is_file():  # a pipe waits for ever, and a device has no end
                return name, (0, 0, f"unreadable {name}")
            size, mtime_ns, digest = known.get(name, (0, 0, ""))
            if (size, mtime_ns) != (status.st_size, status.st_mtime_ns):
                digest = digest_file(path)
            return name, (status.st_size, status.st_mtime_ns, digest)
        except OSError:  # its header cannot be read either, and that error is told
            return name, (0, 0, f"unreadable {name}")

    with ThreadPoolExecutor(max(1, request.workers)) as threads:
        bar = Bar(threads.map(read, paths), total=len(paths), desc="reading files", disable=not progress)
        files = dict(bar)
    # One that is so young may change again within a tick of its file system's clock.
    old_ns = time.time_ns() - YOUNG_S * 1e9
    state.write_digests({name: values for name, values in files.items() if 0 < values[1] < old_ns})
    return [Source(name, path, files[name][2], files[name][:2]) for name, path in zip(files, paths, strict=True)]


_CHANGED = "the file changed while it was read"


def _is_unchanged(source: Source) -> bool:
    """Whether a source is still what its digest is of, as far as its size and time tell."""
    try:
        status = source.path.stat()
    except OSError:
        return False
    return source.stamp == (status.st_size, status.st_mtime_ns)


class _Clip(NamedTuple):
    """A clip that is kept so far."""

    source: Source
    number: int
    """Of its span in the source."""
    span: Span
    plan: CutPlan
    header: VideoProbe
    name: str

    def replace_span(self, span: Span) -> None:
        self.source.spans[self.number] = span


def _kept(sources: Sequence[Source]) -> list[_Clip]:
    return [
        _Clip(source, number, span, span.plan, replace(source.header, frame_times_s=()), clip_name(source, span))
        for source in sources
        for number, span in enumerate(source.spans)
        if span.plan is not None and source.header is not None
    ]


def _apply_scorer(
    request: PrepareRequest, state: State, sources: Sequence[Source], rule: ScorerRule, progress: bool
) -> None:
    """Ask a scorer about every clip, and drop those that its rule drops."""
    clips = _kept(sources)
    values = {clip.name: state.score(clip.name, rule.path) for clip in clips}
    unscored = [clip for clip in clips if values[clip.name] is None]
    jobs = [DecodeJob(clip.source.path, clip.header, _preview(clip)) for clip in unscored]
    with DecodePool(workers=request.workers) as pool:
        bar = Bar(pool.decode_many(jobs), total=len(jobs), desc=f"scoring clips, {rule.name}", disable=not progress)
        for clip, (_, decoded) in zip(unscored, bar, strict=True):
            if isinstance(decoded, DataError):
                clip.replace_span(clip.span.dropped("unreadable", None, None, decoded.what))
                continue
            answer = score(rule, decoded.pixels.permute(1, 2, 3, 0).contiguous().numpy(), clip.name)
            state.write_score(clip.name, rule.path, answer)
            values[clip.name] = answer
    for clip in clips:
        value = values[clip.name]
        if value is not None:
            span = replace(clip.span, scores={**clip.span.scores, rule.name: value})
            clip.replace_span(span.dropped("score", value, rule.limit, rule.name) if rule.drops(value) else span)


def _preview(clip: _Clip) -> ClipPlan:
    """A few frames of a clip, small, as ``DecodePool`` cuts them."""
    top, left, height, width = clip.plan.crop
    scale = min(1.0, SHORT_SIDE / min(height, width))
    count = min(FRAMES, len(clip.plan.indices))
    places = [round(step * (len(clip.plan.indices) - 1) / max(1, count - 1)) for step in range(count)]
    return ClipPlan(
        tuple(clip.plan.indices[place] for place in places),
        (max(1, round(clip.header.height * scale)), max(1, round(clip.header.width * scale))),
        (int(top * scale), int(left * scale)),
        Bucket(count, max(1, int(height * scale)), max(1, int(width * scale))),
    )


def _cut_clips(request: PrepareRequest, sources: Sequence[Source], progress: bool) -> tuple[int, int]:
    """Make every clip that is not there; how many were copied and encoded."""
    there = clips_there(request.out)
    missing = [clip for clip in _kept(sources) if clip.name not in there]
    pixels = sum(len(clip.plan.indices) * clip.plan.resize_hw[0] * clip.plan.resize_hw[1] for clip in missing)
    require_space(
        request.out,
        round(_BYTES_PER_PIXEL * pixels),
        kind=DataError,
        what="the rest of the clips",
        fix="make room and run the same command again, which goes on; or name a folder on another disk with --out",
        files=len(missing) + 32,
    )
    jobs = ((clip, CutRequest(clip.source.path, clip.header, clip.plan)) for clip in missing)
    made = {True: 0, False: 0}
    with (
        PreparePool[_Clip](request.workers) as pool,
        Bar(total=len(missing), desc="cutting clips", disable=not progress) as bar,
    ):
        for clip, answer in pool.run(jobs):
            if isinstance(answer, DataError):
                clip.replace_span(clip.span.dropped("unreadable", None, None, answer.what))
            elif not _is_unchanged(clip.source):
                clip.replace_span(clip.span.dropped("unreadable", None, None, _CHANGED))
            elif isinstance(answer, MadeClip):
                atomic_write_bytes(request.out / clip.name, bytes(answer.content))
                made[answer.copied] += 1
            bar.update()
    return made[True], made[False]


def _finish(
    request: PrepareRequest,
    sources: Sequence[Source],
    unreadable: Sequence[str],
    notes: Sequence[str],
    made: tuple[int, int],
) -> PrepareReport:
    clips = len(_kept(sources))
    seconds = _seconds(sources)
    return PrepareReport(request.out, len(sources), clips, *made, seconds, tuple(unreadable), tuple(notes))


def _seconds(sources: Sequence[Source]) -> dict[str, float]:
    """Of the footage, by what became of it."""
    seconds: dict[str, float] = defaultdict(float)
    for source in sources:
        for span in source.spans:
            seconds[span.reason or "kept"] += span.seconds
    return dict(seconds)


def _nothing_left(out: Path, sources: Sequence[Source]) -> DataError:
    seconds = _seconds(sources)
    lost = ", ".join(f"{name} {value:.1f} s" for name, value in sorted(seconds.items(), key=lambda item: -item[1]))
    earlier = "; the clips of an earlier call and their captions stay" if clips_there(out) else ""
    return DataError(
        f"nothing is left of {sum(seconds.values()):.1f} s of footage: {lost}{earlier}",
        where=f"{out / LEDGER} has every second, with what was measured",
        fix="ask for shorter clips (--frames, --min-frames), or loosen the limit that drops most (--limit)",
    )
