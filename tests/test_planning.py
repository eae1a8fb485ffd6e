"""The planner: its ledger against real allocations, its figures against known ones, its search by its own rules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from finetune.caching.encode import untiled_bytes
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.objective import velocity_losses
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.core.gpu import ALLOCATOR_SETTINGS, OVERHEAD_GIB, grow_segments, parse_bytes, usable
from finetune.core.types import GIB
from finetune.memory.config import MemoryConfig
from finetune.memory.host_buffers import host_buffer
from finetune.planner import command, cost_model, store
from finetune.planner import search as search_module
from finetune.planner.command import Prediction
from finetune.planner.cost_model import (
    DEFAULTS,
    beside_tensors,
    calibrate,
    card_here,
    held_note,
    keep,
    rates_of,
    step_cost,
    workspace_bytes,
)
from finetune.planner.estimate import Estimate, Training, estimate, fake_batches
from finetune.planner.fakes import empty_transformer, empty_vae, fake_world, rehearsed_once
from finetune.planner.memory_tracker import TRANSIENT, MemoryTracker, Phase, Point, Span, attention_workspace, measure
from finetune.planner.phases import EstimatedPart, PhaseName
from finetune.planner.predict import SHORT, Extended, extend, peaks, predict, spec_of
from finetune.planner.report import document, draw, text, verdict
from finetune.planner.search import QUANTISED, Found, Plan, candidates, resolve, search

pytestmark = pytest.mark.usefixtures("plans_alone")


@pytest.fixture(scope="session")
def look_alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of a 5B that is four heads wide and seven blocks deep: its blocks, small enough to be real."""
    return narrowed(tmp_path_factory.mktemp("look-alike"), layers=7, heads=4)


def narrowed(folder: Path, *, layers: int, heads: int) -> Path:
    for source in known_model("5b").rglob("*.json"):
        target = folder / source.relative_to(known_model("5b"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    path = folder / "transformer" / "config.json"
    changes = {"num_layers": layers, "num_attention_heads": heads}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 2}))
    return folder


def run(model: object, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"pretrained": str(model), "dtype": "bf16"},
        "data": {"sources": [{"path": "clips"}], "buckets": ["9x160x240"]},
        "method": {"rank": 8},
        "optimizer": {"kind": "adamw"},
        "train": {"steps": 10},
        "output_dir": "run",
    }
    return RunConfig.from_dict({**values, **changes})


SFT: dict[str, Any] = {"method": {"kind": "full"}, "optimizer": {"kind": "adamw8bit"}}


# --------------------------------------------------------------------------------------------------------- the ledger


def step_with(ledger: MemoryTracker, config: RunConfig, folder: Path, layers: int) -> Phase:
    spec = read_spec(str(folder))
    transformer = empty_transformer(folder, torch.bfloat16, config.memory, layers)
    training = Training(ledger, spec, config, transformer, torch.bfloat16)
    return training.step(fake_batches(spec, config, config.data.buckets[0], torch.bfloat16))


