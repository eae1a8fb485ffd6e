"""Everything a run is made of, put together in the order in which mistakes are cheapest to find.

Configuration against the model's JSON, then the cache, then the checkpoint to continue from; only then are weights
loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapter_source import read_sources
from finetune.caching.overview import run_advice
from finetune.cards import grow_segments
from finetune.cogvideox import alpha_bar, base_digest, load_transformer, require_as_sent, require_base
from finetune.config import RunConfig, pin_model, require_valid
from finetune.datasets.cache import Cache
from finetune.datasets.loader import BatchMaker, Loader
from finetune.datasets.manifest import WARNING, Manifest
from finetune.errors import CheckpointError, DataError, ModelError
from finetune.facts import Facts, read_facts, resolve_pretrained
from finetune.files import atomic_write_text
from finetune.generate_inputs import Adapter
from finetune.memory.quantize import placement
from finetune.planning.auto import settled
from finetune.planning.beside import Forecaster
from finetune.planning.card import card_here, held_note
from finetune.precompute import ensure_cache
from finetune.ranks import Ranks
from finetune.schedule import Item, StepPlan
from finetune.trainers.checkpoint import LoadedCheckpoint, require_same_run
from finetune.trainers.determinism import repeatable, repeats
from finetune.trainers.ema import Ema
from finetune.trainers.engine import Engine, Launch, Replicate, read_launch
from finetune.trainers.method import LoraMethod
from finetune.trainers.run import Run
from finetune.trainers.run_folder import checkpoint_to_continue, hold_run_folder
from finetune.trainers.spread import make_accelerator, make_engine, require_launch
from finetune.trainers.tracking import Console, Tracker, tensorboard_command
from finetune.types import RunState


def assemble(config: RunConfig, cleanup: ExitStack) -> Run:
    """Put a run together; what must be closed in the end is left with ``cleanup``.

    Raises:
        FinetuneError: of the kind that names what has to be mended, before any training.
    """
    # Both before anything touches a GPU.
    cleanup.enter_context(repeatable(config.train.deterministic))
    grow_segments()
    launch = read_launch(os.environ)
    ranks = Ranks.current(sharding=not isinstance(launch, Replicate))
    cleanup.callback(ranks.close)
    config = pin_model(config, ranks.first)
    facts = read_facts(config.model.pretrained, config.model.revision)
    warnings = require_valid(config, facts)
    require_launch(launch, config, facts, ranks)
    config, choice = settled(config)
    accelerator = make_accelerator(config)
    for warning in warnings:
        accelerator.print(f"warning: {warning}")
    for line in choice:
        accelerator.print(line)

    manifest = ensure_cache(config, facts, distributed=ranks, cleanup=cleanup)
    cleanup.enter_context(hold_run_folder(config.output_dir, ranks, accelerator.print))
    cache = Cache(config.cache.dir)
    training, heldout = _batch_makers(config, facts, cache, manifest)
    plan = StepPlan(
        items=tuple(Item(item.bucket, item.repeats) for item in training.items),
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        micro_batches=config.train.accumulation * ranks.world,
    )
    total_steps = config.train.steps or plan.steps_for_epochs(config.train.epochs or 1)
    held = len({item.media_digest for item in heldout.items})
    for advice in run_advice(config, plan, total_steps, held=held):
        accelerator.print(f"warning: {advice}")
    saved = _checkpoint_to_continue(config, manifest, ranks)
    if saved is not None:
        _require_planned(saved, plan, total_steps)

    ranks.first(lambda: _require_base_as_sent(config, cache))
    forecaster = _forecaster(config, launch, ranks)  # while the model is read
    if forecaster is not None:
        cleanup.callback(forecaster.close)
    dtype = config.model.torch_dtype()
    # A model that is to be sharded, or to stream, is never whole on a device.
    whole = isinstance(launch, Replicate) and not config.memory.streams
    module = load_transformer(
        config.model,
        device=ranks.device if whole else "cpu",
        dtype=dtype,
        placement=placement(config.memory.base),
    )
    base = _same_base(module, config, saved, ranks)
    config.method.apply(module, seed=config.train.seed)
    config.memory.apply(module, ranks.device if isinstance(launch, Replicate) else None)
    module.train()
    engine = make_engine(launch, ranks, accelerator, module, config)
    with _naming(saved):
        engine.start(config.optimizer, saved)
        ema = None
        if config.train.ema_decay is not None:
            ema = Ema(engine.parameters, engine.precise(), config.train.ema_decay)
            if saved is not None:
                ema.load(_average(engine, saved), saved.state.step)

    state = replace(RunState(0, manifest.digest) if saved is None else saved.state, base=base)
    tracker = Tracker(config.tracking, accelerator, settings=config.to_dict(), resumed_step=state.step)
    cleanup.callback(tracker.close)
    console = Console(
        total_steps, first_step=state.step, interval_s=config.tracking.console_interval_s, enabled=ranks.is_main
    )
    cleanup.callback(console.close)
    loader = Loader(
        plan,
        training.training,
        rank=ranks.rank,
        processes=ranks.world,
        total_steps=total_steps,
        device=ranks.device,
    )
    cleanup.callback(loader.close)
    run = Run(
        config=config,
        facts=facts,
        manifest=manifest,
        cache=cache,
        accelerator=accelerator,
        ranks=ranks,
        engine=engine,
        module=module,
        dtype=dtype,
        parameters=config.method.trainable(module),
        ema=ema,
        alpha_bar=alpha_bar(facts).float().to(ranks.device),
        plan=plan,
        loader=loader,
        training=training,
        heldout=heldout,
        total_steps=total_steps,
        state=state,
        resumed_from=None if saved is None else saved.path,
        tracker=tracker,
        console=console,
        prediction=None if forecaster is None else forecaster.prediction(),
    )
    if saved is not None and not run.is_finite():  # as versions wrote it that did not look
        raise CheckpointError(
            "the checkpoint's weights, or their average, are not finite",
            where=str(saved.path),
            fix="move it away and run the same command again: the run continues from the checkpoint before it",
        )
    ranks.first(lambda: atomic_write_text(config.output_dir / "config.yaml", config.to_yaml()))
    if saved is not None and not saved.state.base:
        console.note(f"{saved.path.name} does not record which base transformer it was trained on; the next one does")
    if saved is None and (warning := _other_base(config, base)):
        console.note(f"warning: {warning}")
    for label, value in run_sheet(run):
        console.note(f"{label:>24}: {value}")
    return run


def _batch_makers(config: RunConfig, facts: Facts, cache: Cache, manifest: Manifest) -> tuple[BatchMaker, BatchMaker]:
    training = [item for item in manifest.items if not item.holdout]
    heldout = [item for item in manifest.items if item.holdout]
    if not training:
        raise DataError(
            "no clip is left to train on",
            where=f"{len(heldout)} clips, all held out",
            fix="lower data.holdout, or add a source with split: train",
        )
    empty = cache.read_prompt(manifest.empty_prompt_key)
    if config.data.unconditional_text == "zeros":
        empty = torch.zeros_like(empty)

    def maker(items: list[Any]) -> BatchMaker:
        return BatchMaker(facts, cache, items, empty, config.data, config.train.seed)

    return maker(training), maker(heldout)


def _checkpoint_to_continue(config: RunConfig, manifest: Manifest, ranks: Ranks) -> LoadedCheckpoint | None:
    saved = checkpoint_to_continue(config.output_dir, config.checkpoint.resume, ranks)
    if saved is None:
        return None
    path = saved.path
    processes, identified = (saved.processes, ranks.world), bool(saved.state.base)
    for change in require_same_run(
        saved.config, config.to_dict(), where=str(path), processes=processes, identified=identified
    ):
        if ranks.is_main:
            print(f"continuing with {change}", flush=True)
    if saved.state.cache_digest != manifest.digest:
        raise CheckpointError(
            "the training data is not what this run was trained on: clips, captions or their encoding changed",
            where=f"{path} against {config.cache.dir}",
            fix="restore the dataset to continue, or train anew into another output_dir"
            " (method.init_from continues from the weights alone)",
        )
    return saved


def _require_planned(saved: LoadedCheckpoint, plan: StepPlan, total_steps: int) -> None:
    """Refuse a checkpoint from beyond the run's end, or one that has seen other samples than the plan gives."""
    state = saved.state
    if state.step > total_steps:
        raise CheckpointError(
            f"the checkpoint has taken {state.step} steps, and the run is to take {total_steps}",
            where=str(saved.path),
            fix="set train.steps (or train.epochs) to no less, or train anew into another output_dir",
        )
    if state.samples_seen != (planned := plan.samples_until(state.step)):
        raise CheckpointError(
            f"the checkpoint has seen {state.samples_seen} samples in {state.step} steps, and the plan has {planned}",
            where=str(saved.path),
            fix="it was changed after it was written: bring its state.json back, or use another checkpoint of the run",
        )


