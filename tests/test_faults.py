"""What can go wrong in the middle of a run: memory runs out, an entry turns out damaged, a measurement fails.

Every test ends with the state that the run is left in: nothing that was trained is lost, nothing wrong is trained on.
"""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worlds import (
    FULL_GPU,
    SMOOTH_ADAM,
    assert_same_run,
    differing,
    fails_where,
    history,
    saved_steps,
    tensors,
)

from finetune.caching.precompute import precompute
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core import errors
from finetune.core.errors import CacheError, FinetuneError, TrainingError, is_out_of_memory
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker, Loader
from finetune.datasets.schedule import Item, StepPlan
from finetune.memory.config import MemoryConfig
from finetune.trainers import validation
from finetune.trainers.loop import TrainReport, train
from finetune.trainers.oom_retry import out_of_memory

LEARNS = {"optimizer": {"lr": 1e-2}, "method": {"dropout": 0.2}}
"""Fast enough for a difference of one bit in a mask to show in the weights."""


# -------------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.arithmetic
def test_a_step_is_done_again_with_checkpointing_bit_for_bit(tiny_run, calm_run, monkeypatch, capsys):
    """Memory runs out in the second micro-batch of the third step; LoRA's dropout draws the same masks again."""
    shared = LEARNS | {"memory": {"checkpointing": "none"}, "train": {"accumulation": 2, "batch_size": 2}}
    calm = calm_run(**shared)
    with monkeypatch.context() as patch:
        fails_where(patch, lambda batch, call: call == 6)
        hit = train(tiny_run("hit", **shared))
    assert_same_run(hit, calm)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of GPU memory" in line]
    assert len(said) == 1 and said[0].startswith("step 2:") and FULL_GPU in said[0]
    assert said[0].endswith("To begin there: memory.checkpointing: full")


