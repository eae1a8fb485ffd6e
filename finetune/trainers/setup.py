"""A run, put together in the order in which mistakes are cheapest to find.

Configuration against the model's JSON, then the cache, then the checkpoint to continue from; only then are weights
loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.caching.check import run_advice
from finetune.caching.encode import release_memory
from finetune.caching.precompute import ensure_cache, other_data
from finetune.checkpoint.compare import Difference, require_same_run
from finetune.checkpoint.folders import clear_interrupted
from finetune.checkpoint.load import CheckpointHead, LoadedCheckpoint, checkpoint_to_continue, head_to_continue
from finetune.cogvideox.load import base_digest, require_as_sent, require_base
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.objective import alpha_bar
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.config.rules import pin_model, require_start, require_valid
from finetune.config.schema import RunConfig
from finetune.core import locks
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError, DataError, ModelError
from finetune.core.files import atomic_write_text, disk_fix
from finetune.core.gpu import grow_segments
from finetune.core.precision import without_reduced_precision
from finetune.core.rng import deterministic_kernels, repeatability
from finetune.core.types import RunState
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker, Loader, unconditional_prompt
from finetune.datasets.manifests import WARNING, Manifest
from finetune.datasets.schedule import Item, StepPlan
from finetune.inference.adapters import read_sources
from finetune.inference.request import AdapterArgument
from finetune.memory.attention import AttentionRequest, attention_kernel, choose_kernel, require_kernel
from finetune.memory.quantized_linear import placement
from finetune.methods.lora import LoraMethod
from finetune.methods.merged_base import load_base
from finetune.optim.ema import Ema
from finetune.parallel.context import ContextGroup, divide
from finetune.planner.cost_model import card_here, held_note
from finetune.planner.plan import BackgroundPrediction, choose_memory, predict_async
from finetune.trainers.console import Console
from finetune.trainers.launch import Launch, Replicate, make_accelerator, make_strategy, read_launch, require_launch
from finetune.trainers.run import Run, RunData, TrainedModel
from finetune.trainers.tracking import Tracker, require_tracker, tensorboard_command


def setup_run(config: RunConfig, cleanup: ExitStack) -> Run:
    """Put a run together; what must be closed in the end is left with ``cleanup``.

    Raises:
        FinetuneError: of the kind that names what has to be mended, before any training.
    """
    # All before anything touches a GPU.
    cleanup.enter_context(deterministic_kernels(config.train.deterministic))
    cleanup.enter_context(without_reduced_precision())
    grow_segments()
    launch = read_launch(os.environ)
    ranks = ProcessGroup.current(sharding=not isinstance(launch, Replicate))
    cleanup.callback(ranks.close)

    config = pin_model(config, ranks.run_on_main)
    spec = spec_of(config.model)
    warnings = require_valid(config, spec)
    require_launch(launch, config, spec, ranks)
    ranks = replace(ranks, context=config.parallel.context)
    attention = attention_request(config, spec, ranks.device)
    require_kernel(config.model.attention, attention, where=config.where("model.attention"))
    config, choice = choose_memory(config)
    accelerator = make_accelerator(config.train.accumulation, **config.tracking.accelerator_options(config.output_dir))
    require_tracker(config, accelerator)
    for line in [*(f"warning: {warning}" for warning in warnings), *choice]:
        accelerator.print(line)

    ranks.run_on_main(lambda: require_start(config))
    cleanup.enter_context(hold_run_folder(config.output_dir, ranks, accelerator.print))
    trained_on = ranks.run_on_main(lambda: _require_continuable(config, ranks))  # before hours of encoding
    cache = Cache(config.cache.dir)
    # Until the run ends nothing that it reads is collected as garbage.
    cleanup.enter_context(cache.in_use("train", quiet=not ranks.is_main))
    manifest = ensure_cache(config, spec, cache=cache, distributed=ranks, continues=trained_on)
    data = _run_data(config, spec, manifest, cache, ranks)
    cleanup.callback(data.loader.close)
    val_videos = len({item.media_digest for item in data.val.items})  # copies of one count once
    for advice in run_advice(config, data.plan, data.total_steps, val_videos=val_videos):
        accelerator.print(f"warning: {advice}")
    saved = _checkpoint_to_continue(config, data, ranks)

    def require_base_as_sent() -> None:
        folder = resolve_pretrained(config.model.pretrained, config.model.revision, components=["transformer"])
        require_as_sent(folder, "transformer", data.cache.digest_file)

    ranks.run_on_main(require_base_as_sent)
    config = _choose_attention(config, attention, saved, cleanup, accelerator.print, ranks)
    prediction = _predict_peak(config, launch, ranks)  # while the model is read
    if prediction is not None:
        cleanup.callback(prediction.close)
    model, base = _trained_model(config, spec, launch, ranks, accelerator, saved)
    state = replace(RunState(0, manifest.digest) if saved is None else saved.state, base=base)

    tracker = Tracker(config.tracking, accelerator, settings=config.to_dict(), resumed_step=state.step)
    cleanup.callback(tracker.close)
    console = Console(
        data.total_steps,
        interval_s=config.tracking.console_interval_s,
        enabled=ranks.is_main,
        memory_gib=_memory_gib(ranks.device),
    )
    cleanup.callback(console.close)
    run = Run(
        config=config,
        data=data,
        model=model,
        state=state,
        resumed_from=None if saved is None else saved.path,
        tracker=tracker,
        console=console,
        prediction=prediction,
        weights=state.weights,
    )
    ranks.run_on_main(lambda: atomic_write_text(config.output_dir / "config.yaml", config.to_yaml()))
    if saved is not None and not saved.state.base:
        console.note(f"{saved.path.name} does not record which base transformer it was trained on; the next one does")
    if saved is None and (warning := _other_base(config, base)):
        console.note(f"warning: {warning}")
    for label, value in run_sheet(run):
        console.note(f"{label:>24}: {value}")
    return run


# --------------------------------------------------------------------------------- a run's folder: one job writes to it


@contextmanager
def hold_run_folder(run_dir: Path, ranks: ProcessGroup, tell: Callable[[str], object]) -> Iterator[None]:
    """Write to a run's folder as the only job that does, and clear away what a killed one left half done.

    All processes of a launch are one job: the main process locks the folder for them.

    Args:
        run_dir: the run's folder; made if need be.
        ranks: this launch.
        tell: prints a line for a person.

    Raises:
        CheckpointError: if another job writes to the folder, or the folder cannot be written to.
    """
    with ExitStack() as lock:

        def acquire() -> None:
            try:
                try:
                    lock.enter_context(locks.hold_alone(run_dir / ".lock", "train", tell))
                except locks.NoLocksError:
                    tell(f"note: {run_dir}: its file system has no locks, so a second training would not be refused")
                clear_interrupted(run_dir)
            except locks.HeldError as holder:
                raise CheckpointError(
                    f"another training writes to this run folder: {holder}",
                    where=str(run_dir),
                    fix="wait for it or stop it; for a second run choose another output_dir",
                ) from None
            except OSError as error:
                raise CheckpointError(
                    f"the run folder cannot be written to: {error.strerror or error}",
                    where=str(run_dir),
                    fix=disk_fix(error),
                ) from error

        ranks.run_on_main(acquire)
        yield


# ------------------------------------------------------------------------------------------ data, checkpoint and model


def _run_data(config: RunConfig, spec: ModelSpec, manifest: Manifest, cache: Cache, ranks: ProcessGroup) -> RunData:
    empty = unconditional_prompt(cache, manifest.empty_prompt_key, config.data)
    parts = ([item for item in manifest.items if item.holdout == holdout] for holdout in (False, True))
    training, val = (
        BatchMaker(spec, cache, items, empty, config.data, config.train.seed, config.objective) for items in parts
    )
    if not training.items:
        raise DataError(
            "no clip is left to train on",
            where=f"{len(val.items)} clips, all held out",
            fix="lower data.holdout, or add a source with split: train",
        )
    plan = StepPlan(
        items=tuple(Item(item.bucket, item.repeats) for item in training.items),
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        micro_batches=config.train.accumulation * ranks.data_world,
    )
    total_steps = config.train.steps or plan.steps_for_epochs(config.train.epochs or 1)
    rank, processes, device = ranks.data_rank, ranks.data_world, ranks.device
    loader = Loader(plan, training.training, rank=rank, processes=processes, total_steps=total_steps, device=device)
    return RunData(cache, manifest, training, val, plan, loader, total_steps)


def _require_continuable(config: RunConfig, ranks: ProcessGroup) -> str | None:
    """Refuse a configuration that the run cannot go on with, by what its checkpoint says of itself.

    Returns:
        The digest of the data that it was trained on; None for a run that begins.
    """
    head = head_to_continue(config.output_dir, config.checkpoint.resume)
    if head is None:
        return None
    _changes(config, head, ranks)
    # With clips left out that cannot be read, it is not known which these are before they are read.
    return head.state.cache_digest if config.data.unreadable_clips == "error" else None


def _changes(config: RunConfig, saved: CheckpointHead, ranks: ProcessGroup) -> list[Difference]:
    settings = config.to_dict()
    if config.model.attention == "auto":  # which goes on with what it chose before
        settings["model"]["attention"] = _recorded_attention(saved)
    return require_same_run(
        saved.config,
        settings,
        where=str(saved.path),
        processes=(saved.processes, ranks.world),
        identified=bool(saved.state.base),
    )


def _checkpoint_to_continue(config: RunConfig, data: RunData, ranks: ProcessGroup) -> LoadedCheckpoint | None:
    """The checkpoint that the run continues from, compared with what the run is to be."""
    saved = checkpoint_to_continue(config.output_dir, config.checkpoint.resume, ranks)
    if saved is None:
        return None
    state, where = saved.state, str(saved.path)
    for change in _changes(config, saved, ranks):
        if ranks.is_main:
            print(f"continuing with {change}", flush=True)
    if state.cache_digest != data.manifest.digest:
        raise other_data(f"{where} against {config.cache.dir}")
    if state.step > data.total_steps:
        raise CheckpointError(
            f"the checkpoint has taken {state.step} steps, and the run is to take {data.total_steps}",
            where=where,
            fix="set train.steps (or train.epochs) to no less, or train anew into another output_dir",
        )
    if state.samples_seen != (planned := data.plan.samples_until(state.step)):
        raise CheckpointError(
            f"the checkpoint has seen {state.samples_seen} samples in {state.step} steps, and the plan has {planned}",
            where=where,
            fix="it was changed after it was written: bring its state.json back, or use another checkpoint of the run",
        )
    return saved


def attention_request(config: RunConfig, spec: ModelSpec, device: torch.device) -> AttentionRequest:
    buckets = {*config.data.trained_buckets, *filter(None, (config.validation.bucket,))}
    return AttentionRequest(
        device=device,
        dtype=config.model.torch_dtype(),
        batch=min(config.memory.clips_at_once or config.train.batch_size, config.train.batch_size),
        heads=max(1, spec.num_attention_heads // config.parallel.context),  # of which each process has a share
        head_dim=spec.attention_head_dim,
        lengths=tuple(sorted(map(spec.tokens, buckets))),
        deterministic=config.train.deterministic,
    )


def _recorded_attention(saved: CheckpointHead | None) -> Any:
    return "auto" if saved is None else saved.config.get("model", {}).get("attention", "auto")


def _choose_attention(
    config: RunConfig,
    request: AttentionRequest,
    saved: LoadedCheckpoint | None,
    cleanup: ExitStack,
    tell: Callable[[str], object],
    ranks: ProcessGroup,
) -> RunConfig:
    """The run with the kernel that computes attention from here until ``cleanup``: one for all processes."""
    kernel = config.model.attention
    if kernel == "auto":
        choice = ranks.run_on_main(lambda: choose_kernel(request, recorded=_recorded_attention(saved)))
        if request.device.type == "cuda":
            release_memory()  # of what was timed
        for line in choice.lines:
            tell(line)
        kernel = choice.kernel
    cleanup.enter_context(attention_kernel(kernel))
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": kernel})})


def _trained_model(
    config: RunConfig,
    spec: ModelSpec,
    launch: Launch,
    ranks: ProcessGroup,
    accelerator: Any,
    saved: LoadedCheckpoint | None,
) -> tuple[TrainedModel, str]:
    """The transformer with what trains in it, at the checkpoint's weights, and the digest of its base."""
    dtype = config.model.torch_dtype()
    # A model that is to be sharded, or to stream, is never whole on a device.
    on_device = isinstance(launch, Replicate) and not config.memory.streams
    device = ranks.device if on_device else "cpu"
    module = load_base(config.model, device=device, dtype=dtype, placement=placement(config.memory.base))
    base = _same_base(module, config, saved, ranks)
    method = config.method
    if saved is not None and isinstance(method, LoraMethod):  # which holds what became of the adapter it began with
        method = method.model_copy(update={"init_from": None})
    method.apply(module, seed=config.train.seed)
    config.memory.apply(module, ranks.device if isinstance(launch, Replicate) else None)
    module.train()
    if ranks.context > 1:
        divide(module, ContextGroup.of(ranks, ranks.context))
    strategy = make_strategy(launch, ranks, accelerator, module, config)
    parameters = config.method.trainable(module)  # not before: sharding puts others in their place
    ema = None
    with _naming(saved):
        strategy.start(config.optimizer, saved)
        if config.train.ema_decay is not None:
            ema = Ema(strategy.parameters, strategy.precise(), config.train.ema_decay)
            if saved is not None:
                if saved.ema is None:
                    raise CheckpointError(
                        "the checkpoint holds no moving average, and this run keeps one",
                        fix="bring its ema.safetensors back, or use another checkpoint of the run",
                    )
                ema.load(strategy.own_share(saved.ema), saved.state.step)
    schedule = alpha_bar(spec).float().to(ranks.device)
    model = TrainedModel(spec, module, dtype, parameters, schedule, strategy, ema, ranks)
    if saved is not None and not model.is_finite():  # as versions wrote it that did not look
        raise CheckpointError(
            "the checkpoint's weights, or their average, are not finite",
            where=str(saved.path),
            fix="move it away and run the same command again: the run continues from the checkpoint before it",
        )
    return model, base


