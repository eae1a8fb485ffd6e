"""Everything a run is made of, put together in the order in which mistakes are cheapest to find.

Configuration against the model's JSON, then the cache, then the checkpoint to continue from; only then are weights
loaded.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch

from finetune.cogvideox import alpha_bar, load_transformer
from finetune.config import RunConfig, require_valid
from finetune.datasets.cache import Cache
from finetune.datasets.loader import BatchMaker, Loader
from finetune.datasets.manifest import Manifest
from finetune.errors import CheckpointError, ConfigError, DataError
from finetune.facts import Facts, read_facts
from finetune.files import atomic_write_text
from finetune.precompute import ensure_cache
from finetune.ranks import on_cpu
from finetune.schedule import Item, StepPlan
from finetune.trainers.checkpoint import LoadedCheckpoint, find_checkpoint, load_checkpoint, require_same_run
from finetune.trainers.ema import Ema
from finetune.trainers.engine import Replicated
from finetune.trainers.optim import load_optimizer_state, precise_weights
from finetune.trainers.run import Run
from finetune.trainers.tracking import Console, Tracker
from finetune.types import RunState


def assemble(config: RunConfig, cleanup: ExitStack) -> Run:
    """Put a run together; what must be closed in the end is left with ``cleanup``.

    Raises:
        FinetuneError: of the kind that names what has to be mended, before any training.
    """
    facts = read_facts(config.model.pretrained, config.model.revision)
    warnings = require_valid(config, facts)
    accelerator = _accelerator(config)
    for warning in warnings:
        accelerator.print(f"warning: {warning}")

    manifest = ensure_cache(config, facts)
    cache = Cache(config.cache.dir)
    training, heldout = _batch_makers(config, facts, cache, manifest)
    plan = StepPlan(
        items=tuple(Item(item.bucket, item.repeats) for item in training.items),
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        micro_batches=config.train.accumulation * accelerator.num_processes,
    )
    total_steps = config.train.steps or plan.steps_for_epochs(config.train.epochs or 1)
    saved = _checkpoint_to_continue(config, manifest, accelerator)

    dtype = config.model.torch_dtype()
    module = load_transformer(config.model, device=accelerator.device, dtype=dtype)
    config.memory.apply(module)
    config.method.apply(module, seed=config.train.seed)
    module.train()
    parameters = config.method.trainable(module)
    if saved is not None:
        config.method.load_state(module, saved.trainable)
    # Built after the weights are final: master copies are taken from them.
    optimizer = config.optimizer.build(parameters.items())
    ema = None
    if config.train.ema_decay is not None:
        ema = Ema(parameters, precise_weights(optimizer, parameters), config.train.ema_decay)
    engine = Replicated(accelerator, module, parameters.values(), optimizer)
    if saved is not None:
        load_optimizer_state(optimizer, saved.optimizer, parameters)
        if ema is not None and saved.ema is not None:
            ema.load(saved.ema, saved.state.step)

    state = RunState(0, manifest.digest) if saved is None else saved.state
    tracker = Tracker(config.tracking, accelerator, settings=config.to_dict(), resumed_step=state.step)
    cleanup.callback(tracker.close)
    console = Console(
        total_steps,
        first_step=state.step,
        interval_s=config.tracking.console_interval_s,
        enabled=accelerator.is_main_process,
    )
    cleanup.callback(console.close)
    loader = Loader(
        plan,
        training.training,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        total_steps=total_steps,
        device=accelerator.device,
    )
    cleanup.callback(loader.close)
    run = Run(
        config=config,
        facts=facts,
        manifest=manifest,
        cache=cache,
        accelerator=accelerator,
        engine=engine,
        module=module,
        dtype=dtype,
        parameters=parameters,
        optimizer=optimizer,
        ema=ema,
        alpha_bar=alpha_bar(facts).float().to(accelerator.device),
        plan=plan,
        loader=loader,
        training=training,
        heldout=heldout,
        total_steps=total_steps,
        state=state,
        resumed_from=None if saved is None else saved.path,
        tracker=tracker,
        console=console,
    )
    if accelerator.is_main_process:
        atomic_write_text(config.output_dir / "config.yaml", config.to_yaml())
    for label, value in run_sheet(run):
        console.note(f"{label:>24}: {value}")
    return run


def _accelerator(config: RunConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision="no",  # weights and compute are in the model's dtype already; autocast would re-cast each layer
        kwargs_handlers=[
            # The others wait while one process writes a checkpoint of tens of GB; torch's own patience is ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            # Buffers are position tables and equal everywhere; gradients need not be held twice.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
        **config.tracking.accelerator_options(config.output_dir),
    )
    _require_plain(accelerator, config)
    return accelerator


def _require_plain(accelerator: Any, config: RunConfig) -> None:
    """Refuse what a launcher's own settings would change behind the configuration's back."""
    from accelerate.utils import DistributedType

    if accelerator.gradient_accumulation_steps not in (1, config.train.accumulation):
        raise ConfigError(
            f"accelerate was told to accumulate {accelerator.gradient_accumulation_steps} micro-batches,"
            f" the configuration says {config.train.accumulation}",
            where="ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment",
            fix="unset it; train.accumulation is the one place for this",
        )
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain:
        raise ConfigError(
            f"training under {accelerator.distributed_type.value} is not supported: one process or DDP is",
            where="accelerate's configuration",
            fix="launch with --config_file accelerate_configs/ddp.yaml (or single_gpu.yaml)",
        )
    dynamo = accelerator.state.dynamo_plugin.backend.value
    if dynamo != "NO":
        raise ConfigError(
            f"accelerate was told to compile the model with {dynamo}, which this package does not support",
            where="accelerate's configuration",
            fix="set dynamo_backend: 'no'",
        )


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


def _checkpoint_to_continue(config: RunConfig, manifest: Manifest, accelerator: Any) -> LoadedCheckpoint | None:
    path = find_checkpoint(config.output_dir, config.checkpoint.resume)
    if path is None:
        return None
    saved = load_checkpoint(path)
    processes = (saved.processes, accelerator.num_processes)
    for change in require_same_run(saved.config, config.to_dict(), where=str(path), processes=processes):
        accelerator.print(f"continuing with {change}")
    if saved.state.cache_digest != manifest.digest:
        raise CheckpointError(
            "the training data is not what this run was trained on: clips, captions or their encoding changed",
            where=f"{path} against {config.cache.dir}",
            fix="restore the dataset to continue, or train anew into another output_dir"
            " (method.init_from continues from the weights alone)",
        )
    return saved


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
        ("model", f"{config.model.pretrained}, {'image' if facts.image_to_video else 'text'}-to-video, {run.dtype}"),
        ("training clips", f"{len(run.training.items)}, {plan.samples_per_epoch} per epoch with repeats"),
        ("buckets", ", ".join(f"{name}: {number} clips" for name, number in sorted(buckets.items()))),
        ("held-out clips", str(len(run.heldout.items))),
        (
            "effective batch",
            f"{effective} clips = {config.train.batch_size} x {config.train.accumulation} accumulation"
            f" x {run.accelerator.num_processes} processes",
        ),
        ("steps per epoch", f"{plan.steps_per_epoch:.2f}"),
        (
            "steps",
            f"{run.total_steps} = {run.total_steps / plan.steps_per_epoch:.2f} epochs"
            + (f", continuing after {run.state.step} from {run.resumed_from}" if run.state.step else ""),
        ),
        *config.method.describe(run.module),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("device", f"{run.device} ({_device_name(run.device)})"),
        ("seed", str(config.train.seed)),
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        total_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {total_gib:.1f} GiB"
    return f"{torch.get_num_threads()} threads"
