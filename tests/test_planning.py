"""The planner: its tracker against real allocations, its figures against known ones, its search by its own rules."""

from __future__ import annotations

import dataclasses
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
from finetune.cogvideox.load import empty_transformer
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.objective import velocity_losses
from finetune.cogvideox.spec import read_spec, spec_of
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.core.gpu import ALLOCATOR_SETTINGS, OVERHEAD_GIB, grow_segments, parse_bytes, usable
from finetune.core.types import GIB
from finetune.memory.config import MemoryConfig
from finetune.memory.host_buffers import host_buffer
from finetune.memory.quantized_linear import placement
from finetune.planner import cost_model, plan
from finetune.planner import estimate as estimates
from finetune.planner import search as search_module
from finetune.planner.cost_model import (
    DEFAULTS,
    calibrate,
    card_here,
    held_note,
    overhead,
    rates_of,
    save_rates,
    workspace_bytes,
)
from finetune.planner.estimate import SHORT, Estimate, estimate, extend, predict
from finetune.planner.fake_run import TrackedTraining, fake_batches, fake_world
from finetune.planner.memory_tracker import PHASES, TRANSIENT, MemoryTracker, Phase, Point, attention_workspace, measure
from finetune.planner.plan import Prediction, choose_memory
from finetune.planner.report import Verdict, document, text
from finetune.planner.search import QUANTISED, Machine, MemoryPlan, SearchResult, candidates, fit_memory, search
from finetune.planner.step_time import BlockUnits, step_cost

pytestmark = pytest.mark.usefixtures("estimates_kept")

SFT: dict[str, Any] = {"method": {"kind": "full"}, "optimizer": {"kind": "adamw8bit"}}
NATIVE_BUCKET: dict[str, Any] = {"sources": [{"path": "clips"}], "buckets": ["49x480x720"]}