def test_fake_tensors_give_the_curve_of_real_ones(look_alike: Path) -> None:
    config = run(look_alike)
    with fake_world() as fake:
        ours = step_with(fake, config, look_alike, 2)
    with MemoryTracker() as real:
        theirs = step_with(real, config, look_alike, 2)
    # A few scalars: fake tensors copy constants and have no list form of a norm.
    assert abs(ours.peak.nbytes - theirs.peak.nbytes) <= 4096
    assert ours.where == theirs.where
    assert {name: point.nbytes // 65536 for name, point in ours.stations.items()} == pytest.approx(
        {name: point.nbytes // 65536 for name, point in theirs.stations.items()}, abs=1
    )


def test_the_peak_is_what_the_allocator_hands_out(look_alike: Path) -> None:
    """Against torch's own profiler of real CPU allocations, with no mode that watches."""
    config, spec = run(look_alike), read_spec(str(look_alike))
    with fake_world() as ledger:
        ours = step_with(ledger, config, look_alike, 2)
    resident = sum(
        nbytes
        for part, nbytes in ours.peak.parts.items()
        if part.endswith("weights") or "state" in part or part == "batch"
    )
    with MemoryTracker() as quiet:
        transformer = empty_transformer(look_alike, torch.bfloat16, config.memory, 2)
        training = Training(quiet, spec, config, transformer, torch.bfloat16)
        (batch,) = fake_batches(spec, config, config.data.buckets[0], torch.bfloat16)
        training._warm_up()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        velocity_losses(transformer, spec, training.alpha_bar, batch).sum().backward()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    assert len(events) > 500
    assert ours.peak.nbytes - resident == pytest.approx(highest, rel=0.005)


def test_a_tensor_kept_alive_is_seen(look_alike: Path) -> None:
    config = run(look_alike)
    kept: list[torch.Tensor] = []

    class Leaking(Training):
        def step(self, batches: Any) -> Phase:
            # Named to be told apart: what is allocated before a step and not part of it.
            kept.append(torch.zeros(1 << 20))
            return super().step(batches)

    spec = read_spec(str(look_alike))
    peaks = []
    for kind in (Training, Leaking):
        with fake_world() as ledger:
            transformer = empty_transformer(look_alike, torch.bfloat16, config.memory, 2)
            training = kind(ledger, spec, config, transformer, torch.bfloat16)
            peaks.append(training.step(fake_batches(spec, config, config.data.buckets[0], torch.bfloat16)).peak.nbytes)
    assert peaks[1] - peaks[0] == 4 << 20


def test_gradients_are_added_in_place_where_autograd_does() -> None:
    """While a mode watches, autograd makes a third tensor for a sum; the ledger does not count it."""
    size = 1 << 20

    def highest(*, twice: bool) -> int:
        with MemoryTracker() as ledger:
            leaf = torch.zeros(size, requires_grad=True)
            middle = leaf * 1.0
            begin = ledger.tick
            (middle * 2.0 + middle * 3.0 if twice else middle * 2.0).sum().backward()
            return measure("sums", ledger.pieces, begin, ledger.tick, {}).peak.nbytes

    # Two terms and what they are terms of, never a third gradient beside them.
    assert highest(twice=True) - highest(twice=False) <= 2 * 4 * size
    with MemoryTracker() as ledger:
        leaf = torch.zeros(size, requires_grad=True)
        middle = leaf * 1.0
        (middle * 2.0 + middle * 3.0).sum().backward()
    assert [piece for piece in ledger.pieces if piece.op == "sum of gradients"]


def test_storages_are_rounded_named_and_placed() -> None:
    with fake_world() as ledger:
        begin = ledger.tick
        small = torch.empty(3)
        pinned = host_buffer(1000, pinned=True, what="streamed weights")
        view = small[:2]
        ledger.name("batch", [view])
        phase = measure("p", ledger.pieces, begin, ledger.tick, {"all": begin})
        del pinned
        after = measure("q", ledger.pieces, ledger.tick, ledger.tick, {})
    assert phase.peak.parts == {"batch": 512}
    assert phase.pageable.nbytes + phase.pinned.nbytes == 1024 and after.pinned.nbytes == after.pageable.nbytes == 0


def test_attention_hides_its_gradient_in_float32() -> None:
    query = torch.empty(1, 48, 17_776, 64, device="meta")
    assert attention_workspace(query) == 4 * 48 * 17_792 * 64 + 4 * 48 * 17_792
    assert attention_workspace(query) / (4 * query.numel()) == pytest.approx(1, abs=0.02)


def test_8_bit_states_are_those_of_a_real_run(look_alike: Path) -> None:
    config = run(look_alike, **SFT)
    sizes = []
    for world in (fake_world(), MemoryTracker()):
        with world as ledger:
            spec = read_spec(str(look_alike))
            transformer = empty_transformer(look_alike, torch.bfloat16, config.memory, 1)
            training = Training(ledger, spec, config, transformer, torch.bfloat16)
            training._warm_up()
            training._name_residents()
            end = ledger.tick
            sizes.append(dict(measure("s", ledger.pieces, end, end, {}).peak.parts))
    # Constants that a library makes once in a process belong to whoever comes first.
    assert all(size.pop(TRANSIENT, 0) <= 8192 for size in sizes)
    assert sizes[0] == sizes[1]
    weights = sum(parameter.numel() for parameter in transformer.parameters())
    # Two bytes per weight, and two scales per 256 weights; small tensors are held in fp32.
    assert sizes[0]["optimizer state"] == pytest.approx(2 * weights * (1 + 4 / 256), rel=0.03)
    assert sizes[0]["master copies"] == pytest.approx(4 * weights, rel=0.01)


# ------------------------------------------------------------------------------------------------------- rehearsals


def test_5b_needs_what_was_counted_by_hand() -> None:
    """LoRA r128, fp32 AdamW: 10.38 GiB of weights, 0.49 of adapters, 0.98 of moments, 42 x 104 MiB of boundaries."""
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, method={"rank": 128})
    found = peaks(config)["train"]
    parts = {part: nbytes / GIB for part, nbytes in found.parts.items()}
    assert found.nbytes / GIB == pytest.approx(18.9, abs=0.2) and found.where == "backward, block 41 of 42"
    assert parts["frozen weights"] == pytest.approx(10.375, abs=0.01)
    assert parts["trainable weights"] == pytest.approx(0.492, abs=0.002)
    assert parts["optimizer state"] == pytest.approx(0.984, abs=0.002)
    assert parts["saved activations"] == pytest.approx(42 * 104.2 / 1024, abs=0.01)


STATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stock": ({}, {}),
    "none": ({"checkpointing": "none"}, {}),
    "selective": ({"checkpointing": "selective"}, {}),
    "fp8": ({"base": "fp8", "modulation": "host", "activations": "host"}, {}),
    "streamed": ({"streamed_blocks": "all", "activations": "host"}, {}),
    "released": ({"gradient_release": "exact", "optimizer_states": "host"}, SFT),
}