def _average(engine: Engine, saved: LoadedCheckpoint) -> Mapping[str, Tensor]:
    average = engine.read(saved, "ema")
    if average is None:
        raise CheckpointError(
            "the checkpoint holds no moving average, and this run keeps one",
            fix="bring its ema.safetensors back, or use another checkpoint of the run",
        )
    return average


@contextmanager
def _naming(saved: LoadedCheckpoint | None) -> Iterator[None]:
    """Tell of an error in a checkpoint's content which one it was."""
    try:
        yield
    except CheckpointError as error:
        where = ", ".join(filter(None, (error.where, "" if saved is None else str(saved.path))))
        raise CheckpointError(error.what, where=where, fix=error.fix) from error


def _require_base_as_sent(config: RunConfig, cache: Cache) -> None:
    folder = resolve_pretrained(config.model.pretrained, config.model.revision, components=["transformer"])
    require_as_sent(folder, "transformer", cache.digest_file)


def _same_base(module: nn.Module, config: RunConfig, saved: LoadedCheckpoint | None, ranks: Ranks) -> str:
    """The digest of the base transformer, which every process has read and the checkpoint was trained on."""
    # Through the patient group: reading a model takes as long as it takes, and a collective of training does not wait.
    digests = ranks.all(lambda: base_digest(module))
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
    """What to say where the adapter that a run begins with was trained on another base, which may be meant."""
    if not isinstance(config.method, LoraMethod) or config.method.init_from is None:
        return ""
    sources, _ = read_sources([Adapter(config.method.init_from)])
    recorded = {source.record.get("base_digest") for source in sources} - {None, base}
    return f"{config.method.init_from} was trained on another base transformer than this one" if recorded else ""