@pytest.fixture(scope="session")
def look_alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of a 5B that is four heads wide and seven blocks deep: its blocks, small enough to be real."""
    folder = tmp_path_factory.mktemp("look-alike")
    changes = {"transformer": {"num_layers": 7, "num_attention_heads": 4}, "text_encoder": {"num_layers": 2}}
    for source in known_model("5b").rglob("*.json"):
        target = folder / source.relative_to(known_model("5b"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(json.loads(source.read_text()) | changes.get(target.parent.name, {})))
    return folder


def run(model: object = "5b", **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"pretrained": str(model), "dtype": "bf16"},
        "data": {"sources": [{"path": "clips"}], "buckets": ["9x160x240"]},
        "method": {"rank": 8},
        "optimizer": {"kind": "adamw"},
        "train": {"steps": 10},
        "output_dir": "run",
    }
    return RunConfig.from_dict({**values, **changes})


# ------------------------------------------------------------------------------------------------------- the tracker


def training_in(tracker: MemoryTracker, config: RunConfig, layers: int | None = 2) -> TrackedTraining:
    folder = Path(config.model.pretrained)
    base = placement(config.memory.base)
    transformer = empty_transformer(folder, dtype=torch.bfloat16, placement=base, layers=layers)
    return TrackedTraining(tracker, read_spec(str(folder)), config, transformer, torch.bfloat16)


def step_of(training: TrackedTraining) -> Phase:
    config = training.config
    return training.step(fake_batches(training.spec, config, config.data.buckets[0], torch.bfloat16))


@pytest.mark.parametrize("method", [{"rank": 8}, {"kind": "lokr"}], ids=str)
def test_fake_tensors_give_the_curve_of_real_ones(look_alike: Path, method: dict[str, Any]) -> None:
    with fake_world() as fake:
        ours = step_of(training_in(fake, run(look_alike, method=method)))
    with MemoryTracker() as real:
        theirs = step_of(training_in(real, run(look_alike, method=method)))
    # A few scalars: fake tensors copy constants and have no list form of a norm.
    assert abs(ours.peak.nbytes - theirs.peak.nbytes) <= 4096
    assert ours.where == theirs.where
    assert {name: point.nbytes // 65536 for name, point in ours.stations.items()} == pytest.approx(
        {name: point.nbytes // 65536 for name, point in theirs.stations.items()}, abs=1
    )


def test_the_peak_is_what_the_allocator_hands_out(look_alike: Path) -> None:
    """Against torch's own profiler of real CPU allocations, with no mode that watches."""
    with fake_world() as tracker:
        ours = step_of(training_in(tracker, run(look_alike)))
    resident = ("frozen weights", "trainable weights", "optimizer state", "batch")
    with MemoryTracker() as tracker:
        training = training_in(tracker, run(look_alike))
        (batch,) = fake_batches(training.spec, training.config, training.config.data.buckets[0], torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        velocity_losses(training.transformer, training.spec, training.alpha_bar, batch).sum().backward()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert len(sizes) > 500
    transient = ours.peak.nbytes - sum(ours.peak.parts[part] for part in resident)
    assert transient == pytest.approx(max(itertools.accumulate(sizes)), rel=0.005)


def test_a_tensor_that_is_kept_is_seen(look_alike: Path) -> None:
    peaks = []
    for elements in (0, 1 << 20):
        with fake_world() as tracker:
            training, _kept = training_in(tracker, run(look_alike)), torch.zeros(elements)
            peaks.append(step_of(training).peak.nbytes)
    assert peaks[1] - peaks[0] == 4 << 20


def test_gradients_are_added_in_place_where_autograd_does() -> None:
    """While a mode watches, autograd makes a third tensor for a sum; the tracker does not count it."""
    size, peaks = 1 << 20, []
    for factors in ((2.0,), (2.0, 3.0)):
        with MemoryTracker() as tracker:
            middle = torch.zeros(size, requires_grad=True) * 1.0
            begin = tracker.tick
            sum((middle * factor for factor in factors[1:]), middle * factors[0]).sum().backward()
            peaks.append(measure("sums", tracker.allocations, begin, tracker.tick).peak.nbytes)
    # Two terms and what they are terms of, never a third gradient beside them.
    assert peaks[1] - peaks[0] <= 2 * 4 * size
    assert [allocation for allocation in tracker.allocations if allocation.op == "sum of gradients"]


def test_a_module_that_runs_once_per_shape_holds_what_it_would_each_time() -> None:
    """Also where what is held beside it has grown since its only run."""
    phases, runs = [], []
    for once in (False, True):
        layers = torch.nn.Sequential(*(torch.nn.Linear(*sizes) for sizes in ((256, 1024), (1024, 8)))).requires_grad_(
            False
        )
        layers[0].register_forward_hook(lambda *_, once=once: runs.append(once))
        with MemoryTracker() as tracker:
            if once:
                tracker.run_once_per_shape(layers)
            begin = tracker.tick
            outputs = [layers(torch.zeros(rows, 256)) for rows in (64, 64, 32, 64)]
            phase = measure("p", tracker.allocations, begin, tracker.tick)
        phases.append((phase.peak.nbytes, phase.where, [output.shape for output in outputs]))
    assert phases[0] == phases[1]
    assert (runs.count(False), runs.count(True)) == (4, 2)


def test_storages_are_rounded_named_and_placed() -> None:
    with fake_world() as tracker:
        begin = tracker.tick
        small = torch.empty(3)
        pinned = host_buffer(1000, pinned=True, what="streamed weights")
        tracker.name("batch", [small[:2]])
        phase = measure("p", tracker.allocations, begin, tracker.tick)
        del pinned
        after = measure("q", tracker.allocations, tracker.tick, tracker.tick)
    assert phase.peak.parts == {"batch": 512}
    assert phase.pageable + phase.pinned == 1024 and after.pinned == after.pageable == 0


def test_attention_hides_its_gradient_in_float32() -> None:
    query = torch.empty(1, 48, 17_776, 64, device="meta")
    assert attention_workspace(query) == 4 * 48 * 17_792 * 64 + 4 * 48 * 17_792
    assert attention_workspace(query) / (4 * query.numel()) == pytest.approx(1, abs=0.02)


def test_8_bit_states_are_those_of_a_real_run(look_alike: Path) -> None:
    sizes = []
    for world in (fake_world(), MemoryTracker()):
        with world as tracker:
            training = training_in(tracker, run(look_alike, **SFT), layers=1)
            sizes.append(dict(training.rest().peak.parts))
    # Constants that a library makes once in a process belong to whoever comes first.
    assert all(size.pop(TRANSIENT, 0) <= 8192 for size in sizes)
    assert sizes[0] == sizes[1]
    weights = sum(parameter.numel() for parameter in training.transformer.parameters())
    # Two bytes per weight, and two scales per 256 weights; small tensors are held in fp32.
    assert sizes[0]["optimizer state"] == pytest.approx(2 * weights * (1 + 4 / 256), rel=0.03)
    assert sizes[0]["master copies"] == pytest.approx(4 * weights, rel=0.01)


def test_the_state_of_any_optimizer_is_measured_by_its_own_step(look_alike: Path) -> None:
    """Prodigy keeps four numbers of each weight, torch's AdamW two."""
    pytest.importorskip("pytorch_optimizer", reason="the extra 'optimizers' is not installed")
    sizes = {}
    for name in ("pytorch_optimizer.Prodigy", "torch.optim.AdamW"):
        config = run(look_alike, optimizer={"kind": "custom", "name": name})
        with fake_world() as tracker:
            sizes[name] = training_in(tracker, config, layers=1).rest().peak.parts["optimizer state"]
    assert sizes["pytorch_optimizer.Prodigy"] == pytest.approx(
        2 * sizes["torch.optim.AdamW"], rel=0.05
    )  # and counts of steps


# --------------------------------------------------------------------------------------------------------- estimates


def train_peak(config: RunConfig, **options: Any) -> Phase:
    return predict(config, phases=("train",), **options).phase("train")


def test_5b_needs_what_was_counted_by_hand() -> None:
    """LoRA r128, fp32 AdamW: 10.38 GiB of weights, 0.49 of adapters, 0.98 of moments, 42 x 104 MiB of boundaries."""
    found = train_peak(run(data=NATIVE_BUCKET, method={"rank": 128}))
    parts = {part: nbytes / GIB for part, nbytes in found.peak.parts.items()}
    assert found.peak.nbytes / GIB == pytest.approx(18.4, abs=0.2) and found.where == "backward, block 41 of 42"
    assert parts["frozen weights"] == pytest.approx(10.375, abs=0.01)
    assert parts["trainable weights"] == pytest.approx(0.492, abs=0.002)
    assert parts["optimizer state"] == pytest.approx(0.984, abs=0.002)
    assert parts["saved activations"] == pytest.approx(42 * 104.2 / 1024, abs=0.01)


RELEASED = {"gradient_release": "exact", "optimizer_states": "host"}
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stock": ({}, {}),
    "none": ({"checkpointing": "none"}, {}),
    "selective": ({"checkpointing": "selective"}, {}),
    "fp8": ({"base": "fp8", "modulation": "host", "activations": "host"}, {}),
    "lean": ({"block": "lean", "modulation": "host", "activations": "host"}, {}),
    "streamed, all": ({"streamed_blocks": "all", "activations": "host"}, {}),
    "released": (RELEASED, SFT),
}
APART: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({"checkpointing": "selective", "keep_attention": 3}, {}),
    "streamed": ({"streamed_blocks": 4}, {}),
    "streamed, one slot": ({"streamed_blocks": 1}, {}),
    "streamed and trained": ({"streamed_blocks": 4, **RELEASED}, SFT),
}
SLOW = {"none", "selective", "fp8", "lean", "streamed, all", "streamed, one slot", "streamed and trained"}