@contextmanager
def _naming(saved: LoadedCheckpoint | None) -> Iterator[None]:
    """Tell of an error in a checkpoint's content which one it was."""
    try:
        yield
    except CheckpointError as error:
        where = ", ".join(filter(None, (error.where, "" if saved is None else str(saved.path))))
        raise CheckpointError(error.what, where=where, fix=error.fix) from error


def _same_base(module: nn.Module, config: RunConfig, saved: LoadedCheckpoint | None, ranks: ProcessGroup) -> str:
    """The digest of the base transformer, which every process has read and the checkpoint was trained on."""
    # Through the patient group: reading a model takes as long as it takes, and a collective of training does not wait.
    digests = ranks.run_on_all(lambda: base_digest(module))
    where = f"{config.model.pretrained}, transformer"
    if len(set(digests)) > 1:
        raise ModelError(
            "processes have read different base transformers: " + ", ".join(sorted(set(digests))),
            where=f"{where}, on the machines of this launch",
            fix="give every machine the same files",
        )
    if saved is not None:
        require_base(
            module,
            saved.state.base,
            CheckpointError,
            by="this run",
            where=f"{where}, against {saved.path}",
            fix="to train on the new base, choose another output_dir",
        )
    return digests[0]


def _other_base(config: RunConfig, base: str) -> str:
    """What to say where an adapter that a run begins with, or on, was trained on another base, which may be meant."""
    start = config.method.init_from if isinstance(config.method, LoraMethod) else None
    paths = [adapter.path for adapter in config.model.adapters] + ([start] if start is not None else [])
    sources, _ = read_sources(map(AdapterArgument, paths))
    merged = [(adapter.sha256, adapter.strength) for adapter in config.model.adapters]
    others = []
    for path, source in sources.items():
        if (record := source.record) is None:
            continue
        before = [(adapter.sha256, adapter.strength) for adapter in record.base_adapters]
        fits = before == merged if path == start else set(before) <= set(merged)
        if record.base_digest not in (None, base) or not fits:
            others.append(str(path))
    return f"{' and '.join(others)} was trained on another base transformer than this one" if others else ""