SLOW = {"none", "selective", "fp8"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STATES]
)
def test_two_short_models_give_the_figures_of_a_long_one(look_alike: Path, name: str) -> None:
    memory, method = STATES[name]
    config = run(look_alike, memory=memory, **method)
    whole = estimate(config, phases=("train",)).phase("train")
    found = peaks(config)["train"]
    assert found.nbytes == pytest.approx(whole.peak.nbytes, abs=65536)
    assert whole.where.startswith(found.where)
    assert found.pinned == pytest.approx(whole.pinned.nbytes, abs=65536)
    assert found.pageable == pytest.approx(whole.pageable.nbytes, abs=65536)


PARTLY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({"checkpointing": "selective", "keep_attention": 3}, {}),
    "streamed": ({"streamed_blocks": 4}, {}),
    "streamed, one slot": ({"streamed_blocks": 1}, {}),
    "streamed and trained": (
        {"streamed_blocks": 4, "gradient_release": "exact", "optimizer_states": "host"},
        SFT,
    ),
}


@pytest.mark.parametrize("name", PARTLY)
def test_blocks_that_are_treated_apart_are_counted(look_alike: Path, name: str) -> None:
    memory, method = PARTLY[name]
    config = run(look_alike, memory=memory, **method)
    whole = estimate(config, phases=("train",)).phase("train")
    found = peaks(config)["train"]
    assert found.nbytes == pytest.approx(whole.peak.nbytes, rel=0.005)
    assert found.pinned == pytest.approx(whole.pinned.nbytes, abs=65536)
    assert found.pageable == pytest.approx(whole.pageable.nbytes, abs=65536)


@pytest.mark.parametrize("memory", [{}, {"checkpointing": "selective"}], ids=["full", "selective"])
def test_under_ddp_all_gradients_are_there_all_the_time(look_alike: Path, memory: dict[str, Any]) -> None:
    """Another moment is the highest then: the end of the forward pass, where a single process has no gradient yet."""
    long = {"sources": [{"path": "clips"}], "buckets": ["49x480x720"]}
    config = run(look_alike, memory=memory, data=long, **SFT)
    with fake_world() as ledger:
        transformer = empty_transformer(look_alike, torch.bfloat16, config.memory)
        training = Training(ledger, read_spec(str(look_alike)), config, transformer, torch.bfloat16)
        training._prepare()
        for parameter in training.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        training.ledger.name("gradients", [p.grad for p in training.parameters.values() if p.grad is not None])
        true = training.step(fake_batches(training.spec, config, config.data.buckets[0], torch.bfloat16)).peak.nbytes
    alone, each = (peaks(config, processes=count)["train"].nbytes for count in (1, 2))
    largest = 2 * max(math.prod(parameter.shape) for parameter in training.parameters.values())
    assert abs(each - true) <= largest < (true - alone) / 2
    exact = predict(config, phases=("train",), processes=2, exact=True).phase("train").peak.nbytes
    assert exact == pytest.approx(each, rel=0.005)


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_a_module_that_repeats_itself_is_rehearsed_once(look_alike: Path, coder: str) -> None:
    """The same pieces as when it runs every time, born and gone in the same order."""
    found, runs = [], []
    for once in (False, True):
        with fake_world() as ledger, torch.no_grad(), contextlib.ExitStack() as stack:
            vae = empty_vae(look_alike, torch.bfloat16)
            vae.enable_tiling()
            ran = vae.get_submodule(coder).conv_in.register_forward_hook(lambda *_: runs[-1].append(1))
            stack.callback(ran.remove)
            if once:
                stack.enter_context(rehearsed_once(ledger, vae.get_submodule(coder)))
            runs.append([])
            begin = ledger.tick
            if coder == "encoder":
                vae.encode(torch.zeros(1, 3, 17, 480, 720, dtype=torch.bfloat16))
            else:
                vae.decode(torch.zeros(1, 16, 5, 60, 90, dtype=torch.bfloat16))
            pieces = [piece for piece in ledger.pieces if piece.born > begin]
            found.append((measure("p", pieces, begin, ledger.tick, {}), sum(piece.nbytes for piece in pieces)))
    (every, bytes_of_all), (ours, our_bytes) = found
    assert ours.peak.nbytes == pytest.approx(every.peak.nbytes, abs=65536)
    assert our_bytes == pytest.approx(bytes_of_all, rel=1e-4)
    assert len(runs[1]) < len(runs[0]) / 2


