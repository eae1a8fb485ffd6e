"""A run on fake tensors on the CPU, which stands for device and host alike: models of true shape without a number in
them, an optimizer step, a denoising step.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox.components import read_json
from finetune.cogvideox.denoise import denoise, ofs_of
from finetune.cogvideox.load import empty_component, make_room, on_meta
from finetune.cogvideox.objective import velocity_losses
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.types import Batch, Bucket
from finetune.memory.adaln_offload import announced, prepare
from finetune.memory.block_streaming import stream_text, text_placement
from finetune.memory.config import TextEncoder
from finetune.memory.host_buffers import label_buffer
from finetune.methods.prior import asks_base, base_prediction
from finetune.optim.ema import Ema
from finetune.optim.low_precision import LowPrecisionOptimizer
from finetune.optim.optimizers import AdamW8bit, PagedAdamW8bit, begin
from finetune.parallel.context import ContextGroup, divide
from finetune.parallel.gradient_release import single_process_strategy
from finetune.planner.memory_tracker import CPU, PHASES, MemoryTracker, ModuleTracker, Phase, measure


@contextmanager
def fake_world() -> Iterator[MemoryTracker]:
    """Inside, tensors have shapes and no memory, every number that is read off one is 1, and no GPU is found.

    ``Module.to`` exchanges two Python objects for a fake parameter, which no weak reference may point to; ours do. So
    it is made to give the parameter new storage, as it does to a real one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def assign(parameter: Tensor, converted: Tensor) -> None:
        same = parameter.untyped_storage()._cdata == converted.untyped_storage()._cdata
        if not (same and parameter.dtype == converted.dtype):
            parameter.data = converted.data

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _replaced(torch.utils, "swap_tensors", assign),
        _replaced(torch.cuda, "is_available", lambda: False),  # a buffer that is to be pinned must be a fake one
        MemoryTracker(scalar=1.0) as tracker,
    ):
        yield tracker


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer."""
    yield from module.parameters()
    yield from module.buffers()


def empty_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The VAE of a checkpoint's JSON, frozen and in evaluation mode."""
    from diffusers import AutoencoderKLCogVideoX

    with on_meta(dtype):
        vae: Any = AutoencoderKLCogVideoX.from_config(read_json(folder / "vae" / "config.json"))
    make_room(vae, CPU)
    return vae.eval().requires_grad_(False)


def empty_text_encoder(folder: Path, dtype: torch.dtype, where: TextEncoder) -> tuple[Any, object]:
    """The T5 encoder of a checkpoint's JSON, held as ``memory.text_encoder`` says, and what has to live as long as it.

    Args:
        folder: of the checkpoint.
        dtype: of its weights.
        where: ``memory.text_encoder``.
    """
    encoder: Any = empty_component(folder, "text_encoder", dtype)
    if (form := text_placement(where)) is not None:
        form.prepare(encoder)
    make_room(encoder, CPU)
    encoder.eval().requires_grad_(False)
    return encoder, stream_text(encoder, CPU) if where == "streamed" else None


# ---------------------------------------------------------------------- the run: one optimizer step, one denoising step


class OneProcess:
    """What a strategy asks of a launch of one process."""

    num_processes = 1

    @staticmethod
    def prepare(module: nn.Module) -> nn.Module:
        """As it is."""
        return module