def slow_marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def both_ways(config: RunConfig) -> tuple[Phase, Phase]:
    """A training step from short models and block by block, which hold the same on the host."""
    quick, exact = train_peak(config), train_peak(config, exact=True)
    assert quick.curve == () and len(exact.curve) > 50
    assert quick.pinned == pytest.approx(exact.pinned, abs=65536)
    assert quick.pageable == pytest.approx(exact.pageable, abs=65536)
    return quick, exact


@pytest.mark.parametrize("name", slow_marked(ALIKE))
def test_two_short_models_give_the_figures_of_a_long_one(look_alike: Path, name: str) -> None:
    memory, method = ALIKE[name]
    quick, exact = both_ways(run(look_alike, memory=memory, **method))
    assert quick.peak.nbytes == pytest.approx(exact.peak.nbytes, abs=65536)
    assert exact.where.startswith(quick.where)


@pytest.mark.parametrize("name", slow_marked(APART))
def test_blocks_that_are_treated_apart_are_counted(look_alike: Path, name: str) -> None:
    memory, method = APART[name]
    quick, exact = both_ways(run(look_alike, memory=memory, **method))
    assert quick.peak.nbytes == pytest.approx(exact.peak.nbytes, rel=0.005)


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param({}, id="full"),
        pytest.param({"checkpointing": "selective"}, id="selective", marks=pytest.mark.slow),
    ],
)
def test_under_ddp_all_gradients_are_there_all_the_time(look_alike: Path, memory: dict[str, Any]) -> None:
    """Another moment is the highest then: the end of the forward pass, where a single process has no gradient yet."""
    config = run(look_alike, memory=memory, data=NATIVE_BUCKET, **SFT)
    with fake_world() as tracker:
        training = training_in(tracker, config, layers=None)
        for parameter in training.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        tracker.name("gradients", [p.grad for p in training.parameters.values() if p.grad is not None])
        true = step_of(training).peak.nbytes
    alone, each = (train_peak(config, processes=count).peak.nbytes for count in (1, 2))
    largest = 2 * max(math.prod(parameter.shape) for parameter in training.parameters.values())
    assert abs(each - true) <= largest < (true - alone) / 2
    assert train_peak(config, processes=2, exact=True).peak.nbytes == pytest.approx(each, rel=0.005)


