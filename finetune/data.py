"""Functions of the library on clips and captions; each loads what it needs when it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.arguments import checked

if TYPE_CHECKING:
    from finetune.caching.check import DatasetReport
    from finetune.captioning.caption import CaptionReport
    from finetune.config.schema import RunConfig
    from finetune.diagnosis.report import DoctorReport
    from finetune.footage.prepare import PrepareReport


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found; ``str()`` of it is what the command prints."""

    dataset: DatasetReport
    """Every clip, and what is to be said of the dataset."""
    numbers: tuple[tuple[str, str], ...]
    """What follows for the run, as (label, value)."""
    warnings: tuple[str, ...]
    """What is possible and unwise."""

    def __str__(self) -> str:
        return "\n".join([str(self.dataset), *(f"{label:>16}: {value}" for label, value in self.numbers)])


def check(config: RunConfig | Mapping[str, Any] | str | Path) -> CheckReport:
    """Check a configuration, its model's JSON, the adapters that it begins with and every clip's header; no weight of
    the model is loaded.

    Args:
        config: a configuration, the values of one, or its file.

    Raises:
        ConfigError: naming everything that the model or the run cannot do.
        DataError: listing every row and file that cannot be used.
        ModelError: if the model's JSON cannot be found or used.
    """
    from finetune.caching.check import check_dataset, identities, overview
    from finetune.cogvideox.spec import spec_of
    from finetune.config.rules import require_start, require_valid
    from finetune.config.schema import as_config

    config = as_config(config)
    spec = spec_of(config.model, shipped=True)
    warnings = require_valid(config, spec)
    require_start(config)
    dataset = check_dataset(config, spec)
    numbers, advice = overview(config, spec, dataset.clips, identities(config, dataset.clips, progress=True))
    return CheckReport(dataset, tuple(numbers), (*warnings, *advice))


@checked
def doctor(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    page: str | Path | None = None,
    card: str | None = None,
    device: str | None = None,
    predict: bool = False,
    vae: bool = False,
    progress: bool = True,
) -> DoctorReport:
    """Look at everything that a run would train on: headers, a few frames of every clip, captions, and what it takes.

    Args:
        config: a configuration, the values of one, or its file.
        page: the HTML file to write; None for none.
        card: memory of the GPU, such as ``24GB``; None for ``memory.budget``, or the one that is here.
        device: name of the GPU to reckon seconds for; None for the one that is here, or an A100.
        predict: wait for the prediction of memory however long it takes; else it is there if it was made before.
        vae: load the VAE, put every clip through it, and show the frames that suffer most.
        progress: draw bars.

    Raises:
        ConfigError: if the configuration does not fit the model, or ``card`` is no amount.
        DataError: if the sources cannot be read at all, or name files that are not there; what else is wrong with clips
            and captions stands in the report.
        ModelError: if the model's JSON cannot be found or used.
    """
    from finetune.config.schema import as_config
    from finetune.diagnosis.doctor import DoctorOptions, doctor

    options = DoctorOptions(None if page is None else Path(page), card, device, predict, vae)
    return doctor(as_config(config), options, progress=progress)