MEMORY = [
    torch.OutOfMemoryError(FULL_GPU),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("Error out of memory at line 88 in file /src/csrc/ops.cu"),
    RuntimeError("cudaHostAlloc failed: cudaErrorMemoryAllocation"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled cuda error, NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    torch.distributed.DistBackendError("NCCL error in: NCCLUtils.hpp:275\nFailed to CUDA calloc 6291456 bytes"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
        " allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:78] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("unable to mmap 17179869184 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHER = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: misaligned address"),
    torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    RuntimeError("The size of tensor a (4) must match the size of tensor b (3)"),
    FileNotFoundError(errno.ENOENT, "No such file", "out of memory.mp4"),
    KeyError("out of memory"),
    KeyboardInterrupt(),
]


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_memory_that_ran_out_is_known_whoever_says_so(error):
    assert is_out_of_memory(error) and is_out_of_memory(caused(ValueError("the layer failed"), error))
    told = TrainingError("the replay does not fit")  # says already what to do, and is not to be said again
    assert not is_out_of_memory(caused(told, error)) and not is_out_of_memory(caused(RuntimeError("x"), told))


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error) and not is_out_of_memory(caused(RuntimeError("the layer failed"), error))


def test_torchs_own_words_for_the_host_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_only_one_function_knows_how_memory_runs_out():
    """Everything that catches it asks ``is_out_of_memory``; torch's class by itself is one case of many."""
    sources = {path: path.read_text() for path in Path(errors.__file__).parents[1].rglob("*.py")}
    assert not [path for path, text in sources.items() if "except torch.OutOfMemoryError" in text]
    assert sum("is_out_of_memory(error)" in text for text in sources.values()) >= 10


@pytest.mark.parametrize("error", [MEMORY[1], MEMORY[2], MEMORY[8]], ids=repr)
def test_a_step_is_done_again_whoever_says_so(tiny_run, monkeypatch, capsys, error):
    fails_where(monkeypatch, lambda batch, call: call == 1, error)
    hit = train(tiny_run("hit", memory={"checkpointing": "none"}, train={"steps": 1}))
    assert hit.step == 1 and str(error).splitlines()[0] in capsys.readouterr().out


def test_an_illegal_access_is_not_done_again(tiny_run, monkeypatch):
    sizes = fails_where(monkeypatch, lambda batch, call: True, OTHER[0])
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        train(tiny_run("hit", memory={"checkpointing": "none"}, train={"steps": 1}))
    assert len(sizes) == 1


def test_gradients_left_by_the_failed_attempt_would_show(tiny_run, calm_run, monkeypatch):
    """Canary of the test above."""
    from finetune.parallel.strategy import DataParallel as Replicated

    shared = LEARNS | {"memory": {"checkpointing": "none"}, "train": {"accumulation": 2, "batch_size": 2}}
    calm = calm_run(**shared)
    fails_where(monkeypatch, lambda batch, call: call == 6)
    monkeypatch.setattr(Replicated, "drop_gradients", lambda self: None)
    monkeypatch.setattr(Replicated, "step", lambda self: (self.optimizer.step(), self.optimizer.zero_grad()))
    hit = train(tiny_run("hit", **shared))
    assert differing(tensors(hit), tensors(calm))


@pytest.mark.arithmetic
def test_micro_batches_are_split_until_they_fit(tiny_run, calm_run, tmp_path, monkeypatch):
    """Four clips never fit, two do: the weights after four steps are those of an undisturbed run to 1e-6."""
    shared = {"optimizer": SMOOTH_ADAM, "train": {"batch_size": 4}, "tracking": {"kind": "tensorboard"}}
    # What comes before splitting is done already.
    lowest = {"block": "lean", "modulation": "host", "activations": "host", "streamed_blocks": "all"}
    shared |= {"memory": lowest}
    calm = calm_run(**shared)
    with monkeypatch.context() as patch:
        sizes = fails_where(patch, lambda batch, call: len(batch.slots) > 2)
        hit = train(tiny_run("hit", **shared))
    assert sizes == [4] + [2, 2] * 4  # the state is kept: only the first step meets the wall
    for name, ours in tensors(hit).items():
        torch.testing.assert_close(ours, tensors(calm)[name], rtol=1e-5, atol=1e-6)
    ours, theirs = metrics(tmp_path / "hit"), metrics(calm.run_dir)
    assert ours.pop("perf/oom_notches") == [1.0] and "perf/oom_notches" not in theirs
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
    assert ours["train/samples_seen"] == theirs["train/samples_seen"] == [4.0, 8.0, 12.0, 16.0]
    configured = train(tiny_run("configured", **shared | {"memory": lowest | {"clips_at_once": 2}}))
    assert_same_run(configured, hit)  # what the note says to write begins at that very notch


def metrics(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_recompute_is_checked_anew_after_a_notch(tiny_run, monkeypatch):
    """The notch says checkpointing and the flag stays off: the guard of the first step has long passed, and yet."""
    fails_where(monkeypatch, lambda batch, call: call == 3)
    monkeypatch.setattr(MemoryConfig, "apply", lambda self, model, _: model.disable_gradient_checkpointing())
    config = tiny_run("run", memory={"checkpointing": "none"})
    with pytest.raises(TrainingError, match="gradient checkpointing does not do what was asked"):
        train(config)


def test_with_no_notch_left_the_error_says_what_to_change(tiny_run, tmp_path, monkeypatch):
    values = {"train": {"batch_size": 2}, "checkpoint": {"every": 1}}
    fails_where(monkeypatch, lambda batch, call: call > 1)
    with pytest.raises(TrainingError, match=r"in the passes of step 1: .*Tried to allocate") as caught:
        train(tiny_run("run", **values))
    assert "9x64x64" in caught.value.where and "a smaller bucket" in caught.value.fix
    assert saved_steps(tmp_path / "run") == [1]


def test_an_update_that_runs_out_of_memory_is_not_repeated(tiny_run, tmp_path, monkeypatch):
    """The optimizer allocates its states in the first step, and may have updated half of the weights by then."""
    calls = []

    def full(self, closure=None):
        calls.append(1)
        raise torch.OutOfMemoryError(FULL_GPU)

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    config = tiny_run("run", memory={"checkpointing": "none"})
    with pytest.raises(TrainingError, match="outside of a step's passes") as caught:
        train(config)
    assert len(calls) == 1 and not saved_steps(tmp_path / "run")
    assert "in this order: memory.checkpointing: full, memory.block: lean, " in caught.value.fix
    assert "optimizer.kind: adamw8bit" in caught.value.fix


def test_the_advice_is_for_the_run_that_needs_it(tiny_run):
    def fix(processes=1, **values):
        config = tiny_run("run", **values)
        traits = memory_traits(config, read_spec(config.model.pretrained), processes=processes)
        run = SimpleNamespace(config=config, traits=traits)
        return out_of_memory(run, config.memory, "full", "now").fix

    lora, full = fix(), fix(method={"kind": "full"}, optimizer={"kind": "adamw8bit"})
    assert "memory.base: fp8" in lora and "method.rank" in lora and "gradient_release" not in lora
    assert "memory.gradient_release: exact, memory.optimizer_states: host, memory.streamed_blocks: all" in full
    assert "base" not in full and "rank" not in full and "adamw8bit" not in full
    assert "parallel.context" not in lora and "parallel.context: 2 and train.accumulation: 2" in fix(processes=4)
    assert "parallel.context" not in fix(processes=4, parallel={"context": 4})
    # What cannot be had together with what the run has is not advised.
    accumulating = fix(method={"kind": "full"}, train={"accumulation": 2, "batch_size": 2})
    assert "gradient_release" not in accumulating and "train.batch_size: 1" in accumulating


# ------------------------------------------------------------------------------------------------- faults of the loader


def clip_of_step(config: RunConfig, step: int) -> Path:
    """The cache file of a clip that a run reads for the first time in ``step``."""
    items = [item for item in precompute(config, progress=False).manifest.items if not item.holdout]
    plan = StepPlan(
        tuple(Item(item.bucket, item.repeats) for item in items),
        config.train.seed,
        config.train.batch_size,
        config.train.accumulation,
    )
    read = [{index for micro in plan.step(s) for index in micro.items} for s in range(step + 1)]
    fresh = read[step] - set().union(*read[:step])
    return Cache(config.cache.dir).path("latents", items[min(fresh)].latents_key)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x10
    path.write_bytes(content)


def test_an_entry_damaged_on_the_disk_costs_no_step(tiny_run, calm_run, tmp_path):
    """Found while step 2 is on its way: step 2 is finished and saved; the same command encodes the entry again."""
    calm = calm_run(**LEARNS)
    config = tiny_run("hit", **LEARNS)
    entry = clip_of_step(config, 3)
    whole = entry.read_bytes()
    damage(entry)
    with pytest.raises(CacheError, match="damaged"):
        train(config)
    assert saved_steps(tmp_path / "hit") == [3]
    hit = train(config)
    assert entry.read_bytes() == whole
    assert_same_run(hit, calm)


def test_without_the_look_ahead_the_step_would_be_lost(tiny_run, tmp_path, monkeypatch):
    """Canary of the test above: who looks only when the batch is due has nothing saved."""
    config = tiny_run("run")
    damage(clip_of_step(config, 3))
    monkeypatch.setattr(Loader, "fault", lambda self, step: None)
    with pytest.raises(CacheError):
        train(config)
    assert not saved_steps(tmp_path / "run")


def test_an_entry_of_the_very_first_step_stops_before_training(tiny_run, tmp_path):
    config = tiny_run("run")
    damage(clip_of_step(config, 0))
    with pytest.raises(CacheError):
        train(config)
    assert not saved_steps(tmp_path / "run")
    assert train(config).step == 4


def test_a_host_without_memory_is_named(tiny_run, tmp_path, monkeypatch):
    inner = BatchMaker.training

    def full(self, step, micro):
        if step == 2:
            raise MemoryError
        return inner(self, step, micro)

    monkeypatch.setattr(BatchMaker, "training", full)
    with pytest.raises(TrainingError, match="out of host memory while the batches of step 2"):
        train(tiny_run("run"))
    assert saved_steps(tmp_path / "run") == [2]


# ----------------------------------------------------------------------------------------------- measuring and sampling

WATCHED = {
    "data": {"holdout": 1},
    "train": {"steps": 4},
    "validation": {
        "every": 2,
        "at_start": False,
        "timesteps": 2,
        "samples": [{"prompt": "a red circle"}, {"prompt": "a blue square"}],
        "sample_every": 2,
        "num_inference_steps": 1,
    },
}


@pytest.fixture
def watched(calm_run) -> TrainReport:
    """A run that measured and sampled, and that nothing happened to."""
    return calm_run(**WATCHED)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL_GPU), CacheError("damaged"), ValueError()], ids=repr)