def test_a_module_that_leaves_something_behind_is_rehearsed_every_time() -> None:
    left: list[torch.Tensor] = []

    class Leaving(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            left.append(given + 1)
            return given * 2

    with fake_world() as ledger:
        module = Leaving()
        with rehearsed_once(ledger, module):
            for _ in range(3):
                module(torch.zeros(1 << 20))
        assert len(left) == 3
        held = sum(piece.nbytes for piece in ledger.pieces if piece.died > ledger.tick)
        assert held == 3 * 4 * (1 << 20)
        module(torch.zeros(8))
    assert len(left) == 4, "outside it is itself again"


def test_a_station_that_overtakes_is_found() -> None:
    """In the short models the first block is the highest; in the long one the last is."""
    few, more = SHORT

    def phase(layers: int) -> Phase:
        stations = {f"forward, block {number} of {layers}": Point(0.0, {"x": 100}) for number in range(layers)}
        stations[f"forward, block {layers - 1} of {layers}"] = Point(0.0, {"x": 10 * layers})
        nothing = Point(0.0, {})
        return Phase("p", nothing, "", nothing, nothing, (), (), stations)

    found = extend(phase(few), phase(more), 30)
    assert (found.nbytes, found.where) == (300, "forward, block 29 of 30")


def test_every_phase_is_rehearsed(look_alike: Path) -> None:
    validation = {"sample_every": 5, "samples": [{"prompt": "a"}]}
    config = run(look_alike, validation=validation, train={"steps": 3, "accumulation": 2, "ema_decay": 0.9})
    found = estimate(config)
    assert [phase.name for phase in found.phases] == [
        "T5 pass",
        "VAE pass",
        "training",
        "validation sampling",
        "VAE decode",
    ]
    training = found.phase("train")
    assert training.peak.parts["moving average"] > 0 and training.note.endswith("accumulated")
    # The optimizer's states and the VAE are there while a video is sampled.
    assert {"optimizer state", "VAE weights"} <= found.phase("sample").peak.parts.keys()
    assert found.phase("encode").note == "in tiles"
    # A sampled video is decoded beside what training left, by a decoder that was rehearsed by itself.
    decode, sample = found.phase("decode").peak.parts, found.phase("sample").peak.parts
    resting = ("frozen weights", "trainable weights", "optimizer state", "moving average", "VAE weights")
    assert {part: decode[part] for part in resting} == {part: sample[part] for part in resting}
    assert decode["block transient"] > 0 and found.phase("decode").where.startswith("VAE decoder")
    spacious = estimate(config, phases=("encode",), card_bytes=80 * GIB)
    assert spacious.phase("encode").note == "whole frames"
    # The rule by which precomputing decides, at the size where it turns.
    turn = untiled_bytes(torch.bfloat16, config.data.buckets[0]) + spacious.phase("encode").peak.parts["VAE weights"]
    notes = [estimate(config, phases=("encode",), card_bytes=size).phase("encode").note for size in (turn - 1, turn)]
    assert notes == ["in tiles", "whole frames"]


def test_a_rehearsal_is_kept_until_the_code_changes(
    look_alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[str] = []
    monkeypatch.setattr(store, "estimate", functools.partial(counted, estimate, made))
    config = run(look_alike)
    options: dict[str, Any] = {"layers": 1, "phases": ("encode", "train")}
    first = store.rehearsed(config, **options)
    assert store.rehearsed(config, **options) == first and made == ["encode", "run"]
    # What memory does not depend on makes no difference; what it does, does.
    assert store.rehearsed(run(look_alike, optimizer={"kind": "adamw", "lr": 1e-5}), **options) == first
    assert len(made) == 2
    store.rehearsed(run(look_alike, method={"rank": 16}), **options)
    assert made[2:] == ["run"], "the VAE knows nothing of the method"
    store.rehearsed(run(look_alike, data={"sources": [{"path": "c"}], "buckets": ["9x64x64"]}), **options)
    assert made[3:] == ["encode", "run"]
    assert store.is_stored(config, card_bytes=None, **options)
    monkeypatch.setattr(store, "_versions", lambda: {"torch": "other"})
    assert not store.is_stored(config, card_bytes=None, **options)
    store.rehearsed(config, **options)
    assert made[5:] == ["encode", "run"]
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")  # cut short: made again, not believed
    assert not store.is_stored(config, card_bytes=None, **options)
    store.rehearsed(config, **options)
    assert made[7:] == ["encode", "run"]


def counted(make: Any, made: list[str], config: RunConfig, *, through: Any, **options: Any) -> Estimate:
    """A rehearsal that says which of its parts it makes."""

    def noting(part: EstimatedPart) -> tuple[Phase, ...]:
        def noted() -> tuple[Phase, ...]:
            made.append(part.depends_on["phase"])
            return part.make()

        return through(dataclasses.replace(part, make=noted))  # type: ignore[no-any-return]

    return make(config, through=noting, **options)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ time, and the search


def test_the_arithmetic_of_5b() -> None:
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, method={"rank": 128})
    spec = read_spec(str(known_model("5b")))
    # Only matrix products count: 169.1 TFLOP of linear layers, 4.7 of adapters, 163.1 of attention (counted by others).
    instant = DEFAULTS["H100"].model_copy(update={"gemm": 1e12, "attention_forward": 1e12, "attention_backward": 1e12})
    instant = instant.model_copy(update={"memory": 1e30})
    cost = step_cost(config, spec, MemoryConfig(), instant)
    assert cost.forward_s == pytest.approx(169.1 + 163.1 + 4.7, rel=0.01)
    assert cost.recompute_s == pytest.approx(cost.forward_s)
    assert cost.backward_s == pytest.approx(169.1 + 2.5 * 163.1 + 9.4, rel=0.01)
    kept = step_cost(config, spec, MemoryConfig(checkpointing="selective"), instant)
    assert cost.recompute_s - kept.recompute_s == pytest.approx(163.1, rel=0.01)
    assert step_cost(config, spec, MemoryConfig(checkpointing="none"), instant).recompute_s == 0


def test_copies_hide_behind_computation_until_they_do_not() -> None:
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]})
    spec = read_spec(str(known_model("5b")))
    rates = DEFAULTS["H100"]
    plain, streamed = MemoryConfig(), MemoryConfig(streamed_blocks="all")
    hidden = step_cost(config, spec, streamed, rates).step_s - step_cost(config, spec, plain, rates).step_s
    slow = rates.model_copy(update={"host_to_device": 1e9})
    seen = step_cost(config, spec, streamed, slow).step_s - step_cost(config, spec, plain, slow).step_s
    alone = step_cost(config, spec, MemoryConfig(streamed_blocks="all", ring=1), rates).waiting_s
    assert 0 < hidden < 0.05 < 1 < seen
    assert alone > 0.3


