"""Filling the cache, and trusting it.

``precompute`` encodes what the cache lacks of a dataset: clips with the VAE, then captions with T5. ``ensure_cache``
is what training calls: where a recorded manifest still answers the configuration, no video and no encoder is opened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.caching.check import UNREADABLE, named, note_line, workers_for
from finetune.caching.encode import Failure, Passed, encode_captions, encode_clips
from finetune.caching.plan import CachePlan, ImageJob, plan_cache, require_room
from finetune.caching.request import CacheAnswer, find_manifest
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.loading import as_config
from finetune.config.rules import pin_model, require_valid
from finetune.config.schema import RunConfig
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CacheError, DataError, raise_all
from finetune.core.files import from_here, human_size
from finetune.datasets.cache import Cache
from finetune.datasets.cache_entries import KINDS, Kind, Manifest
from finetune.datasets.decode_pool import DecodePool

_TITLES: Mapping[Kind, str] = {"latents": "clips", "prompts": "captions", "images": "images"}


@dataclass(frozen=True)
class PrecomputeReport:
    """What one call of ``precompute`` did; its text is a table."""

    manifest: Manifest
    cache_dir: Path
    encoded: Mapping[Kind, int]
    """Entries written, over all processes."""
    reused: Mapping[Kind, int]
    """Entries that were there already."""
    skipped: Mapping[str, int]
    """Clips left out, by reason."""
    bytes: int
    """On disk, of every entry that the dataset needs."""
    written_bytes: int
    seconds: float

    @property
    def gib(self) -> float:
        """Size of the dataset's entries in GiB."""
        return self.bytes / 2**30

    def __str__(self) -> str:
        lines = [f"cache {from_here(self.cache_dir)}", f"{'':<10}{'encoded':>10}{'reused':>10}"]
        lines += [
            f"{_TITLES[kind]:<10}{self.encoded[kind]:>10}{self.reused[kind]:>10}"
            for kind in KINDS
            if self.encoded[kind] or self.reused[kind]
        ]
        lines += [f"left out  {count:>10}  {reason}" for reason, count in self.skipped.items()]
        lines.append(f"{human_size(self.bytes)}, {human_size(self.written_bytes)} of it new; {self.seconds:.1f} s")
        lines += [f"bucket {bucket}: {kept}" for bucket, kept in self.manifest.kept.items()]
        return "\n".join([*lines, *map(note_line, self.manifest.notes)])


def precompute(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    spec: ModelSpec | None = None,
    distributed: ProcessGroup | None = None,
    progress: bool = True,
) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: the run's configuration, its values, or its file (``config.as_config``).
        spec: of its model; read from it if None.
        distributed: the processes that take part; those of the launch if None.
        progress: draw progress bars, on the main process.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    config = as_config(config)
    ranks = distributed or ProcessGroup.current()
    config = pin_model(config, ranks.run_on_main)
    spec = spec or read_spec(config.model.pretrained, config.model.revision)
    cache = Cache(config.cache.dir)
    with cache.in_use("precompute", quiet=not ranks.is_main):
        return _precompute(config, spec, cache, ranks, progress=progress and ranks.is_main)


def _precompute(
    config: RunConfig, known: ModelSpec, cache: Cache, ranks: ProcessGroup, *, progress: bool
) -> PrecomputeReport:
    begun = time.perf_counter()

    def prepare() -> CachePlan:
        require_valid(config, known)
        plan = plan_cache(config, known, cache, progress=progress)
        require_room(plan, cache.root)
        if any(plan.missing.values()):  # should this process die, its entries are still wanted
            cache.save_manifest(plan.manifest.pending(), config.base)
        return plan

    plan = ranks.run_on_main(prepare)
    mine = slice(ranks.rank, None, ranks.world)
    passed: dict[Kind, list[Passed]] = {
        # First, because it takes no time and a damaged image should not be found after hours.
        "images": ranks.run_on_all(
            lambda: _store_images(plan.images[mine], cache, workers_for(config, len(plan.images), ranks.world))
        ),
        "latents": ranks.run_on_all(
            lambda: encode_clips(
                plan.latents[mine],
                cache,
                config.model,
                config.cache,
                device=ranks.device,
                workers=workers_for(config, len(plan.latents), ranks.world),
                progress=progress,
            )
        ),
        "prompts": ranks.run_on_all(
            lambda: encode_captions(
                plan.prompts[mine],
                cache,
                config.model,
                known,
                batch_size=config.cache.text_batch_size,
                device=ranks.device,
                text_encoder=config.memory.text_encoder,
                progress=progress,
            )
        ),
    }
    return ranks.run_on_main(lambda: _finish(config, known, cache, plan, passed, time.perf_counter() - begun))


def _store_images(jobs: Sequence[ImageJob], cache: Cache, workers: int) -> Passed:
    """Store validation images as the pixels that sampling starts from; the VAE that decodes the video encodes them."""
    size = 0
    with DecodePool(min(workers, len(jobs))) as pool:
        for job, image in zip(jobs, pool.load_images((job.image, job.bucket) for job in jobs), strict=True):
            if isinstance(image, DataError):
                raise image
            size += cache.write_image(job.address, image)
    return Passed(len(jobs), size)