def test_a_video_is_not_worth_a_run(tiny_run, watched, tmp_path, monkeypatch, error, caplog):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(validation, "sample_videos", fails)
    hit = train(tiny_run("hit", **WATCHED))
    assert hit.step == 4 and not differing(tensors(hit), tensors(watched))
    assert "could not sample; training goes on" in caplog.text
    assert not list((tmp_path / "hit").rglob("*.mp4")) and len(list(watched.run_dir.rglob("*.mp4"))) == 4


def test_a_disk_without_room_for_videos_is_not_worth_a_run_either(tiny_run, watched, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation, "sample_videos", lambda *_, **__: [torch.zeros(9, 64, 64, 3, dtype=torch.uint8)])
    monkeypatch.setattr(validation, "write_mp4", full)
    hit = train(tiny_run("hit", **WATCHED))
    assert_same_run(hit, watched)
    assert "sampled videos could not be written; training goes on: [Errno 28]" in caplog.text


@pytest.mark.parametrize("error", [CacheError("damaged"), torch.OutOfMemoryError(FULL_GPU)], ids=["damaged", "memory"])
def test_a_measurement_that_fails_saves_first(tiny_run, watched, tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    config = tiny_run("run", **WATCHED | {"validation": {**WATCHED["validation"], "sample_every": None}})
    with monkeypatch.context() as patch:
        patch.setattr(BatchMaker, "fixed", fails)
        with pytest.raises(FinetuneError):
            train(config)
    assert saved_steps(tmp_path / "run") == [2]
    hit = train(config)
    assert_same_run(hit, watched)
    assert history(tmp_path / "run") == history(watched.run_dir)  # the measurement is made up for