def _forecaster(config: RunConfig, launch: Launch, ranks: Ranks) -> Forecaster | None:
    """Where a whole model trains on a GPU, whose peak is worth to be known and will be measured from here."""
    if ranks.device.type != "cuda" or not ranks.is_main or not isinstance(launch, Replicate):
        return None
    torch.cuda.reset_peak_memory_stats(ranks.device)  # what the encoders took is not the training's
    name = torch.cuda.get_device_name(ranks.device)
    return Forecaster(config, card_here(ranks.device), device=name, processes=ranks.world)


def run_sheet(run: Run) -> list[tuple[str, str]]:
    """Every derived number of a run with its unit, to be read before the first step."""
    config, plan, facts = run.config, run.plan, run.facts
    buckets: dict[str, int] = {}
    for item in run.training.items:
        name = f"{item.bucket} ({facts.tokens(item.bucket)} tokens)"
        buckets[name] = buckets.get(name, 0) + 1
    effective = config.train.batch_size * plan.micro_batches
    return [
        ("run", str(config.output_dir)),
        *([("curves", tensorboard_command(config.output_dir))] if config.tracking.kind == "tensorboard" else []),
        ("model", f"{config.model.pretrained}, {'image' if facts.image_to_video else 'text'}-to-video, {run.dtype}"),
        *([("commit", config.model.revision)] if config.model.revision else []),
        ("training clips", f"{len(run.training.items)}, {plan.samples_per_epoch} per epoch with repeats"),
        ("buckets", ", ".join(f"{name}: {number} clips" for name, number in sorted(buckets.items()))),
        ("held-out clips", str(len(run.heldout.items))),
        *(("bucket", f"{bucket}: {kept}") for bucket, kept in run.manifest.kept.items()),
        *(("warning", note.removeprefix(WARNING)) for note in run.manifest.notes if note.startswith(WARNING)),
        (
            "effective batch",
            f"{effective} clips = {config.train.batch_size} x {config.train.accumulation} accumulation"
            f" x {run.ranks.world} processes",
        ),
        ("steps per epoch", f"{plan.steps_per_epoch:.2f}"),
        (
            "steps",
            f"{run.total_steps} = {run.total_steps / plan.steps_per_epoch:.2f} epochs"
            + (f", continuing after {run.state.step} from {run.resumed_from}" if run.state.step else ""),
        ),
        *config.method.describe(run.module),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("spread", run.engine.name),
        ("device", f"{run.device} ({_device_name(run.device)})"),
        *([("peak memory", run.prediction.said)] if run.prediction is not None else []),
        ("seed", str(config.train.seed)),
        ("repeatable", repeats(config.train.deterministic, run.device)),
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        total_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        held = held_note(device)
        return f"{torch.cuda.get_device_name(device)}, {total_gib:.1f} GiB" + (f"; {held}" if held else "")
    return f"{torch.get_num_threads()} threads"
