"""The library's verbs, as functions: what each command does, for programs. Nothing heavy is imported before a call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, get_type_hints

if TYPE_CHECKING:
    from finetune.caching.check import DatasetReport
    from finetune.caching.precompute import PrecomputeReport
    from finetune.captioning.caption import CaptionReport
    from finetune.config.schema import RunConfig
    from finetune.convert.export import ExportReport
    from finetune.core.types import Bucket, SamplePrompt
    from finetune.diagnosis.report import DoctorReport
    from finetune.footage.prepare import PrepareReport
    from finetune.inference.generate import GenerateReport
    from finetune.planner.plan import Planned
    from finetune.trainers.loop import TrainReport
    from finetune.trainers.tracking import StepRecord

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of a wrong type as one ``ConfigError``; a configuration is checked by whoever reads it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        import inspect

        from pydantic import ConfigDict, create_model

        from finetune.config.document import Document
        from finetune.config.schema import validate
        from finetune.core import types

        bound = inspect.signature(function).bind(*args, **kwargs)  # TypeError for words that the function does not have
        given = {name: value for name, value in bound.arguments.items() if name != "config"}
        annotated = SimpleNamespace(__annotations__={name: function.__annotations__[name] for name in given})
        hints = get_type_hints(annotated, {**vars(types), **function.__globals__, "StepRecord": Any})
        fields: dict[str, Any] = {name: (hint, ...) for name, hint in hints.items()}
        model = create_model(function.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)
        bound.arguments.update(dict(validate(model, Document(given, name=f"{function.__name__}()"))))
        return function(*bound.args, **bound.kwargs)

    return call


def load_config(path: str | Path, overrides: str | Iterable[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Read a YAML configuration.

    Args:
        path: the file. Relative paths in it, and in the overrides, start at its folder.
        overrides: assignments such as ``optimizer.lr=2e-4``, applied in order as though the file had said so; the value
            is YAML, and ``data.sources.0.path=clips`` reaches into a list. A single string is one assignment. A mapping
            holds values instead of YAML: ``{"optimizer.lr": 2e-4}``, or nested, ``{"optimizer": {"lr": 2e-4}}``.

    Raises:
        ConfigError: if the file is unreadable or says something that a run cannot be; all faults are reported together,
            each with its line and column.
    """
    from finetune.config.schema import load_config

    return load_config(path, overrides)


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
    """Check a configuration, its model's JSON and every clip's header, without loading a weight.

    Args:
        config: a configuration, the values of one, or its file.

    Raises:
        ConfigError: naming everything that the model or the run cannot do.
        DataError: listing every row and file that cannot be used.
        ModelError: if the model's JSON cannot be found or used.
    """
    from finetune.caching.check import check_dataset, identities, overview
    from finetune.cogvideox.model_files import json_folder
    from finetune.cogvideox.spec import read_spec
    from finetune.config.rules import require_valid
    from finetune.config.schema import as_config

    config = as_config(config)
    spec = read_spec(str(json_folder(config.model.pretrained, config.model.revision)))
    warnings = require_valid(config, spec)
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
def plan(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    card: str | None = None,
    ram: str | None = None,
    budget: str | None = None,
    device: str | None = None,
    processes: int = 1,
    quantize: bool = False,
    plot: str | Path | None = None,
    exact: bool = False,
    as_json: bool = False,
) -> Planned:
    """Predict a run's memory, phase by phase, from its model's JSON; with ``budget``, choose its memory section first.

    Args:
        config: a configuration, the values of one, or its file.
        card: memory of the GPU, such as ``24GB``; None for the one that is here, if any.
        ram: host memory that the run may take.
        budget: search for the fastest memory section within this much GPU memory.
        device: name of the GPU to reckon seconds for; None for the one that is here, or an A100.
        processes: how many train a whole model each (DDP); the figures are of one of them.
        quantize: whether the search may quantise the base to be faster.
        plot: a PNG to draw the training step's curve into.
        exact: run every block, where two short models would do.
        as_json: a JSON document in place of tables.

    Raises:
        ConfigError: if an amount is none, the configuration does not fit the model, or nothing fits the budget.
        ModelError: if the model's JSON cannot be found or used.
    """
    from finetune.config.schema import as_config
    from finetune.planner.plan import PlanOptions
    from finetune.planner.plan import plan as plan_run

    drawing = None if plot is None else Path(plot)
    options = PlanOptions(card, ram, budget, device, processes, quantize, drawing, exact, as_json)
    return plan_run(as_config(config), options)


