"""The same configuration gives the same weights, bit for bit, on the same machine; and ``train.deterministic``."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from goldens import FOLDER, faults, golden_config, golden_model, golden_run, read_golden
from worlds import fabricate_cache, run_config

from finetune.core.checksums import ChecksummedFolder, checksum_file
from finetune.core.errors import ConfigError, TrainingError
from finetune.core.rng import WORKSPACE, deterministic_kernels, repeatability
from finetune.core.tensor_files import weights_digest
from finetune.trainers.loop import train

RUNS = """
import json, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from goldens import golden_config, golden_model, golden_run
scratch, found = Path({scratch!r}), []
model = golden_model("5b", scratch / "model")
for number, (threads, method) in enumerate({runs!r}):
    torch.set_num_threads(threads)
    config = golden_config(model, scratch / str(number), method)
    record = golden_run(config)
    state = json.loads(next(config.output_dir.glob("checkpoints/*/state.json")).read_text())
    found.append([state["state"]["weights"], record])
(scratch / "found.json").write_text(json.dumps(found))
"""


def small(tiny_model, root: Path, **changes):
    train_section = {"steps": 3, "batch_size": 2, **changes.pop("train", {})}
    config = run_config(
        tiny_model(), root / "none", root / "run", cache={"mode": "require"}, train=train_section, **changes
    )
    fabricate_cache(config, clips=3)
    return config


# ------------------------------------------------------------------------------------------------------- run to run


def test_a_run_repeats_itself_and_in_a_fresh_process(tmp_path, launcher):
    """Same thread count, same bits, also of two threads; whatever their number, the golden numbers."""
    runs = [(1, "lora"), (2, "full"), (2, "full")]
    script = RUNS.format(
        root=str(FOLDER.parent.parent), tests=str(FOLDER.parent), scratch=str(tmp_path / "fresh"), runs=runs
    )
    (tmp_path / "runs.py").write_text(script)
    (end,) = launcher.run("launcher_cases:script", str(tmp_path / "runs.py"), ranks=1)
    assert end.code == 0, end.log[-3000:]
    there = json.loads((tmp_path / "fresh" / "found.json").read_text())

    config = golden_config(golden_model("5b", tmp_path / "model"), tmp_path / "here", "lora")
    record = golden_run(config)
    (checkpoint,) = config.output_dir.glob("checkpoints/*")
    assert there[0] == [ChecksummedFolder.open(checkpoint).checksums["trainable.safetensors"], record], "other bits"
    assert there[1] == there[2], "two threads do not repeat themselves"
    golden = read_golden("5b")
    for (_, method), (_, record) in zip(runs, there, strict=True):
        assert faults(golden["runs"][method], record, golden["tolerance"]) == []


def test_the_digest_tells_runs_apart(tiny_model, tmp_path):
    """It is the same for the same run, with deterministic kernels too, and another for the least change."""
    reports = {
        name: train(small(tiny_model, tmp_path / name, **changes))
        for name, changes in {
            "a": {},
            "b": {},
            "deterministic": {"train": {"deterministic": True}},
            "seed": {"train": {"seed": 8}},
            "rate": {"optimizer": {"lr": 1.0000001e-3}},
        }.items()
    }
    assert reports["a"].weights == reports["b"].weights == reports["deterministic"].weights
    assert len({reports[name].weights for name in ("a", "seed", "rate")}) == 3


def test_the_digest_is_in_the_report_and_the_checkpoint_and_not_in_the_log(tiny_model, tmp_path, capfd):
    report = train(small(tiny_model, tmp_path))
    said = capfd.readouterr().out
    assert len(report.weights) == 32 and report.weights not in said + str(report)
    assert f"step 3: saved {report.checkpoint}\n" in said
    state = json.loads((report.checkpoint / "state.json").read_text())["state"]
    assert state["weights"] == report.weights == checksum_file(report.checkpoint / "trainable.safetensors")
    assert train(small(tiny_model, tmp_path)).weights == report.weights  # nothing left to do, and still known


def test_the_digest_sees_every_bit_and_every_name():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    digest = weights_digest(tensors)
    assert digest == weights_digest(dict(reversed(tensors.items())))  # whatever the order
    assert digest == weights_digest({**tensors, "b": tensors["b"].t().contiguous().t()})  # and the layout in memory
    flipped = tensors["b"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        {**tensors, "b": flipped},
        {**tensors, "b": tensors["b"].reshape(3, 2)},
        {**tensors, "b": tensors["b"].to(torch.float64)},
        {"b": tensors["b"], "c": tensors["a"]},
        {"b": tensors["b"]},
    ]
    assert len({digest, *map(weights_digest, others)}) == 6


def test_the_digest_does_not_depend_on_who_holds_the_weights():
    """Of tensors that are spread over processes, as FSDP2 holds them, it is that of the whole ones."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = {"w": torch.randn(4, 3), "scale": torch.randn(5)}
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
        assert weights_digest(spread) == weights_digest(whole)
        assert weights_digest({**spread, "w": spread["w"] * 2}) != weights_digest(whole)
    finally:
        destroy_process_group()