def test_weights_are_copied_once_for_all_clips_that_go_together() -> None:
    spec, rates = read_spec(str(known_model("5b"))), DEFAULTS["4090"]

    def seconds(batch_size: int, accumulation: int = 1, **memory: Any) -> float:
        train = {"steps": 1, "batch_size": batch_size, "accumulation": accumulation}
        config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["9x256x256"]}, train=train)
        return step_cost(config, spec, MemoryConfig(**memory), rates).step_s

    assert seconds(8) == pytest.approx(8 * seconds(1), rel=0.01) == pytest.approx(seconds(4, 2), rel=0.01)
    # One clip computes for less time than its weights need to arrive; eight hide them.
    assert seconds(1, streamed_blocks="all") > 1.5 * seconds(1)
    assert seconds(8, streamed_blocks="all") < 1.05 * seconds(8)
    assert seconds(8, streamed_blocks="all", clips_at_once=1) == pytest.approx(
        8 * seconds(1, streamed_blocks="all"), rel=0.01
    )
    assert seconds(8, base="fp8") - seconds(8) == pytest.approx(seconds(1, base="fp8") - seconds(1), rel=0.01)


@pytest.fixture
def reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks by arithmetic in place of rehearsals: what 5B's weights, activations and blocks are, in round figures."""
    monkeypatch.setattr(search_module, "peaks", reckon)


def reckon(config: RunConfig, *, processes: int = 1) -> dict[PhaseName, Extended]:
    memory, layers = config.memory, 42
    blocks = 9.0 * {"native": 1.0, "fp8": 0.5, "int8": 0.5, "nf4": 0.27}[memory.base]
    resident = blocks + (1.5 if memory.modulation == "device" else 0)
    streamed = layers if memory.streamed_blocks == "all" else memory.streamed_blocks
    device = resident * (1 - streamed / layers) + (2 * resident / layers if streamed else 0) + 0.8
    host = resident * streamed / layers + (1.5 if memory.modulation == "host" else 0)
    if memory.checkpointing == "none":
        device += 100
    else:
        device += 0.6 if memory.activations == "host" else 4.2
        host += 4.2 if memory.activations == "host" else 0
    if memory.checkpointing == "selective":
        device += 4.3 * (memory.keep_attention or layers) / layers
    device += {"stock": 2.3, "lean": 1.2}[memory.block]
    device += config.method.rank / 128 if config.method.kind == "lora" else 0
    return {"train": Extended({"x": round(device * GIB)}, "somewhere", round(host * GIB), 0)}


def find(card_gib: float, ram_gib: float | None = None, **options: Any) -> Found:
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, **options.pop("run", {}))
    ram_bytes = None if ram_gib is None else round(ram_gib * GIB)
    card_bytes = round((card_gib + OVERHEAD_GIB) * GIB)
    return search(config, DEFAULTS["H100"], card_bytes=card_bytes, ram_bytes=ram_bytes, **options)


CARDS, RAMS = (3.0, 6.0, 8.0, 10.0, 13.0, 15.0, 17.0, 24.0), (None, 4.0, 8.0, 12.0)


@pytest.mark.parametrize("device", ["H100", "4090"])
def test_no_plan_is_much_faster_than_what_is_found(reckoned: None, device: str) -> None:
    """Against every legal memory section, on cards and hosts of many sizes."""
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, method={"rank": 128})
    spec, rates = spec_of(config), DEFAULTS[device]
    every = []
    for one in candidates(config, spec, memory_traits(config, spec), rates, ["native", *QUANTISED]):
        (peak,) = reckon(config.model_copy(update={"memory": one.memory})).values()
        every.append((one, peak.nbytes, peak.pinned))
    fits = none = 0
    for card, ram in itertools.product(CARDS, RAMS):
        size, host = round((card + OVERHEAD_GIB) * GIB), math.inf if ram is None else ram * GIB
        found = search(config, rates, card_bytes=size, ram_bytes=None if ram is None else round(host))
        held = [
            one
            for one, nbytes, pinned in every
            if pinned <= host and nbytes <= card * GIB - (0.05 * size if one.cut else 0)
        ]
        native = [one for one in held if one.family.base == "native"]
        assert (found.best is None) == (not held), (card, ram)
        if found.best is None:
            none += 1
            continue
        fits += 1
        assert found.best.peak_bytes <= card * GIB and found.best.host_bytes <= host
        assert found.quantised_unasked == (not native), (card, ram)
        fastest = min(one.step_s for one in native or held)
        assert found.best.step_s <= 1.02 * fastest, (card, ram, found.best.memory)
    assert fits > 20 and none >= 1