@checked
def precompute(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    shard: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: a configuration, the values of one, or its file.
        shard: such as ``3/16``: encode only the third of sixteen parts, in a process that knows nothing of the others.
            Who ends last of all merges them.
        merge: encode nothing; file the manifest of parts that were encoded so, if all of it is there and whole.
        progress: draw progress bars, on the main process.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    import logging

    from finetune.caching.parts import Part
    from finetune.caching.precompute import merge_parts, precompute
    from finetune.cogvideox.spec import read_spec
    from finetune.config.rules import pin_model, require_valid
    from finetune.config.schema import as_config
    from finetune.core.distributed import ProcessGroup
    from finetune.core.errors import ConfigError
    from finetune.planner.plan import choose_memory

    if merge and shard is not None:
        raise ConfigError("shard and merge are two steps", fix="run every shard first, then merge")
    part = None if shard is None else Part.parse(shard)
    ranks = ProcessGroup.current()
    config = pin_model(as_config(config), ranks.run_on_main)
    spec = read_spec(config.model.pretrained, config.model.revision)
    for warning in require_valid(config, spec) if ranks.is_main else ():
        logging.getLogger("finetune").warning(warning)
    config, _ = choose_memory(config)  # it decides how T5 is held
    if merge:
        return ranks.run_on_main(lambda: merge_parts(config, spec=spec, progress=progress))
    return precompute(config, spec=spec, distributed=ranks, progress=progress, part=part)


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
    from finetune.captioning.caption import CaptionOptions, caption_folder, read_instruction, token_limit
    from finetune.captioning.captioners import Captioner, EndpointCaptioner, LocalCaptioner
    from finetune.captioning.review import write_review

    text = read_instruction(None if instruction is None else Path(instruction))
    options = CaptionOptions(text, variants, frames, side, batch, replace)

    def captioner() -> Captioner:
        if endpoint is None:
            return LocalCaptioner(model, revision, device)
        return EndpointCaptioner(endpoint, model, key_variable, send=send, timeout_s=timeout_s)

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
        frames, fps = frames or spec.sample_frames, fps or float(spec.native_fps)
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


@checked
def train(
    config: RunConfig | Mapping[str, Any] | str | Path, *, on_step: Callable[[StepRecord], None] | None = None
) -> TrainReport:
    """Train as ``config`` says: fill the cache if need be, continue or begin the run, and save what was learnt.

    Args:
        config: a configuration, the values of one, or its file.
        on_step: called on the main process after each optimizer step, with its number, losses and times; what it raises
            ends the run as it is.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError, ModelError: before any training, with what to mend.
        CacheError: in training, if an entry turned out to be damaged; the steps before it are saved.
        TrainingError: a loss or gradient was not finite, gradient checkpointing did not recompute, or the GPU's memory
            does not hold a step.
        LaunchError: another process of the launch failed or is gone.
    """
    from finetune.trainers.loop import train

    return train(config, on_step)


@checked
def export(
    source: str | Path,
    to: str | Path | None = None,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    full_pipeline: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
    pretrained: str | Path | None = None,
    merged: bool = False,
    strength: float = 1.0,
) -> ExportReport:
    """Export a run or one of its checkpoints.

    A LoRA becomes ``pytorch_lora_weights.safetensors`` with its settings in the header, or merged into its base a
    ``transformer`` folder, which is what a full fine-tuning becomes in any case. All get a model card, a record for
    programs and the run's sampled videos.

    Args:
        source: a run's folder, or one checkpoint's.
        to: the export's folder, replaced if it is an earlier export; None for ``<run>/export``, or ``<run>/merged``.
        checkpoint: of a run's folder, the newest checkpoint or the one with the lowest held-out loss.
        full_pipeline: put the base's other components beside a whole transformer, so that the folder is a whole
            pipeline (hard links where the file system has them, copies elsewhere).
        weights: the moving average or the trained weights themselves; ``auto`` takes the average if one was kept.
        pretrained: where the base model is now, if not where the run had it.
        merged: put the adapter into the base's weights; a full fine-tuning is whole already, and exported as ever.
        strength: how much of the adapter is merged: 1 as trained, 0 none of it.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the message names those of the run that are whole.
        ModelError: if the base model cannot be found or loaded.
        ExportError: if what was written does not give back what was trained.
    """
    from finetune.convert.export import ExportOptions, export

    options = ExportOptions(
        checkpoint, full_pipeline, weights, None if pretrained is None else str(pretrained), merged, strength
    )
    return export(Path(source).expanduser(), None if to is None else Path(to).expanduser(), options)


@checked
def generate(
    prompts: str | Sequence[str | SamplePrompt],
    out: str | Path = Path("videos"),
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    transformer: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] = (),
    images: str | Path | Sequence[str | Path] = (),
    seed: int = 0,
    bucket: str | Bucket | None = None,
    fps: float | None = None,
    negative_prompt: str = "",
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    dynamic_cfg: bool = False,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    offload: bool = False,
    device: str | None = None,
) -> GenerateReport:
    """Sample a video for each prompt from a base model with any number of adapters.

    Args:
        prompts: one text or several; a ``SamplePrompt`` has an image and a seed of its own.
        out: folder for the videos.
        model: the base model, a folder or a hub id; None for what the first adapter was trained on.
        revision: branch, tag or commit of a hub id.
        transformer: a fully fine-tuned transformer in place of the base's, from an export.
        adapters: LoRAs, each a file, an export, a checkpoint or a run, as ``PATH`` or ``PATH:STRENGTH``.
        images: first frames, for image-to-video models: one for all texts, or one for each.
        seed: of the first text; each further one has the next.
        bucket: frames x height x width, such as ``49x480x720``; None: as the first adapter was trained.
        fps: of the written files; None: as the first adapter was trained.
        negative_prompt: what to steer away from.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 for none.
        dynamic_cfg: let the guidance grow with the steps.
        dtype: what to compute in.
        offload: keep on the GPU only the component that runs; slower.
        device: such as ``cuda:1`` or ``cpu``; None for the GPU if there is one.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image cannot be read.
    """
    from finetune.core.errors import ConfigError
    from finetune.datasets.geometry import parse_bucket
    from finetune.inference.generate import generate
    from finetune.inference.request import GenerateRequest, parse_adapter, prompts_with_seeds

    listed = [adapters] if isinstance(adapters, str | Path) else adapters
    frames = [images] if isinstance(images, str | Path) else images
    items = [prompts] if isinstance(prompts, str) else prompts
    texts = [item for item in items if isinstance(item, str)]
    seeded = iter(prompts_with_seeds(texts, [*map(Path, frames)], seed=seed))
    try:
        shape = None if bucket is None else parse_bucket(bucket)
    except ValueError as error:
        raise ConfigError(str(error), where=f"--bucket {bucket}") from None
    return generate(
        GenerateRequest(
            base=None if model is None else str(model),
            prompts=tuple(next(seeded) if isinstance(item, str) else item for item in items),
            out=Path(out),
            revision=revision,
            transformer=None if transformer is None else Path(transformer),
            adapters=tuple(parse_adapter(str(adapter)) for adapter in listed),
            bucket=shape,
            fps=fps,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            dynamic_cfg=dynamic_cfg,
            dtype=dtype,
            offload=offload,
            device=device,
        )
    )