def _predict_peak(config: RunConfig, launch: Launch, ranks: ProcessGroup) -> BackgroundPrediction | None:
    """Where a whole model trains on a GPU, whose peak is worth to be known and will be measured from here."""
    if ranks.device.type != "cuda" or not ranks.is_main or not isinstance(launch, Replicate):
        return None
    torch.cuda.reset_peak_memory_stats(ranks.device)  # what the encoders took is not the training's
    name = torch.cuda.get_device_name(ranks.device)
    return predict_async(config, card_here(ranks.device), device=name, processes=ranks.world)


# ------------------------------------------------------------------------------------------------------ the run's sheet


def run_sheet(run: Run) -> list[tuple[str, str]]:
    """Every derived number of a run with its unit, to be read before the first step."""
    config, data, model, device = run.config, run.data, run.model, run.ranks.device
    plan, spec = data.plan, model.spec
    buckets = Counter(f"{item.bucket} ({spec.tokens(item.bucket)} tokens)" for item in data.training.items)
    effective = config.train.batch_size * plan.micro_batches
    special = {
        "with a mask": sum(bool(item.unmasked_key) for item in data.training.items),
        "for prior preservation": sum(item.prior for item in data.training.items),
    }
    return [
        ("run", str(config.output_dir)),
        *([("curves", tensorboard_command(config.output_dir))] if config.tracking.kind == "tensorboard" else []),
        ("model", f"{config.model.pretrained}, {spec.task}, {model.dtype}"),
        *([("commit", config.model.revision)] if config.model.revision else []),
        *(("merged into it", str(adapter)) for adapter in config.model.adapters),
        ("training clips", f"{len(data.training.items)}, {plan.samples_per_epoch} per epoch with repeats"),
        *((how, f"{count} of them") for how, count in special.items() if count),
        ("buckets", ", ".join(f"{name}: {number} clips" for name, number in sorted(buckets.items()))),
        ("held-out clips", str(len(data.val.items))),
        *(("bucket", f"{bucket}: {share}") for bucket, share in data.manifest.kept.items()),
        *(("warning", note.removeprefix(WARNING)) for note in data.manifest.notes if note.startswith(WARNING)),
        (
            "effective batch",
            f"{effective} clips = {config.train.batch_size} x {config.train.accumulation} accumulation"
            f" x {run.ranks.data_world} processes"
            + (f" of {run.ranks.world}: {run.ranks.context} compute a clip together" if run.ranks.context > 1 else ""),
        ),
        ("steps per epoch", f"{plan.steps_per_epoch:.2f}"),
        (
            "steps",
            f"{data.total_steps} = {data.total_steps / plan.steps_per_epoch:.2f} epochs"
            + (f", continuing after {run.state.step} from {run.resumed_from}" if run.state.step else ""),
        ),
        *config.method.describe(model.module),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("parallel", model.strategy.name),
        ("device", f"{device} ({_device_name(device)})"),
        ("attention", "as torch chooses" if config.model.attention == "auto" else config.model.attention),
        ("seed", str(config.train.seed)),
        ("repeatable", repeatability(config.train.deterministic, device)),
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        total_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        others = held_note(device)
        return f"{torch.cuda.get_device_name(device)}, {total_gib:.1f} GiB" + (f"; {others}" if others else "")
    return f"{torch.get_num_threads()} threads"


def _memory_gib(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
