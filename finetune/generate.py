"""``finetune generate``: videos from a base model, any number of adapters, and prompts.

It loads one component after the other, so that T5 and the transformer are never in memory together.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.cogvideox import (
    ModelConfig,
    build_pipeline,
    encode_prompts,
    load_scheduler,
    load_text,
    load_transformer,
    load_vae,
)
from finetune.errors import ConfigError
from finetune.facts import Facts, pin_revision, read_facts
from finetune.generate_inputs import (
    Adapter,
    GenerateRequest,
    check_request,
    native_bucket,
    recorded_fps,
    training_record,
    transformer_root,
)
from finetune.geometry import parse_bucket
from finetune.sampling import SampleRequest, sample_videos
from finetune.types import Bucket
from finetune.videos import Frames, contact_sheet, write_mp4


@dataclass(frozen=True)
class GenerateReport:
    """What was written."""

    videos: tuple[Path, ...]
    sheet: Path
    """All videos as rows of frames in one PNG."""
    bucket: Bucket
    frames: tuple[Frames, ...] = field(repr=False)
    """The videos before compression, each uint8 [F, H, W, 3], in the order of the prompts."""

    def __str__(self) -> str:
        return "\n".join([*(f"wrote {path}" for path in self.videos), f"wrote {self.sheet} (all of them at a glance)"])


def generate(request: GenerateRequest) -> GenerateReport:
    """Sample every prompt to ``<out>/<number>-<words of the prompt>-seed<seed>.mp4``, and all of them to ``sheet.png``.

    Everything that can be checked is checked before a weight is loaded.

    Raises:
        ModelError: if the base cannot be found or loaded.
        ConfigError: for a prompt, image, adapter, size or number that cannot be used; all of them at once.
        DataError: if an image cannot be read.
        FinetuneError: if a video cannot be written.
    """
    revision = pin_revision(request.base, request.revision)
    facts = read_facts(request.base, revision)
    record = _record(request)
    bucket = request.bucket or _recorded_bucket(record, facts) or native_bucket(facts)
    check_request(request, facts, bucket)
    fps = request.fps or recorded_fps(record) or float(facts.native_fps)
    device = _device(request)
    model = ModelConfig(pretrained=request.base, revision=revision, dtype=request.dtype)
    dtype = model.torch_dtype()
    loaded_on = torch.device("cpu") if request.offload else device

    embeds = _embed(model, facts, [*(prompt.prompt for prompt in request.prompts), request.negative_prompt], device)
    own = model
    if request.transformer is not None:
        own = ModelConfig(pretrained=str(transformer_root(request.transformer)))
    transformer = load_transformer(own, device=loaded_on, dtype=dtype)
    scheduler = load_scheduler(model)
    load_adapters(facts, transformer, scheduler, request.adapters)
    vae = load_vae(model, device=loaded_on, dtype=dtype)

    paths: list[Path] = []
    rows: list[tuple[str, Frames]] = []
    for index, prompt in enumerate(request.prompts):
        (frames,) = sample_videos(
            facts,
            transformer,
            scheduler,
            vae,
            [SampleRequest(embeds[index], embeds[-1], prompt.seed, bucket, prompt.image)],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            dynamic_cfg=request.dynamic_cfg,
            progress=True,
            offload_to=device if request.offload else None,
        )
        name = f"{index:03d}-{_slug(prompt.prompt)}-seed{prompt.seed}.mp4"
        # Each as soon as it is sampled: an interrupted batch keeps what is done.
        paths.append(write_mp4(request.out / name, frames, fps))
        rows.append((f"{prompt.prompt} (seed {prompt.seed})", frames))
    return GenerateReport(
        tuple(paths), contact_sheet(rows, request.out / "sheet.png"), bucket, tuple(frames for _, frames in rows)
    )


def load_adapters(facts: Facts, transformer: Any, scheduler: Any, adapters: Sequence[Adapter]) -> None:
    """Load adapters with the stock pipeline's own loader and set their strengths; one of strength 0 is left out.

    Raises:
        ConfigError: if an adapter does not fit the transformer, in full.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    active = [adapter for adapter in adapters if adapter.strength != 0]
    pipeline = build_pipeline(facts, transformer=transformer, scheduler=scheduler)
    names = [f"adapter_{index}" for index in range(len(active))]
    for name, adapter in zip(names, active, strict=True):
        try:
            folder, file = str(adapter.file.parent), adapter.file.name
            pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name, use_safetensors=True)
        except torch.OutOfMemoryError:
            raise  # says nothing of the adapter
        except (ValueError, RuntimeError, KeyError) as error:
            raise _misfit(adapter, str(error).strip().splitlines()[0]) from error
        # diffusers only warns of tensors that found no place.
        placed = {f"transformer.{key}" for key in get_peft_model_state_dict(transformer, adapter_name=name)}
        with safe_open(adapter.file, framework="pt") as file:
            left_out = set(file.keys()) - placed
        if left_out:
            raise _misfit(adapter, f"{len(left_out)} tensors have no place, such as {min(left_out)}")
    if active:
        pipeline.set_adapters(names, [adapter.strength for adapter in active])


def _misfit(adapter: Adapter, why: str) -> ConfigError:
    return ConfigError(
        f"the adapter does not fit the base model: {why}",
        where=f"--adapter {adapter.path}",
        fix="use the base model that the adapter was trained on; its model card names it",
    )


def _embed(model: ModelConfig, facts: Facts, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
    """T5 embeddings [L, D] on the CPU; the encoder is gone from memory afterwards."""
    tokenizer, encoder = load_text(model, device=device)
    embeds = [encode_prompts(tokenizer, encoder, [prompt], facts)[0].cpu() for prompt in prompts]
    del tokenizer, encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeds


def _record(request: GenerateRequest) -> dict[str, Any]:
    for path in (*(adapter.path for adapter in request.adapters), request.transformer):
        if path is not None and (record := training_record(path)):
            return record
    return {}


def _recorded_bucket(record: dict[str, Any], facts: Facts) -> Bucket | None:
    """The first bucket of a training record, if this base can sample it."""
    try:
        bucket = parse_bucket(record["buckets"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return None if facts.check_bucket(bucket) else bucket


def _device(request: GenerateRequest) -> torch.device:
    name = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the device cannot be used: {str(error).splitlines()[0]}", where=f"--device {name}"
        ) from None
    if request.offload and device.type == "cpu":
        raise ConfigError("there is no GPU to offload from", where="--offload", fix="leave --offload out")
    return device


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-") or "video"