@checked
def caption(
    folder: str | Path,
    *,
    model: str = "Qwen/Qwen3-VL-8B-Instruct",
    revision: str | None = None,
    endpoint: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    send: Literal["auto", "video", "images"] = "auto",
    timeout_s: float = 120.0,
    target: str = "5b",
    instruction: str | Path | None = None,
    variants: int = 1,
    frames: int = 16,
    side: int = 448,
    batch: int = 4,
    replace: bool = False,
    review: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> CaptionReport:
    """Write the captions that a folder of clips lacks, with a video-language model; people's own captions are kept.

    What is captioned stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        folder: with a ``metadata.jsonl``, or with clips, which may have a ``.txt`` beside them.
        model: of transformers, image-text-to-text: a folder or a hub id; with an endpoint, its name there.
        revision: branch, tag or commit on the hub.
        endpoint: base address of an OpenAI-compatible server that is asked instead.
        key_variable: the environment variable that holds its key.
        send: to an endpoint, the clip itself, pictures of it, or the first of both that it takes.
        timeout_s: for one request to it.
        target: the CogVideoX that will read the captions, whose tokenizer counts them.
        instruction: a file with what the model is asked; None for the one that ships.
        variants: captions per clip.
        frames: shown of a clip, at most.
        side: longest side of a shown frame, in pixels.
        batch: clips that are asked about side by side.
        replace: write captions anew that another model, or another instruction, wrote.
        review: a page to write afterwards, with every clip beside its caption, to be changed and saved in a browser.
        device: such as ``cuda:1`` or ``cpu``; None for a GPU where there is one.
        progress: draw a bar.

    Raises:
        ConfigError: if an argument is out of bounds, or another process captions the folder.
        DataError: if the folder, its table or its record cannot be used, or too many clips in a row failed.
        ModelError: if the model, the tokenizer or the endpoint cannot be had.
    """
    from finetune.captioning.answers import token_limit
    from finetune.captioning.caption import CaptionOptions, caption_folder, read_instruction
    from finetune.captioning.captioners import Captioner, EndpointCaptioner, LocalCaptioner
    from finetune.captioning.review import write_review

    text = read_instruction(None if instruction is None else Path(instruction))
    options = CaptionOptions(text, variants, frames, side, batch, replace)

    def captioner() -> Captioner:
        if endpoint is None:
            return LocalCaptioner(model, revision, device)
        return EndpointCaptioner(endpoint, model, key_variable, send=send, timeout_s=timeout_s)

    if not Path(folder).is_dir():
        from finetune.core.errors import DataError

        raise DataError("there is no such folder", where=str(folder), fix="name a folder of clips")
    limit = token_limit(target)
    report = caption_folder(Path(folder), captioner, limit, options, progress=progress)
    if review is not None:
        write_review(Path(folder), limit, Path(review), progress=progress)
    return report


@checked
def prepare(
    raw: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    frames: int | None = None,
    fps: float | None = None,
    min_frames: int | None = None,
    keep_fps: bool = False,
    short_side: int | None = 1080,
    crop_bars: bool = True,
    detector: Literal["adaptive", "content", "threshold", "transnet"] = "adaptive",
    threshold: float | None = None,
    limits: Mapping[str, float | None] | None = None,
    scorers: Sequence[str] = (),
    report: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> PrepareReport:
    """Make a dataset from a tree of videos: scenes, filters, clips, ``metadata.jsonl``, and a ledger of every second.

    Killed at any moment, the same call goes on and ends with the same files. Originals are only read. Clips come
    without captions, and an earlier call's are kept. ``docs/data.md`` explains what is measured.

    Args:
        raw: the folder that holds the footage, in any number of sub-folders.
        out: the dataset's folder; new, empty, or an earlier call's.
        model: whose frames and rate clips have, a name, hub id or folder; None for CogVideoX's 49 frames at 8 fps.
        frames: of a clip, in place of the model's.
        fps: of a clip, in place of the model's.
        min_frames: take shorter clips too, of at least so many frames, where a scene ends.
        keep_fps: keep the source's own frames in the files; exact cuts are then copied without being encoded.
        short_side: larger pictures are scaled down to so many pixels; None for never.
        crop_bars: cut away black bars.
        detector: of scenes.
        threshold: of the detector, in its own unit; None for its default.
        limits: fields of ``footage.filters.Limits`` that differ from its defaults; None switches one off.
        scorers: import paths such as ``my_scorers:aesthetic>=5``; see ``footage.scorers``.
        report: write the ledger as a page with pictures, too: ``ledger.html``.
        workers: processes that read the footage; 0 reads it in this one, without limits on memory and time.
        progress: draw progress bars.

    Raises:
        ConfigError: if a library of the extra ``prepare`` is missing, or an argument, folder or scorer cannot be used.
        DataError: if there is no video, nothing of the footage is left (the ledger says why), or the disk is full.
        ModelError: if the model's JSON cannot be found or used.
    """
    from finetune.config.document import Document
    from finetune.config.schema import validate
    from finetune.footage.filters import ClipShape, Limits
    from finetune.footage.prepare import PrepareRequest, prepare

    if model is not None:
        from finetune.cogvideox.model_files import json_folder
        from finetune.cogvideox.spec import read_spec

        spec = read_spec(str(json_folder(str(model))))
        frames = spec.sample_frames if frames is None else frames
        fps = float(spec.native_fps) if fps is None else fps
    shape: dict[str, object] = {
        "min_frames": min_frames,
        "keep_fps": keep_fps,
        "short_side": short_side,
        "crop_bars": crop_bars,
    }
    shape |= {name: value for name, value in {"frames": frames, "fps": fps}.items() if value is not None}
    request = PrepareRequest(
        Path(raw).expanduser(),
        Path(out).expanduser(),
        validate(ClipShape, Document(shape, name="prepare()")),
        validate(Limits, Document(dict(limits or {}), name="the limits of prepare()")),
        detector,
        threshold,
        tuple(scorers),
        report,
        workers,
    )
    return prepare(request, progress=progress)
