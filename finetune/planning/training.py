"""One optimizer step, one denoising step, and what stays between them, with a ledger looking on.

The parts are put together as ``trainers.assemble`` does, and run as the loop runs them.
"""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox import denoise
from finetune.config import RunConfig
from finetune.facts import Facts
from finetune.memory.places import tag
from finetune.planning.curve import Phase, measure
from finetune.planning.fakes import tensors_of
from finetune.planning.ledger import CPU, Ledger
from finetune.planning.names import PHASES
from finetune.planning.whereabouts import Whereabouts, following
from finetune.trainers.ema import Ema
from finetune.trainers.engine import Engine, whole_engine
from finetune.trainers.objective import velocity_losses
from finetune.trainers.optim import AdamW8bit, NarrowWeights, PagedAdamW8bit, begin
from finetune.types import Batch, Bucket

RESTING = "between phases"
"""Name of the phase in which nothing runs."""


class Alone:
    """What ``Replicated`` asks of a launch of one process."""

    num_processes = 1

    @staticmethod
    def prepare(module: nn.Module) -> nn.Module:
        """As it is."""
        return module


class Training:
    """A run put together as ``trainers.assemble`` does, with a ledger looking on.

    Works on fake tensors and on real ones alike.

    Args:
        ledger: entered.
        facts: of the model.
        config: of the run.
        transformer: in ``dtype``, nothing done to it yet.
        dtype: of compute.
    """

    def __init__(
        self, ledger: Ledger, facts: Facts, config: RunConfig, transformer: nn.Module, dtype: torch.dtype
    ) -> None:
        self.ledger, self.facts, self.config, self.transformer, self.dtype = ledger, facts, config, transformer, dtype
        config.method.apply(transformer, seed=config.train.seed)
        config.memory.apply(transformer, CPU)
        transformer.train()
        self.parameters = config.method.trainable(transformer)
        self.engine: Engine = whole_engine(
            Alone,
            transformer,
            self.parameters,
            memory=config.memory,
            device=CPU,
            max_norm=config.train.max_grad_norm,
        )
        self.engine.start(_rehearsable(config), None)
        self._ready = False
        self.ema: Ema | None = None
        if config.train.ema_decay is not None:
            self.ema = Ema(self.parameters, self.engine.precise(), config.train.ema_decay)
        self.alpha_bar = torch.linspace(0.999, 0.0, facts.num_train_timesteps)
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._name_gradient)  # type: ignore[no-untyped-call]

    def _name_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.name("gradients", [parameter.grad])

    def step(self, batches: list[Batch]) -> Phase:
        """One optimizer step over micro-batches, after the optimizer has made its states."""
        ledger, engine = self.ledger, self.engine
        self._prepare()
        with following(ledger, self.transformer) as here:
            begin = ledger.tick
            marks: dict[str, int] = {}
            for number, batch in enumerate(batches, start=1):
                self._micro_batch(batch, here, marks, last=number == len(batches))
            marks["optimizer"] = ledger.tick
            here.enter("gradient clipping")
            engine.clip(self.config.train.max_grad_norm or math.inf)
            here.enter("optimizer")
            engine.step()
            if self.ema is not None:
                self.ema.step()
            here.enter("")
        ledger.read_labels()
        return measure(PHASES["train"], ledger.pieces, begin, ledger.tick, marks, note=_step_note(batches))

    def _micro_batch(self, batch: Batch, here: Whereabouts, marks: dict[str, int], *, last: bool) -> None:
        ledger, engine = self.ledger, self.engine
        ledger.name("batch", [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)])
        for part in self.config.memory.parts(batch):
            marks.setdefault("forward", ledger.tick)
            here.enter("forward")
            begun = ledger.tick
            with engine.micro_batch(last=last):
                losses = velocity_losses(engine.model, self.facts, self.alpha_bar, part)
                ledger.read_labels()
                ledger.name_since(begun, "saved activations")
                marks.setdefault("backward", ledger.tick)
                here.enter("backward")
                engine.backward(losses.sum())

    def _prepare(self) -> None:
        """Before the first phase: as everything is between two steps."""
        if self._ready:
            return
        self._ready = True
        self._warm_up()
        gc.collect()
        self._name_residents()

    def _warm_up(self) -> None:
        """Have the optimizer make its states, through its own step; then the engine, which may move them."""
        optimizer = self.engine.optimizer
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        begin(optimizer, seed=self.config.train.seed, step=0)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        self.engine.step()
        if isinstance(self.config.optimizer, PagedAdamW8bit):
            # Unified memory: what of it is on the device at a time is the driver's business, and given way.
            for tensors in _kept_by(optimizer).values():
                for tensor in tensors:
                    tag(tensor, "paged optimizer state", host=True)

    def _name_residents(self) -> None:
        """Say what everything is for that stays from step to step."""
        ledger = self.ledger
        trained = {id(parameter) for parameter in self.parameters.values()}
        ledger.name("frozen weights", (t for t in tensors_of(self.transformer) if id(t) not in trained))
        ledger.name("trainable weights", self.parameters.values())
        for what, tensors in _kept_by(self.engine.optimizer).items():
            ledger.name(what, tensors)
        if self.ema is not None:
            ledger.name("moving average", self.ema.state().values())
        ledger.name("batch", [self.alpha_bar])
        ledger.read_labels()

    @torch.no_grad()
    def sample(self, bucket: Bucket) -> Phase:
        """One denoising step of validation, with guidance where it is configured."""
        with torch.enable_grad():
            self._prepare()
        guided = self.config.validation.guidance_scale > 1
        (batch,) = fake_batches(self.facts, self.config, bucket, self.dtype, clips=2 if guided else 1)
        self.ledger.name("batch", [tensor for tensor in vars(batch).values() if isinstance(tensor, Tensor)])
        self.transformer.eval()
        with following(self.ledger, self.transformer) as here:
            begin = self.ledger.tick
            here.enter("sampling")
            denoise(
                self.transformer, self.facts, batch.latents, batch.prompt_embeds, batch.timesteps, batch.image_latents
            )
            here.enter("")
        self.transformer.train()
        self.ledger.read_labels()
        note = "two passes in one batch, for guidance" if guided else "without guidance"
        return measure(
            PHASES["sample"], self.ledger.pieces, begin, self.ledger.tick, {"denoising step": begin}, note=note
        )

    def rest(self) -> Phase:
        """What stays between two phases: beside it a sampled video is decoded."""
        self._prepare()
        self.ledger.read_labels()
        now = self.ledger.tick
        phase = measure(RESTING, self.ledger.pieces, now, now, {})
        return replace(phase, stations={RESTING: phase.peak})