# ------------------------------------------------------------------------------------------------ train.deterministic


def settings() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


@pytest.fixture
def other_settings(monkeypatch):
    """Settings of a user who computes other things in the same process."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return settings()


@pytest.mark.parametrize("ending", ["well", "with an error"])
def test_deterministic_kernels_are_asked_for_and_given_back(other_settings, ending):
    expected = nullcontext() if ending == "well" else pytest.raises(ZeroDivisionError)
    with expected, deterministic_kernels(True):
        assert settings() == (True, False, False, ":4096:8")
        if ending != "well":
            raise ZeroDivisionError
    assert settings() == (*other_settings[:3], ":4096:8")  # torch has read it, and does not read it again


def test_a_process_that_has_used_a_gpu_is_told_that_it_is_too_late(other_settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="has used a GPU already"), deterministic_kernels(True):
        pytest.fail("entered all the same")
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_kernels(True):
        assert settings()[0]


def test_sums_are_float32_in_a_run_and_afterwards_as_they_were(tiny_model, tmp_path, monkeypatch):
    """Torch's switches, which only a GPU reads."""
    from finetune.cogvideox import objective

    matmul, real = torch.backends.cuda.matmul, objective.v_mse
    switches = [(matmul, f"allow_{dtype}_reduced_precision_reduction") for dtype in ("bf16", "fp16")]
    switches.append((torch.backends.cudnn, "allow_tf32"))
    seen = []

    def watched(prediction, target):
        seen.append([getattr(*switch) for switch in switches])
        return real(prediction, target)

    monkeypatch.setattr(objective, "v_mse", watched)
    train(small(tiny_model, tmp_path))
    assert seen and all(not any(each) for each in seen)
    assert all(getattr(*switch) for switch in switches)


def test_not_asked_for_nothing_changes(other_settings):
    with deterministic_kernels(False):
        assert settings() == other_settings


def test_a_workspace_that_repeats_itself_is_kept_and_another_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_kernels(True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":1024:2")
    with pytest.raises(ConfigError, match=":1024:2") as caught, deterministic_kernels(True):
        pytest.fail("entered all the same")
    assert WORKSPACE in str(caught.value) and ":4096:8" in caught.value.fix


def test_an_operation_without_a_deterministic_kernel_stops_the_run(tiny_model, tmp_path, monkeypatch):
    from finetune.cogvideox import objective

    real = objective.v_mse

    def unsettled(prediction, target):
        # One of the few operations that refuse on a CPU too: which of two equal indices wins is not settled.
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        return real(prediction, target)

    monkeypatch.setattr(objective, "v_mse", unsettled)
    train(small(tiny_model, tmp_path / "a"))
    with pytest.raises(TrainingError, match="no deterministic kernel here: put_") as caught:
        train(small(tiny_model, tmp_path / "b", train={"deterministic": True}))
    assert "train.deterministic" in caught.value.where
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_through_as_they_are():
    with pytest.raises(RuntimeError, match="something else"), deterministic_kernels(True):
        raise RuntimeError("something else")


def test_the_run_sheet_says_what_repeats_and_what_is_kept(tiny_model, tmp_path, capfd):
    train(small(tiny_model, tmp_path, train={"deterministic": True}))
    said = capfd.readouterr().out
    assert "repeatable: bit for bit on this machine with 1 thread per process" in said
    assert re.search(r"bucket: \d+x\d+x\d+: 25% of the picture and 75% of the seconds are kept", said)
    assert "warning: three quarters are lost" in said and "a note" not in said
    cuda = torch.device("cuda")
    assert "not the same bits" in repeatability(False, cuda) and "train.deterministic" in repeatability(False, cuda)
    assert repeatability(True, cuda).startswith("bit for bit on this model of GPU")


def test_a_run_may_take_it_up_on_its_way(tiny_model, tmp_path, capfd):
    train(small(tiny_model, tmp_path))
    longer = train(small(tiny_model, tmp_path, train={"steps": 5, "deterministic": True}))
    assert longer.step == 5
    assert "continuing with train.deterministic: false -> true" in capfd.readouterr().out