def test_a_station_that_overtakes_is_found() -> None:
    """In the short models the first block is the highest; in the long one the last is."""

    def phase(layers: int) -> Phase:
        stations = {f"forward, block {number} of {layers}": Point(0.0, {"x": 100}) for number in range(layers)}
        stations[f"forward, block {layers - 1} of {layers}"] = Point(0.0, {"x": 10 * layers})
        return Phase("p", Point(0.0, {}), "", stations=stations)

    found = extend(*map(phase, SHORT), 30)
    assert (found.peak.nbytes, found.where) == (300, "forward, block 29 of 30")


def test_every_phase_is_estimated(look_alike: Path) -> None:
    validation = {"sample_every": 5, "samples": [{"prompt": "a"}]}
    config = run(look_alike, validation=validation, train={"steps": 3, "accumulation": 2, "ema_decay": 0.9})
    found = estimate(config)
    assert [phase.name for phase in found.phases] == list(PHASES.values())
    training = found.phase("train")
    assert training.peak.parts["moving average"] > 0 and training.note.endswith("accumulated")
    # The optimizer's states and the VAE are there while a video is sampled.
    assert {"optimizer state", "VAE weights"} <= found.phase("sample").peak.parts.keys()
    # A sampled video is decoded beside what training left, by a decoder that was estimated by itself.
    decode, sample = found.phase("decode").peak.parts, found.phase("sample").peak.parts
    resting = ("frozen weights", "trainable weights", "optimizer state", "moving average", "VAE weights")
    assert {part: decode[part] for part in resting} == {part: sample[part] for part in resting}
    assert decode["block transient"] > 0 and found.phase("decode").where.startswith("VAE decoder")

    def encoding(card_bytes: int | None) -> Phase:
        return estimate(config, phases=("encode",), card_bytes=card_bytes).phase("encode")

    # The rule by which precomputing decides, at the size where it turns.
    spacious = encoding(80 * GIB)
    turn = untiled_bytes(torch.bfloat16, config.data.buckets[0]) + spacious.peak.parts["VAE weights"]
    notes = [encoding(size).note for size in (None, turn - 1, turn)]
    assert notes == ["in tiles", "in tiles", "whole frames"] and spacious.note == "whole frames"