def _step_note(batches: list[Batch]) -> str:
    clips = len(batches[0].slots)
    return f"{clips} clip{'s' if clips > 1 else ''} per micro-batch" + (", accumulated" if len(batches) > 1 else "")


def fake_batches(
    facts: Facts, config: RunConfig, bucket: Bucket, dtype: torch.dtype, clips: int | None = None
) -> list[Batch]:
    """Micro-batches of true shapes; two where gradients are accumulated, because the second meets the first's.

    Args:
        facts: of the model.
        config: of the run.
        bucket: of the clips.
        dtype: of the encoders' output.
        clips: in a single micro-batch; None for the configuration's sizes.
    """
    size = clips or config.train.batch_size
    channels, frames, height, width = facts.latent_shape(bucket)
    shape = (size, channels, frames + facts.front_padding(frames), height, width)
    image = torch.zeros(size, channels, 1, height, width) if facts.image_to_video else None
    batch = Batch(
        latents=torch.zeros(shape),
        noise=torch.zeros(shape),
        timesteps=torch.zeros(size, dtype=torch.long),
        prompt_embeds=torch.zeros(size, facts.max_text_seq_length, facts.text_embed_dim, dtype=dtype),
        image_latents=image,
        slots=tuple(range(size)),
        clips=tuple(f"clip {number}" for number in range(size)),
    )
    if clips is not None or config.train.accumulation == 1:
        return [batch]
    return [batch, replace(batch, latents=torch.zeros(shape), noise=torch.zeros(shape))]


def _rehearsable(config: RunConfig) -> Any:
    """The optimizer, or on the CPU its like: the paged one has the same states, elsewhere."""
    optimizer = config.optimizer
    if isinstance(optimizer, PagedAdamW8bit):
        return AdamW8bit(**optimizer.model_dump(exclude={"kind"}))
    return optimizer


def _kept_by(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """What an optimizer keeps from step to step, by what it is for."""
    kept: dict[str, list[Tensor]] = {}
    if isinstance(optimizer, NarrowWeights):
        kept["master copies"] = list(optimizer.keeping.kept.values())
        optimizer = optimizer.inner
    states = [value for state in optimizer.state.values() for value in state.values()]
    kept["optimizer state"] = [value for value in states if isinstance(value, Tensor)]
    return kept