class SilentGroup(ContextGroup):
    """A context group of which this process is the one with the most tokens and heads, and nobody else is there."""

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Nothing arrives: sizes are all that is looked at."""

    def all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        """As above."""


class TrackedTraining:
    """A run put together as ``trainers.setup`` does, as it is between two steps, with a tracker looking on.

    Works on fake tensors and on real ones alike.

    Args:
        tracker: entered.
        spec: of the model.
        config: of the run.
        transformer: in ``dtype``, nothing done to it yet.
        dtype: of compute.
    """

    def __init__(
        self, tracker: MemoryTracker, spec: ModelSpec, config: RunConfig, transformer: nn.Module, dtype: torch.dtype
    ) -> None:
        self.tracker, self.spec, self.config, self.transformer, self.dtype = tracker, spec, config, transformer, dtype
        config.method.apply(transformer, seed=config.train.seed)
        config.memory.model_copy(update={"compile": "off"}).apply(transformer, CPU)  # it would run, and hold no less
        transformer.train()
        if (processes := config.parallel.context) > 1:
            divide(transformer, SilentGroup(0, processes))
        self.parameters = config.method.trainable(transformer)
        max_norm = config.train.max_grad_norm
        self.strategy = single_process_strategy(
            OneProcess, transformer, self.parameters, memory=config.memory, device=CPU, max_norm=max_norm
        )
        optimizer: Any = config.optimizer
        if isinstance(optimizer, PagedAdamW8bit):  # for want of CUDA its like, which has the same states elsewhere
            optimizer = AdamW8bit(**optimizer.model_dump(exclude={"kind"}))
        self.strategy.start(optimizer, None)
        self.ema: Ema | None = None
        if config.train.ema_decay is not None:
            self.ema = Ema(self.parameters, self.strategy.precise(), config.train.ema_decay)
        self.alpha_bar = torch.linspace(0.999, 0.0, spec.num_train_timesteps)
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._name_gradient)  # type: ignore[no-untyped-call]
        self._warm_up()
        # What putting it together left over; while the collector is paused, nothing of it has grown old.
        gc.collect(2 if gc.isenabled() else 0)
        self._name_residents()

    def _name_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.tracker.name("gradients", [parameter.grad])

    def _warm_up(self) -> None:
        """Have the optimizer make its states, through its own step; then the strategy, which may move them."""
        optimizer = self.strategy.optimizer
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        begin(optimizer, seed=self.config.train.seed, step=0)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        self.strategy.step()

    def _name_residents(self) -> None:
        """Say what everything is for that stays from step to step."""
        tracker, optimizer = self.tracker, self.strategy.optimizer
        trained = {id(parameter) for parameter in self.parameters.values()}
        tracker.name("frozen weights", (t for t in tensors_of(self.transformer) if id(t) not in trained))
        tracker.name("trainable weights", self.parameters.values())
        masters: list[Tensor] = []
        if isinstance(optimizer, LowPrecisionOptimizer):
            masters, optimizer = list(optimizer.policy.saved.values()), optimizer.inner
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        if isinstance(self.config.optimizer, PagedAdamW8bit):
            # Unified memory: what of it is on the device at a time is the driver's business, and given way.
            for tensor in (*masters, *states):
                label_buffer(tensor, "paged optimizer state", host=True)
        tracker.name("master copies", masters)
        tracker.name("optimizer state", states)
        if self.ema is not None:
            tracker.name("moving average", self.ema.state().values())
        tracker.name("batch", [self.alpha_bar])
        tracker.read_labels()

    def _name_batch(self, batch: Batch) -> None:
        self.tracker.name("batch", [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)])

    def step(self, batches: list[Batch]) -> Phase:
        """One optimizer step over micro-batches."""
        tracker, strategy, running = self.tracker, self.strategy, ModuleTracker(self.tracker)
        with running.watching(self.transformer):
            begin, spans = tracker.tick, dict[str, int]()
            for number, batch in enumerate(batches, start=1):
                self._micro_batch(batch, running, spans, last=number == len(batches))
            spans["optimizer"] = tracker.tick
            running.enter("gradient clipping")
            float(strategy.clip(self.config.train.max_grad_norm or math.inf))  # read once, as the loop does
            running.enter("optimizer")
            strategy.step()
            if self.ema is not None:
                self.ema.step()
            running.enter("")
        tracker.read_labels()
        clips = len(batches[0].slots)
        note = f"{clips} clip{'s' if clips > 1 else ''} per micro-batch" + ", accumulated" * (len(batches) > 1)
        return measure(PHASES["train"], tracker.allocations, begin, tracker.tick, spans, note)

    def _micro_batch(self, batch: Batch, running: ModuleTracker, spans: dict[str, int], *, last: bool) -> None:
        tracker, strategy = self.tracker, self.strategy
        self._name_batch(batch)
        for part in self.config.memory.split(batch):
            begin = tracker.tick
            spans.setdefault("forward", begin)
            running.enter("forward")
            conditions = part.timesteps_on_host, ofs_of(self.spec)
            for _ in range(1 + asks_base(part, collective=False)):
                prepare(self.transformer, *conditions)
            model = self.transformer
            base = base_prediction(model, model, self.spec, self.alpha_bar, part, collective=False)
            with strategy.micro_batch(last=last), announced(self.transformer, *conditions):
                losses = velocity_losses(strategy.model, self.spec, self.alpha_bar, part, base)
                tracker.read_labels()
                tracker.name_since(begin, "saved activations")
                spans.setdefault("backward", tracker.tick)
                running.enter("backward")
                strategy.backward(losses.sum())

    @torch.no_grad()
    def sample(self, bucket: Bucket) -> Phase:
        """One denoising step of validation, with guidance where it is configured."""
        tracker, running = self.tracker, ModuleTracker(self.tracker)
        guided = self.config.validation.guidance_scale > 1
        (batch,) = fake_batches(self.spec, self.config, bucket, self.dtype, clips=2 if guided else 1)
        self._name_batch(batch)
        self.transformer.eval()
        with running.watching(self.transformer):
            begin = tracker.tick
            running.enter("sampling")
            denoise(
                self.transformer, self.spec, batch.latents, batch.prompt_embeds, batch.timesteps, batch.image_latents
            )
            running.enter("")
        self.transformer.train()
        tracker.read_labels()
        note = "two passes in one batch, for guidance" if guided else "without guidance"
        return measure(PHASES["sample"], tracker.allocations, begin, tracker.tick, {"denoising step": begin}, note)

    def rest(self) -> Phase:
        """What stays between two phases."""
        self.tracker.read_labels()
        now = self.tracker.tick
        return measure("between phases", self.tracker.allocations, now, now)


def fake_batches(
    spec: ModelSpec, config: RunConfig, bucket: Bucket, dtype: torch.dtype, clips: int | None = None
) -> list[Batch]:
    """Micro-batches of true shapes; two where gradients are accumulated, because the second meets the first's.

    Args:
        spec: of the model.
        config: of the run.
        bucket: of the clips.
        dtype: of the encoders' output.
        clips: in a single micro-batch; None for the configuration's sizes.
    """
    size = clips or config.train.batch_size
    latents = latent_shape(spec, bucket)
    shape = (size, *latents)
    whole = spec.control or config.data.condition_frames.stored is not None
    given = latents[1] if whole else 1  # frames of the condition
    image = torch.zeros(size, latents[0], given, *latents[2:]) if spec.conditioned else None
    batch = Batch(
        latents=torch.zeros(shape),
        noise=torch.zeros(shape),
        timesteps=torch.zeros(size, dtype=torch.long),
        prompt_embeds=torch.zeros(size, spec.max_text_seq_length, spec.text_embed_dim, dtype=dtype),
        image_latents=image,
        timesteps_on_host=(0,) * size,
        mask=torch.zeros(size, 1, *latents[1:]) if config.objective.masked is not None else None,
        prior=(True,) * size if config.data.preserves_prior else None,
        slots=tuple(range(size)),
        clips=tuple(f"clip {number}" for number in range(size)),
    )
    if clips is not None or config.train.accumulation == 1:
        return [batch]
    return [batch, replace(batch, latents=torch.zeros(shape), noise=torch.zeros(shape))]


def latent_shape(spec: ModelSpec, bucket: Bucket) -> tuple[int, int, int, int]:
    """[C, F, h, w] of one clip in the model, front padding included."""
    channels, frames, height, width = spec.latent_shape(bucket)
    return channels, frames + spec.front_padding(frames), height, width