def test_an_estimate_is_kept_until_the_code_changes(
    look_alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[str] = []
    monkeypatch.setattr(estimates, "fake_world", lambda: made.append("") or fake_world())

    def makes(**changes: Any) -> bool:
        made.clear()
        estimate(run(look_alike, **changes), layers=1, phases=("train",))
        return bool(made)

    assert makes() and not makes()
    # What memory does not depend on makes no difference; what it does, does.
    assert not makes(optimizer={"kind": "adamw", "lr": 1e-5}, train={"steps": 99})
    assert makes(method={"rank": 16}) and makes(data={"sources": [{"path": "c"}], "buckets": ["9x64x64"]})
    monkeypatch.setattr(estimates, "_versions", lambda: {"torch": "other"})
    assert makes() and not makes()
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")  # cut short: made again, not believed
    assert makes()


# ---------------------------------------------------------------------------------------------- time, and the search


ENDLESS = {"memory": 1e30, "gemm_float32": 1e12, "launch": 1e-30}


def test_the_arithmetic_of_5b() -> None:
    config, spec = run(data=NATIVE_BUCKET, method={"rank": 128}), read_spec(str(known_model("5b")))
    # Only matrix products count: 169.1 TFLOP of linear layers, 4.7 of adapters, 163.1 of attention (counted by others).
    counted = {"gemm": 1e12, "attention_forward": 1e12, "attention_backward": 1e12, **ENDLESS}
    instant = DEFAULTS["H100"].model_copy(update=counted)

    def backward_s(**memory: Any) -> float:
        return step_cost(config, spec, MemoryConfig(**memory), instant).backward.seconds

    forward_s = step_cost(config, spec, MemoryConfig(), instant).forward.seconds
    assert forward_s == pytest.approx(169.1 + 163.1 + 4.7, rel=0.01)
    assert backward_s(checkpointing="none") == pytest.approx(169.1 + 2.5 * 163.1 + 9.4, rel=0.01)
    assert backward_s() - backward_s(checkpointing="none") == pytest.approx(forward_s, rel=0.01)
    assert backward_s() - backward_s(checkpointing="selective") == pytest.approx(163.1, rel=0.01)
    assert backward_s() - backward_s(checkpointing="selective", keep_attention=21) == pytest.approx(81.5, rel=0.01)
    assert backward_s(block="lean") < backward_s()  # what nobody reads is not computed again


@pytest.mark.parametrize(
    ("method", "tflop", "weights"),
    [
        ({"targets": "attention"}, 4.7, 42 * 4 * 2 * 3072 * 128),
        ({"targets": "attention+ff"}, 4.7 * 18 / 8, 42 * 18 * 3072 * 128),
        ({"targets": [r"transformer_blocks\.\d\.attn1\.to_q", "proj_out"]}, 4.7 / 4 * 10 / 42, 10 * 2 * 3072 * 128),
        ({"targets": r"transformer_blocks\.7\.norm1\.linear"}, 0, (512 + 6 * 3072) * 128),
        # As many products as the layers themselves make: four of a block's twelve squares of the width.
        ({"kind": "lokr", "rank": 16}, 169.1 * 4 / 12, 42 * 4 * (8 * 8 + 16 * (384 + 384))),
    ],
)
def test_adapters_cost_what_their_targets_make_of_them(method: dict[str, Any], tflop: float, weights: int) -> None:
    spec = read_spec(str(known_model("5b")))
    config = run(data=NATIVE_BUCKET, method={"rank": 128, **method})
    counted = DEFAULTS["H100"].model_copy(update={"gemm": 1e12, "attention_forward": 1e30, **ENDLESS})
    assert step_cost(config, spec, MemoryConfig(), counted).forward.seconds == pytest.approx(169.1 + tflop, rel=0.002)
    unit = BlockUnits.of(config, spec)
    assert unit.trained * spec.num_layers == pytest.approx(weights)


@pytest.mark.parametrize("wide", [{"compute": "float32"}, {"use_dora": True}, {}], ids=["as asked", "DoRA", "fp16"])
def test_a_lora_that_is_computed_in_float32_is_priced_so(wide: dict[str, Any]) -> None:
    spec, rates = read_spec(str(known_model("2b"))), DEFAULTS["H100"]
    narrow, other = (run(data=NATIVE_BUCKET, method=method) for method in ({}, wide))
    if not wide:
        other = other.model_copy(update={"model": other.model.model_copy(update={"dtype": "fp16"})})
    seconds = [step_cost(config, spec, MemoryConfig(), rates).backward.products_s for config in (narrow, other)]
    assert seconds[1] > 1.1 * seconds[0]


def test_a_pass_lasts_as_long_as_the_slowest_that_has_to_do_with_it() -> None:
    config, spec, rates = run(data=NATIVE_BUCKET), read_spec(str(known_model("5b"))), DEFAULTS["H100"]
    quick, slow = (rates.model_copy(update={"launch": launch}) for launch in (1e-9, 1e-3))
    step = step_cost(config, spec, MemoryConfig(block="lean"), quick)
    assert step.step_s == pytest.approx(sum(each.device_s for each in step.passes), rel=0.01)
    waiting = step_cost(config, spec, MemoryConfig(block="lean"), slow)
    assert waiting.forward.seconds == waiting.forward.launches_s > 2 * step.forward.seconds
    assert waiting.forward.device_s == step.forward.device_s
    # A slow card computes for longer than any processor needs to queue it.
    assert step_cost(config, spec, MemoryConfig(), DEFAULTS["3090"]).step_s > 4 * step.step_s


def test_copies_hide_behind_computation_until_they_do_not() -> None:
    config, spec, rates = run(data=NATIVE_BUCKET), read_spec(str(known_model("5b"))), DEFAULTS["H100"]
    plain, streamed = MemoryConfig(), MemoryConfig(streamed_blocks="all")
    slow = rates.model_copy(update={"host_to_device": 1e9})
    hidden, seen = (
        step_cost(config, spec, streamed, each).step_s - step_cost(config, spec, plain, each).step_s
        for each in (rates, slow)
    )
    assert 0 < hidden < 0.05 < 1 < seen
    assert step_cost(config, spec, MemoryConfig(streamed_blocks="all", ring=1), rates).backward.serial_s > 0.15


def test_weights_are_copied_once_for_all_clips_that_go_together() -> None:
    spec = read_spec(str(known_model("5b")))
    rates = DEFAULTS["4090"].model_copy(update={"launch": 1e-12})  # a clip is queued in the time of eight

    def seconds(batch_size: int, accumulation: int = 1, **memory: Any) -> float:
        train = {"steps": 1, "batch_size": batch_size, "accumulation": accumulation}
        config = run(data={"sources": [{"path": "c"}], "buckets": ["9x256x256"]}, train=train)
        return step_cost(config, spec, MemoryConfig(**memory), rates).step_s

    assert seconds(8) == pytest.approx(8 * seconds(1), rel=0.01) == pytest.approx(seconds(4, 2), rel=0.01)
    # One clip computes for less time than its weights need to arrive; eight hide them.
    alone = seconds(1, streamed_blocks="all")
    assert alone > 1.5 * seconds(1) and seconds(8, streamed_blocks="all") < 1.05 * seconds(8)
    assert seconds(8, streamed_blocks="all", clips_at_once=1) == pytest.approx(8 * alone, rel=0.01)
    assert seconds(8, base="fp8") - seconds(8) == pytest.approx(seconds(1, base="fp8") - seconds(1), rel=0.01)


def reckon(config: RunConfig) -> Phase:
    """A training step's memory by arithmetic: 5B's weights, activations and blocks in round figures."""
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
    return Phase("training", Point(0.0, {"x": round(device * GIB)}), "somewhere", pinned=round(host * GIB))


@pytest.fixture
def reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks by ``reckon`` in place of estimates; a video, where one is sampled, takes 40 GiB."""
    decoding = Phase("VAE decode", Point(0.0, {"x": 40 * GIB}), "VAE decoder")

    def predict(config: RunConfig, **_: Any) -> Estimate:
        return Estimate((reckon(config), *([decoding] if config.validation.samples else [])), "49x480x720", 17_776)

    monkeypatch.setattr(search_module, "predict", predict)


def machine(card_gib: float, ram_gib: float | None = None, device: str = "H100") -> Machine:
    """With so much for tensors."""
    ram_bytes = None if ram_gib is None else round(ram_gib * GIB)
    return Machine(DEFAULTS[device], round((card_gib + OVERHEAD_GIB) * GIB), ram_bytes)


def find(card_gib: float, *, quantize: bool = False, **changes: Any) -> SearchResult:
    return search(run(data=NATIVE_BUCKET, **changes), machine(card_gib), quantize=quantize)


CARDS, RAMS = (3.0, 6.0, 8.0, 10.0, 13.0, 15.0, 17.0, 24.0), (None, 4.0, 8.0, 12.0)


@pytest.mark.parametrize(("device", "rams"), [("H100", RAMS[::2]), ("4090", RAMS[1::2])])
def test_no_plan_is_much_faster_than_what_is_found(reckoned: None, device: str, rams: tuple[float | None, ...]) -> None:
    """Against every legal memory section, on cards and hosts of many sizes."""
    config = run(data=NATIVE_BUCKET, method={"rank": 128})
    traits = memory_traits(config, spec_of(config.model, shipped=True))
    every = [
        (one, reckon(config.model_copy(update={"memory": one.memory})))
        for one in candidates(config, traits, DEFAULTS[device], ["native", *QUANTISED])
    ]
    fits = none = 0
    for card, ram in itertools.product(CARDS, rams):
        target = machine(card, ram, device)
        found = search(config, target)
        fitting = [
            one
            for one, phase in every
            if phase.pinned <= (target.ram_bytes or math.inf)
            and phase.peak.nbytes <= target.room - (0.05 * target.card_bytes if one.cut else 0)
        ]
        native = [one for one in fitting if one.family.base == "native"]
        assert (found.best is None) == (not fitting), (card, ram)
        if found.best is None:
            none += 1
            continue
        fits += 1
        assert found.best.fits(target) and found.quantised_unasked == (not native), (card, ram)
        fastest = min(one.step_s for one in native or fitting)
        assert found.best.step_s <= 1.02 * fastest, (card, ram, found.best.memory)
    assert fits > 10 and none >= 1


def test_larger_cards_are_faster(reckoned: None) -> None:
    plans = [found for card in (130.0, 24.0, 17.0, 13.0, 6.0) if (found := find(card).best) is not None]
    steps = [each.step_s for each in plans]
    assert len(steps) == 5 and steps == sorted(steps) and steps[0] < steps[-1]
    # A stock block in which nothing is computed again moves more memory than a lean one saves by keeping attention.
    assert (plans[0].memory.checkpointing, plans[0].memory.block) == ("selective", "lean")


def test_a_quantised_base_that_is_faster_has_to_be_allowed(reckoned: None) -> None:
    asked, unasked = find(15.0, quantize=True).best, find(15.0).best
    assert asked is not None and unasked is not None and unasked.memory.base == "native"
    assert asked.step_s <= unasked.step_s


def test_what_is_cut_to_fit_leaves_a_twentieth_free(reckoned: None) -> None:
    """So far a prediction may be off."""
    found = [(card, best) for card in CARDS if (best := find(card).best) is not None]
    cut = [one for one in found if one[1].memory.keep_attention or one[1].memory.streamed_blocks not in (0, "all")]
    assert len(cut) >= 3
    assert all(best.peak_bytes <= (card - 0.05 * (card + OVERHEAD_GIB)) * GIB for card, best in cut)


VIDEOS = {"validation": {"sample_every": 5, "samples": [{"prompt": "a"}]}}
TOO_SMALL: dict[str, tuple[dict[str, Any], Machine, str, str]] = {
    "full": (SFT, machine(-0.2), "the smallest needs .* more, in training", ""),
    "dora": ({"method": {"use_dora": True}}, machine(-0.2), "the smallest needs .* more, in training", ""),
    "host": (
        {"method": {"use_dora": True}},
        machine(8 - OVERHEAD_GIB, 2),
        "GiB of host memory, .* more than the run may have",
        "GiB of host memory would do (--ram",
    ),
    "videos": (
        VIDEOS,
        machine(36 - OVERHEAD_GIB),
        r"needs 5\.20 GiB more, in VAE decode",
        "validation.samples: [] fits",
    ),
    "rank": ({"method": {"rank": 256}}, machine(3.7157), r"the smallest needs 1\.00 GiB more", "method.rank: 32 fits"),
}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_what_does_not_fit_is_told_by_how_much_and_what_would(reckoned: None, name: str) -> None:
    changes, target, what, fix = TOO_SMALL[name]
    with pytest.raises(ConfigError, match=what) as caught:
        fit_memory(run(data=NATIVE_BUCKET, **changes), target)
    assert fix in caught.value.fix


def test_rates_are_measured_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = calibrate(torch.device("cpu"), seconds=0.05, tokens=256, width=128)
    assert measured.source == "measured" and all(value > 0 for value in list(measured.model_dump().values())[2:])
    assert rates_of(measured.device).source == "of another card"
    path = save_rates(measured)
    assert rates_of(measured.device) == measured and path.is_relative_to(tmp_path)
    path.write_text("{}")
    assert rates_of("h200").memory == DEFAULTS["H200"].memory and rates_of("NVIDIA A100-SXM4-80GB").gemm == 265e12
    others = (measured.device, "NVIDIA RTX A1000 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 3g.40gb")
    assert {rates_of(name).source for name in others} == {"of another card"}
    assert cost_model.OTHER in DEFAULTS and rates_of("Tesla T4").device == "Tesla T4"
    assert rates_of("NVIDIA L40S").gemm > rates_of("NVIDIA L4").gemm


# ------------------------------------------------------------------------------------------------------- what is said


def some_estimate(**changes: Any) -> Estimate:
    curve = tuple(Point(at / 10, {"frozen weights": 10 * GIB, "block transient": at * GIB // 2}) for at in range(11))
    spans = {"forward": 0.0, "backward": 0.4}
    phase = Phase("training", curve[-1], "backward, block 1 of 2", curve=curve, spans=spans, **changes)
    return Estimate((phase,), "9x64x64", 100)


def rows_of(words: str) -> dict[str, str]:
    return {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in words.splitlines() if line}


def test_a_verdict_counts_the_overhead() -> None:
    found = some_estimate()
    fits = [Verdict(found, size).fits for size in (round(16.2 * GIB) + 1, round(16.1 * GIB), None)]
    assert fits == [True, False, None]
    words = text(run(), Verdict(found, 16 * GIB))
    assert "a card of 16.0 GiB is 0.20 GiB too small" in words and "predicted, not measured" in words
    assert document(Verdict(found, 24 * GIB))["peak_bytes"] == 15 * GIB
    rows = rows_of(words)
    assert (rows["frozen weights"], rows["block transient"], rows["together"]) == ("10.00", "5.00", "15.00")
    # What two phases need of the host one after the other is not needed at once.
    pinned, pageable = some_estimate(pinned=40 * GIB), some_estimate(pageable=30 * GIB)
    assert Verdict(pinned, 24 * GIB, 32 * GIB).fits is False
    assert dataclasses.replace(pinned, phases=pinned.phases + pageable.phases).host_bytes == 40 * GIB


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
    beside = overhead(device, workspace=setting)
    assert beside["cuBLAS workspaces"] == 2 * mib * 2**20
    assert sum(beside.values()) == round(OVERHEAD_GIB * GIB) == GIB - usable(GIB)
    assert sum(overhead(device, processes=2).values()) == GIB - usable(GIB, processes=2)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1024:1")
    assert workspace_bytes(device) == 2**20


def test_what_is_beside_the_tensors_is_said_and_counted() -> None:
    found, beside = some_estimate(), overhead("NVIDIA H100 80GB HBM3", processes=2)
    judged = Verdict(found, 24 * GIB, overhead=beside)
    assert judged.spare_bytes == 24 * GIB - sum(beside.values()) - 15 * GIB
    rows = rows_of(text(run(), judged, processes=2))
    names = ("CUDA context, fragmentation", "cuBLAS workspaces", "NCCL buffers", "together")
    assert [rows[name] for name in names] == ["1.14", "0.06", "0.57", "15.00"]  # the tensors' own sum is what it was
    written = document(judged)
    assert written["overhead_bytes"] == sum(written["beside_bytes"].values()) == sum(beside.values())
    # Several processes have less room than one: the largest plan that fits alone fits no more.
    largest = MemoryPlan(MemoryConfig(), 1.0, (("train", usable(24 * GIB)),), 0)
    one = Machine(DEFAULTS["H100"], 24 * GIB)
    assert largest.fits(one) and not largest.fits(dataclasses.replace(one, processes=2))


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
    gpu(80, 79.4)  # our own context
    assert card_here() == 80 * GIB and held_note() == ""
    gpu(80, 59.25, reserved=20)  # and our own tensors
    assert card_here() == 80 * GIB and held_note() == ""
    gpu(80, 49.25, reserved=20)
    assert card_here() == 70 * GIB
    assert held_note() == "other programs hold 10.00 GiB of this GPU's 80.00 GiB (nvidia-smi)"
    gpu(24, 10)
    assert usable(card_here()) < 10 * GIB


def test_a_plan_is_made_for_what_is_free(gpu, monkeypatch) -> None:
    planned_for: list[float] = []

    def fit(config: RunConfig, machine: Machine, **_: object) -> tuple[RunConfig, SearchResult]:
        planned_for.append(machine.card_bytes / GIB)
        best = MemoryPlan(MemoryConfig(), 1.0, (("train", GIB),), 0)
        return config.model_copy(update={"memory": MemoryConfig()}), SearchResult(best, (), best)

    monkeypatch.setattr(plan, "predict", lambda *_, **__: some_estimate())
    monkeypatch.setattr(plan, "fit_memory", fit)
    config = run(memory={"kind": "auto"})
    gpu(24, 24)
    free = plan.plan(config, plan.PlanOptions()).text
    assert "other programs" not in free and "a card of 24.0 GiB has" in free
    gpu(24, 14)
    held = plan.plan(config, plan.PlanOptions()).text
    assert held.startswith("other programs hold 9.25 GiB of this GPU's 24.00 GiB (nvidia-smi): planned for the rest")
    assert "a card of 14.8 GiB is 1.45 GiB too small" in held
    assert choose_memory(config)[1][0].startswith("other programs hold 9.25 GiB")
    asked = plan.plan(config, plan.PlanOptions(budget="24GiB")).text  # for a card that may be elsewhere
    assert "other programs" not in asked and "a card of 24.0 GiB has" in asked
    assert planned_for == [24, 14.75, 14.75, 24]


def test_a_measured_peak_is_compared_with_the_workspaces_in_it() -> None:
    compared = Prediction(10 * GIB, "", workspaces=GIB // 2).compared(11.025)
    assert compared == "peak memory: predicted 10.50 GiB, measured 11.03 GiB (+5.0 %)"
    assert Prediction(None, "could not be made").compared(10.5) == ""


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
