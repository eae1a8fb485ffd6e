"""``finetune generate``: videos from a base model, any number of adapters, and prompts.

It loads one component after the other, so that T5 and the transformer are never in memory together.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.adapter_source import (
    AdapterSource,
    base_faults,
    misfit,
    named_base,
    read_sources,
    shape_faults,
    trigger_notes,
)
from finetune.cogvideox import (
    ModelConfig,
    build_pipeline,
    empty_transformer,
    encode_prompts,
    load_scheduler,
    load_text,
    load_tokenizer,
    load_transformer,
    load_vae,
    require_base,
    tokenize,
)
from finetune.errors import ConfigError, FinetuneError, is_out_of_memory, raise_all
from finetune.facts import Facts, json_folder, pin_revision, read_facts
from finetune.files import require_writable
from finetune.generate_inputs import (
    TRAINING_RECORD,
    GenerateRequest,
    check_request,
    native_bucket,
    recorded_fps,
    training_record,
    transformer_root,
)
from finetune.geometry import parse_bucket
from finetune.ranks import compute_device
from finetune.sampling import SampleRequest, sample_videos
from finetune.types import Bucket
from finetune.videos import Frames, contact_sheet, write_mp4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateReport:
    """What was written."""

    videos: tuple[Path, ...]
    sheet: Path
    """All videos as rows of frames in one PNG."""
    bucket: Bucket
    frames: tuple[Frames, ...] = field(repr=False)
    """The videos before compression, each uint8 [F, H, W, 3], in the order of the prompts."""
    notes: tuple[str, ...] = ()
    """What was said of the request before it began."""

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
    tuned = None if request.transformer is None else transformer_root(request.transformer)
    sources, faults = read_sources(request.adapters)
    records = _records(request, sources)
    base, revision = _base(request, records, faults)
    revision = pin_revision(base, revision)
    facts = read_facts(base, revision)
    record = next((record for _, _, record in records if record), {})
    bucket = request.bucket or _recorded_bucket(record, facts) or native_bucket(facts)
    check_request(
        request,
        facts,
        bucket,
        [*faults, *_misfits(base, tuned or json_folder(base, revision), facts, sources, records)],
    )
    fps = request.fps or recorded_fps(record) or float(facts.native_fps)
    device = _device(request)
    # Sampling takes minutes per video.
    require_writable(request.out, kind=ConfigError, what="the videos", where=f"--output {request.out}")
    notes = [note for where, _, record in records for note in trigger_notes(record, where, request.prompts)]
    model = ModelConfig(pretrained=base, revision=revision, dtype=request.dtype)
    texts = [*(prompt.prompt for prompt in request.prompts), request.negative_prompt]
    notes += _unread(model, facts, texts)
    chosen = [source.note for source in sources if source.note]
    for choice in chosen:
        _log.info("note: %s", choice)
    for note in notes:  # now, not after minutes of sampling
        _log.warning("%s", note)
    dtype = model.torch_dtype()
    loaded_on = torch.device("cpu") if request.offload else device

    embeds = _embed(model, facts, texts, device)
    own = model if tuned is None else ModelConfig(pretrained=str(tuned))
    transformer = load_transformer(own, device=loaded_on, dtype=dtype)
    if tuned is None:  # an adapter that is put on another transformer is so on purpose
        _require_same_base(transformer, base, sources)
    scheduler = load_scheduler(model)
    load_adapters(facts, transformer, scheduler, sources)
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
    sheet = contact_sheet(rows, request.out / "sheet.png")
    return GenerateReport(tuple(paths), sheet, bucket, tuple(frames for _, frames in rows), (*chosen, *notes))


_Record = tuple[str, Path, dict[str, Any]]
"""Which option, its folder, and what its training says of itself (empty: nothing)."""


def _records(request: GenerateRequest, sources: Sequence[AdapterSource]) -> list[_Record]:
    records = [
        (source.where, source.adapter.path, dict(source.record)) for source in sources if source.adapter.strength
    ]
    if request.transformer is not None:
        where = f"--transformer {request.transformer}"
        records.append((where, request.transformer, training_record(request.transformer)))
    return records


def _base(request: GenerateRequest, records: Sequence[_Record], faults: list[FinetuneError]) -> tuple[str, str | None]:
    """The base to sample with and its revision: as asked for, or as the first record that names one has it."""
    if request.base is not None:
        return request.base, request.revision
    for _, folder, record in records:
        if found := named_base(record, folder):
            return found[0], request.revision or found[1]
    names = [str(record["base_model"]) for _, _, record in records if record.get("base_model")]
    told = f": the record names {names[0]!r}, a folder of the machine that trained it" if names else ""
    missing = ConfigError(f"there is no base model{told}", where="--model", fix="name it: a folder, a hub id, 5b, ...")
    raise_all(ConfigError, [*faults, missing], what="{n} things are wrong with the request")
    raise missing


def _misfits(
    base: str, folder: Path, facts: Facts, sources: Sequence[AdapterSource], records: Sequence[_Record]
) -> list[FinetuneError]:
    """Where the base, or the transformer in its place, is not what an adapter was made for."""
    faults = [fault for where, _, record in records for fault in base_faults(record, where, base, facts)]
    if not faults and (active := [source for source in sources if source.adapter.strength]):
        shapes = empty_transformer(folder, dtype=torch.float32, device="meta")
        faults = [fault for source in active for fault in shape_faults(source, shapes)]
    return [*faults]


def _require_same_base(transformer: Any, base: str, sources: Sequence[AdapterSource]) -> None:
    """Refuse adapters that were trained on other weights than these."""
    for source in sources:
        if not source.adapter.strength or not source.record:
            continue
        recorded = source.record.get("base_digest")
        if not isinstance(recorded, str):
            _log.warning("%s: its record does not say which weights of the base it was trained on", source.where)
            continue
        require_base(
            transformer,
            recorded,
            ConfigError,
            by="the adapter",
            where=f"--model {base}, {source.where}",
            fix=f"name them with --model; to try another base on purpose, move the adapter away from {TRAINING_RECORD}",
        )


def load_adapters(facts: Facts, transformer: Any, scheduler: Any, sources: Sequence[AdapterSource]) -> None:
    """Load adapters with the stock pipeline's own loader and set their strengths; one of strength 0 is left out.

    Raises:
        ConfigError: if an adapter does not fit the transformer, in full.
    """
    from peft import get_peft_model_state_dict

    active = [source for source in sources if source.adapter.strength != 0]
    pipeline = build_pipeline(facts, transformer=transformer, scheduler=scheduler)
    names = [f"adapter_{index}" for index in range(len(active))]
    for name, source in zip(names, active, strict=True):
        try:
            if source.settings is None:
                folder, file = str(source.adapter.file.parent), source.adapter.file.name
                pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name, use_safetensors=True)
            else:
                pipeline.load_lora_into_transformer(
                    dict(source.tensors),
                    transformer=transformer,
                    adapter_name=name,
                    metadata=dict(source.settings),
                    _pipeline=pipeline,
                )
        except (ValueError, RuntimeError, KeyError) as error:
            if is_out_of_memory(error):  # says nothing of the adapter
                raise
            raise misfit(source, str(error).strip().splitlines()[0]) from error
        # diffusers only warns of tensors that found no place.
        placed = {f"transformer.{key}" for key in get_peft_model_state_dict(transformer, adapter_name=name)}
        if left_out := source.tensors.keys() - placed:
            raise misfit(source, f"{len(left_out)} tensors have no place, such as {min(left_out)}")
    if active:
        pipeline.set_adapters(names, [source.adapter.strength for source in active])


def _unread(model: ModelConfig, facts: Facts, texts: Sequence[str]) -> list[str]:
    """A note on each prompt of which the text encoder does not get every character."""
    tokenized = tokenize(load_tokenizer(model), texts, facts)
    return [
        f"{tokens.unknown} characters of the prompt {text!r:.80} are unknown to the text encoder, which reads one mark"
        " for each run of them"
        for text, tokens in zip(texts, tokenized, strict=True)
        if tokens.unknown
    ]


def _embed(model: ModelConfig, facts: Facts, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
    """T5 embeddings [L, D] on the CPU; the encoder is gone from memory afterwards."""
    tokenizer, encoder = load_text(model, device=device)
    embeds = [encode_prompts(tokenizer, encoder, [prompt], facts)[0].cpu() for prompt in prompts]
    del tokenizer, encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return embeds


def _recorded_bucket(record: dict[str, Any], facts: Facts) -> Bucket | None:
    """The first bucket of a training record, if this base can sample it."""
    try:
        bucket = parse_bucket(record["buckets"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return None if facts.check_bucket(bucket) else bucket


def _device(request: GenerateRequest) -> torch.device:
    try:
        device = compute_device(request.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):  # another program holds all of it
            raise
        raise ConfigError(
            f"the device cannot be used: {str(error).splitlines()[0]}", where=f"--device {request.device or 'cuda'}"
        ) from None
    if request.offload and device.type == "cpu":
        raise ConfigError("there is no GPU to offload from", where="--offload", fix="leave --offload out")
    return device


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-") or "video"