@pytest.mark.parametrize("method", [{"kind": "full"}, {"use_dora": True}], ids=["full", "dora"])
def test_a_run_that_cannot_be_quantised_is_told_what_it_lacks_too(reckoned: None, method: dict[str, Any]) -> None:
    changes = {"run": {"method": method, "optimizer": {"kind": "adamw8bit"}}}
    found = find(0.2, **changes)
    assert found.best is None and not found.quantised_unasked and found.smallest.memory.base == "native"
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, **changes["run"])
    with pytest.raises(ConfigError, match=r"the smallest needs .* more, in training"):
        resolve(config, DEFAULTS["H100"], card_bytes=GIB)


def test_a_host_that_is_too_small_is_told_as_such(reckoned: None) -> None:
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, method={"use_dora": True})
    with pytest.raises(ConfigError, match=r"GiB of host memory, .* more than the run may have") as caught:
        resolve(config, DEFAULTS["H100"], card_bytes=8 * GIB, ram_bytes=2 * GIB)
    assert "GiB of host memory would do (--ram" in caught.value.fix


def test_larger_cards_are_faster(reckoned: None) -> None:
    steps = [plan.step_s for card in (130.0, 24.0, 17.0, 13.0, 6.0) if (plan := find(card).best) is not None]
    assert len(steps) == 5 and steps == sorted(steps) and steps[0] < steps[-1]
    assert (best := find(130.0).best) is not None and best.memory.checkpointing == "none"


def test_a_quantised_base_that_is_faster_has_to_be_allowed(reckoned: None) -> None:
    asked, unasked = find(15.0, quantize=True).best, find(15.0).best
    assert asked is not None and unasked is not None and unasked.memory.base == "native"
    assert asked.step_s <= unasked.step_s


def test_what_is_cut_to_fit_leaves_a_twentieth_free(reckoned: None) -> None:
    """So far a prediction may be off."""
    found = [(card, plan) for card in CARDS if (plan := find(card).best) is not None]
    cut = [one for one in found if one[1].memory.keep_attention or one[1].memory.streamed_blocks not in (0, "all")]
    assert len(cut) >= 3
    assert all(plan.peak_bytes <= (card - 0.05 * (card + OVERHEAD_GIB)) * GIB for card, plan in cut)


def test_a_video_that_is_sampled_counts_too(reckoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = Extended({"x": 40 * GIB}, "VAE decoder", 0, 0)

    def with_video(config: RunConfig, *, processes: int) -> dict[PhaseName, Extended]:
        return {**reckon(config), **({"decode": decoding} if config.validation.samples else {})}

    monkeypatch.setattr(search_module, "peaks", with_video)
    videos = {"validation": {"sample_every": 5, "samples": [{"prompt": "a"}]}}
    assert find(36.0).best is not None and find(36.0, run=videos).best is None
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, **videos)
    with pytest.raises(ConfigError, match=r"needs 5\.20 GiB more, in VAE decode") as caught:
        resolve(config, DEFAULTS["H100"], card_bytes=36 * GIB)
    assert "validation.samples: [] fits" in caught.value.fix


def test_what_does_not_fit_is_told_by_how_much_and_what_would(reckoned: None) -> None:
    config = run("5b", data={"sources": [{"path": "c"}], "buckets": ["49x480x720"]}, method={"rank": 256})
    smallest = find(0.2, run={"method": {"rank": 256}}).smallest
    card = smallest.peak_bytes + round((OVERHEAD_GIB - 1) * GIB)
    with pytest.raises(ConfigError, match=r"the smallest needs 1\.00 GiB more") as caught:
        resolve(config, DEFAULTS["H100"], card_bytes=card)
    assert "method.rank: 32 fits" in caught.value.fix


def test_rates_are_measured_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = calibrate(torch.device("cpu"), seconds=0.05, tokens=256, width=128)
    assert measured.source == "measured" and all(value > 0 for value in list(measured.model_dump().values())[2:])
    assert rates_of(measured.device).source == "of another card"
    path = keep(measured)
    assert rates_of(measured.device) == measured and path.is_relative_to(tmp_path)
    path.write_text("{}")
    assert rates_of("NVIDIA H100 80GB HBM3").gemm == DEFAULTS["H100"].gemm
    assert rates_of(measured.device).source == "of another card"
    assert rates_of("h200").memory == DEFAULTS["H200"].memory and rates_of("NVIDIA A100-SXM4-80GB").gemm == 265e12
    assert (
        rates_of("NVIDIA RTX A1000 Laptop GPU").source
        == rates_of("NVIDIA GeForce RTX 3090").source
        == "of another card"
    )
    assert cost_model.OTHER in DEFAULTS