def _finish(
    config: RunConfig,
    spec: ModelSpec,
    cache: Cache,
    plan: CachePlan,
    passed: Mapping[Kind, Sequence[Passed]],
    seconds: float,
) -> PrecomputeReport:
    """Settle what could not be decoded, file the manifest and count."""
    failures = [failure for one in passed["latents"] for failure in one.failures]
    if failures and config.data.unreadable_clips == "error":
        raise_all(
            DataError,
            [failure.error for failure in failures],
            what="{n} clips could not be encoded; all others are in the cache",
        )
    manifest = _without(plan.manifest, failures)
    if all(item.holdout for item in manifest.items):
        raise_all(DataError, [failure.error for failure in failures], what="no clip is left to train on; {n} failed")
    manifest = replace(manifest, notes=(*manifest.notes, *_cut_captions(manifest, cache, spec)))
    cache.save_manifest(manifest, config.base)
    encoded: dict[Kind, int] = {kind: sum(one.encoded for one in passed[kind]) for kind in KINDS}
    sizes = [cache.size(kind, key) for kind in KINDS for key in manifest.keys(kind)]
    return PrecomputeReport(
        manifest=manifest,
        cache_dir=cache.root,
        encoded=encoded,
        reused={kind: len(plan.manifest.keys(kind)) - plan.missing[kind] for kind in KINDS},
        skipped=manifest.skipped,
        bytes=sum(sizes),
        written_bytes=sum(one.bytes for kind in KINDS for one in passed[kind]),
        seconds=seconds,
    )


def _without(manifest: Manifest, failures: Sequence[Failure]) -> Manifest:
    """The manifest without the clips that failed, counted as unreadable."""
    failed = {failure.key for failure in failures}
    items = tuple(item for item in manifest.items if item.latents_key not in failed)
    lost = len(manifest.items) - len(items)
    if not lost:
        return manifest
    skipped = {**manifest.skipped, UNREADABLE: manifest.skipped.get(UNREADABLE, 0) + lost}
    notes = [f"left out: {failure.error.where}: {failure.error.what}" for failure in failures]
    return replace(manifest, items=items, skipped=skipped, notes=(*manifest.notes, *notes))


def _cut_captions(manifest: Manifest, cache: Cache, spec: ModelSpec) -> list[str]:
    """A note on captions longer than the model reads."""
    captions = {item.prompt_key: item.caption for item in manifest.items}
    captions |= {key: prompt for prompt, key in manifest.prompts.items()}
    cut = [text for key, text in captions.items() if cache.prompt_tokens(key) > spec.max_text_seq_length]
    if not cut:
        return []
    shown = named(repr(text if len(text) <= 60 else text[:57] + "...") for text in cut)
    return [f"captions are longer than the {spec.max_text_seq_length} tokens the model reads, and are cut: {shown}"]


def ensure_cache(
    config: RunConfig,
    spec: ModelSpec,
    *,
    distributed: ProcessGroup | None = None,
    progress: bool = True,
    cleanup: ExitStack | None = None,
) -> Manifest:
    """The manifest that training reads from, every entry of it in the cache.

    A recorded manifest is trusted when the configuration, the encoders and every source file are what they were. If
    there is none, ``cache.mode: auto`` precomputes and ``require`` raises; ``require`` also accepts that source files
    are not on this machine. What is done is printed on the main process.

    Args:
        config: the run's configuration.
        spec: of its model.
        distributed: the processes that take part; those of the launch if None.
        progress: draw progress bars, on the main process.
        cleanup: takes the lock that keeps ``cache gc`` from deleting the manifest's entries, which so lasts until this
            is closed; without it, until the call returns.

    Raises:
        CacheError: in mode ``require``, naming what differs; or as ``precompute`` does.
        DataError, ModelError: as ``precompute`` does.
    """
    ranks = distributed or ProcessGroup.current()
    cache = Cache(config.cache.dir)
    with ExitStack() as until_return:
        (cleanup or until_return).enter_context(cache.in_use("train", quiet=not ranks.is_main))
        manifest = ranks.run_on_main(lambda: _trusted(config, find_manifest(config, spec, cache), cache))
        if manifest is None:
            report = _precompute(config, spec, cache, ranks, progress=progress and ranks.is_main)
            if ranks.is_main:
                print(report, flush=True)
            manifest = report.manifest
    return manifest


def _trusted(config: RunConfig, answer: CacheAnswer, cache: Cache) -> Manifest | None:
    """The manifest if it can be used as it is, None if something has to be encoded or planned first."""
    require = config.cache.mode == "require"
    if answer.faults:
        if require:
            raise CacheError(
                "the cache does not hold what this run needs, and cache.mode is require\n" + _listed(answer.faults),
                where=str(cache.root),
                fix="run `finetune precompute` where the videos and the encoders are, or set cache.mode: auto",
            )
        print(f"cache {from_here(cache.root)} has to be brought up to date:\n{_listed(answer.faults)}", flush=True)
        return None
    manifest = answer.manifest
    assert manifest is not None  # an answer without faults has one
    if answer.absent and not require:
        raise CacheError(
            f"files that the cache was made from are not on this machine: {named(answer.absent)}",
            where=str(cache.root),
            fix="bring them back, or set cache.mode: require to train from the cache alone",
        )
    with suppress(OSError):  # `gc --unused-days` goes by this time; a cache may be read-only
        os.utime(cache.root / "manifests" / f"{manifest.name}.json")
    held = sum(item.holdout for item in manifest.items)
    print(
        f"cache {from_here(cache.root)}: complete, {len(manifest.items)} clips ({held} held out), nothing to encode",
        flush=True,
    )
    if answer.absent:
        print(f"note: source files are not on this machine and were not compared: {named(answer.absent)}", flush=True)
    if answer.outdated:
        print(
            "warning: an older version read the videos' headers. If some are upside-down, stretched, interlaced, HDR or"
            " transparent, run `finetune precompute` where the videos are: it encodes those anew and no other",
            flush=True,
        )
    if answer.unknown:
        print(f"note: not on this machine and not compared: {', '.join(answer.unknown)}", flush=True)
    return manifest


def _listed(lines: Sequence[str], limit: int = 12) -> str:
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([*(f"  {line}" for line in lines[:limit]), *more])