# ------------------------------------------------------------------------------------------------------- what is said


def some_rehearsal() -> Estimate:
    curve = tuple(Point(at / 10, {"frozen weights": 10 * GIB, "block transient": at * GIB // 2}) for at in range(11))
    nothing = Point(0.0, {})
    spans = (Span("forward", 0.0, 0.4), Span("backward", 0.4, 1.0))
    phase = Phase("training", curve[-1], "backward, block 1 of 2", nothing, nothing, curve, spans, {})
    return Estimate((phase,), "9x64x64", 100)


def test_a_verdict_counts_the_overhead() -> None:
    rehearsal = some_rehearsal()
    assert verdict(rehearsal, round(16.2 * GIB) + 1).fits is True
    assert verdict(rehearsal, round(16.1 * GIB)).fits is False
    assert verdict(rehearsal, None).fits is None
    said = text(run("5b"), rehearsal, verdict(rehearsal, 16 * GIB))
    assert "a card of 16.0 GiB is 0.20 GiB too small" in said and "predicted, not measured" in said
    assert document(rehearsal, verdict(rehearsal, 24 * GIB))["peak_bytes"] == 15 * GIB
    rows = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in said.splitlines() if line}
    assert (rows["frozen weights"], rows["block transient"], rows["together"]) == ("10.00", "5.00", "15.00")
    poor = dataclasses.replace(rehearsal.phases[0], pinned=Point(0.0, {"x": 40 * GIB}))
    assert verdict(dataclasses.replace(rehearsal, phases=(poor,)), 24 * GIB, 32 * GIB).fits is False
    # What two phases need one after the other is not needed at once.
    other = dataclasses.replace(poor, pinned=Point(0.0, {}), pageable=Point(0.0, {"y": 30 * GIB}))
    assert dataclasses.replace(rehearsal, phases=(poor, other)).host_bytes == 40 * GIB


@pytest.mark.parametrize(
    ("device", "setting", "mib"),
    [
        ("NVIDIA A100-SXM4-80GB", None, 8.125),
        ("NVIDIA GeForce RTX 4090", None, 8.125),
        ("NVIDIA H100 80GB HBM3", None, 32),
        ("NVIDIA H200", None, 32),
        ("NVIDIA GeForce RTX 5090", None, 32),
        ("NVIDIA B200", None, 32),
        ("NVIDIA A100-SXM4-80GB", ":4096:8", 32),  # what train.deterministic sets
        ("NVIDIA H100 80GB HBM3", ":16:8", 0.125),
        ("NVIDIA H100 80GB HBM3", "nonsense", 32),
    ],
)
def test_cublas_takes_a_workspace_in_each_thread(device: str, setting: str | None, mib: float, monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert workspace_bytes(device, setting) == mib * 2**20
    beside = beside_tensors(device, workspace=setting)
    assert beside["cuBLAS workspaces"] == 2 * mib * 2**20
    assert sum(beside.values()) == round(OVERHEAD_GIB * GIB) == GIB - usable(GIB)
    assert sum(beside_tensors(device, processes=2).values()) == GIB - usable(GIB, processes=2)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1024:1")
    assert workspace_bytes(device) == 2**20


def test_what_is_beside_the_tensors_is_said_and_counted() -> None:
    rehearsal = some_rehearsal()
    beside = beside_tensors("NVIDIA H100 80GB HBM3", processes=2)
    judged = verdict(rehearsal, 24 * GIB, beside=beside)
    assert judged.spare_bytes == 24 * GIB - sum(beside.values()) - 15 * GIB
    said = text(run("5b"), rehearsal, judged, processes=2)
    rows = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in said.splitlines() if line}
    names = ("CUDA context, fragmentation", "cuBLAS workspaces", "NCCL buffers", "together")
    assert [rows[name] for name in names] == ["1.14", "0.06", "0.57", "15.00"]  # the tensors' own sum is what it was
    told = document(rehearsal, judged)
    assert told["overhead_bytes"] == sum(told["beside_bytes"].values()) == sum(beside.values())
    # Several processes have less room than one: the largest plan that fits alone fits no more.
    plan = Plan(MemoryConfig(), 1.0, (("train", usable(24 * GIB)),), 0)
    assert plan.fits(24 * GIB, None) and not plan.fits(24 * GIB, None, processes=2)


@pytest.fixture
def gpu(monkeypatch) -> Callable[..., None]:
    """``gpu(total, free, reserved)``: a GPU with that many GiB."""

    def install(total: float, free: float, reserved: float = 0.0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (round(free * GIB), round(total * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _=None: round(reserved * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA A100-SXM4-80GB")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))

    return install


def test_what_other_programs_hold_is_not_planned_with(gpu) -> None:
    gpu(80, 79.6)  # our own context
    assert card_here() == 80 * GIB and held_note() == ""
    gpu(80, 59.5, reserved=20)  # and our own tensors
    assert card_here() == 80 * GIB and held_note() == ""
    gpu(80, 49.5, reserved=20)
    assert card_here() == 70 * GIB
    assert held_note() == "other programs hold 10.00 GiB of this GPU's 80.00 GiB (nvidia-smi)"
    gpu(24, 10)
    assert usable(card_here()) < 10 * GIB


def test_a_plan_is_made_for_what_is_free(gpu, monkeypatch) -> None:
    planned_for: list[int] = []

    def resolved(config: RunConfig, *_: object, card_bytes: int, **__: object) -> tuple[RunConfig, Found]:
        planned_for.append(card_bytes)
        best = Plan(MemoryConfig(), 1.0, (("train", GIB),), 0)
        return config.model_copy(update={"memory": MemoryConfig()}), Found(best, (), best)

    monkeypatch.setattr(command, "predict", lambda *_, **__: some_rehearsal())
    monkeypatch.setattr(command, "resolve", resolved)
    monkeypatch.setattr(command, "resolve", resolved)
    config = run("5b", memory={"kind": "auto"})
    gpu(24, 24)
    free = command.plan(config).text
    assert "other programs" not in free and "a card of 24.0 GiB has" in free
    gpu(24, 14)
    held = command.plan(config).text
    assert held.startswith("other programs hold 9.50 GiB of this GPU's 24.00 GiB (nvidia-smi): planned for the rest")
    assert "a card of 14.5 GiB is 1.70 GiB too small" in held
    assert command.settled(config)[1][0].startswith("other programs hold 9.50 GiB")
    asked = command.plan(config, budget="24GiB").text  # for a card that may be elsewhere
    assert "other programs" not in asked and "a card of 24.0 GiB has" in asked
    assert [each / GIB for each in planned_for] == [24, 14.5, 14.5, 24]


def test_a_measured_peak_is_compared_with_the_workspaces_in_it() -> None:
    said = Prediction(10 * GIB, "", workspaces=GIB // 2).compared(10.5)
    assert said == "peak memory: predicted 10.50 GiB, measured 10.50 GiB (+0.0 %)"


@pytest.mark.parametrize("name", [None, *ALLOCATOR_SETTINGS])
def test_segments_grow_unless_the_user_says_otherwise(name: str | None, monkeypatch) -> None:
    for each in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:512")
    grow_segments()
    there = {each: os.environ[each] for each in ALLOCATOR_SETTINGS if each in os.environ}
    assert there == {name or "PYTORCH_ALLOC_CONF": "max_split_size_mb:512" if name else "expandable_segments:True"}


def test_the_command_line_says_so_before_torch_is_there() -> None:
    code = """
import sys
from finetune.cli import main as cli
from finetune.core import gpu
gpu.grow_segments = lambda: print("torch" in sys.modules)
cli.main(["plan", "--config", "no-such.yaml"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "curve.png"
    draw(some_rehearsal().phases[0], "a title", path, card_bytes=24 * GIB)
    image = Image.open(path).convert("RGB")
    colours = {colour for count, colour in image.getcolors(1 << 24) if count > 2000}
    assert image.size == (1500, 840) and len(colours) >= 4


def test_predicted_beside_measured() -> None:
    assert Prediction(10 * GIB, "").compared(10.5) == "peak memory: predicted 10.00 GiB, measured 10.50 GiB (+5.0 %)"
    assert Prediction(None, "could not be made").compared(10.5) == ""


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        *((name, 24 * GIB) for name in ("24GiB", "24GB", "24", "24 gb", "24.0", "24G")),
        ("1.5 gb", 3 * GIB // 2),
        ("800 MiB", 800 * 2**20),
        ("800MB", 800 * 2**20),
        ("1TB", 1024 * GIB),
    ],
)
def test_amounts_of_memory(written: str, nbytes: int) -> None:
    """A card of "24 GB" has 24 GiB, however it is written; the configuration reads it alike."""
    number = yaml.safe_load(written)
    assert MemoryConfig.model_validate({"kind": "auto", "budget": number}).budget == str(number)
    assert parse_bytes(written) == nbytes
    assert math.isclose(usable(nbytes), nbytes - OVERHEAD_GIB * GIB, abs_tol=1)


@pytest.mark.parametrize("written", ["", "much", "-3", "0", "24 parsecs", "nan", "9" * 400, "1e3"])
def test_other_words_are_no_amounts(written: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_bytes(written)


@pytest.mark.slow
def test_lean_plans_are_extended_and_say_the_same(look_alike: Path) -> None:
    memory = {"block": "lean", "activations": "host", "modulation": "host"}
    config = run(look_alike, memory=memory)
    quick, exact = (predict(config, phases=("train",), exact=exact).phase("train") for exact in (False, True))
    assert quick.curve == () and len(exact.curve) > 50
    assert quick.peak.nbytes == pytest.approx(exact.peak.nbytes, abs=65536)
