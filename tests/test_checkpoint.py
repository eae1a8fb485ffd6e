"""Checkpoints: whole or absent, verified, pruned in the right order, and honest about a changed configuration."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from finetune.checkpoint import compare, folders, save
from finetune.checkpoint.compare import compare_configs, require_same_run
from finetune.checkpoint.folders import CheckpointConfig, checkpoint_path, clear_interrupted, list_checkpoints, prune
from finetune.checkpoint.load import LoadedCheckpoint, choose_checkpoint, load_checkpoint
from finetune.checkpoint.save import CheckpointContent, save_checkpoint
from finetune.core.checksums import folder_checksums
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError
from finetune.core.files import COMPLETE, TRAINABLE
from finetune.core.types import RunState

CONFIG: dict[str, Any] = {
    "model": {"pretrained": "base", "dtype": "bf16"},
    "data": {"sources": [{"path": "a"}], "caption_dropout": 0.1},
    "method": {"kind": "lora", "rank": 4, "dropout": 0.0, "init_from": None},
    "optimizer": {"kind": "adamw8bit", "lr": 1e-4, "betas": [0.9, 0.95]},
    "lr_schedule": {"kind": "constant"},
    "train": {"steps": 100, "batch_size": 1, "accumulation": 2, "seed": 42},
    "memory": {"checkpointing": "full"},
    "output_dir": "run",
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(8, 4, generator=generator),
        "b.weight": torch.randn(3, generator=generator).bfloat16(),
        "empty": torch.zeros(0),
    }


def saved(
    run_dir: Path,
    step: int,
    *,
    best: int | None = None,
    ema: bool = False,
    ranks: ProcessGroup | None = None,
    **policy: Any,
) -> Path:
    state = RunState(step, "cache", samples_seen=2 * step, best_heldout_loss=0.25 if best else None, best_step=best)
    return save_checkpoint(
        run_dir,
        CheckpointContent(
            state,
            trainable=tensors(step),
            optimizer=(
                {"state.a.weight.state1": torch.arange(256, dtype=torch.uint8)},
                {"scalars": {"a": {"step": step}}},
            ),
            ema={name: tensor.float() for name, tensor in tensors(step + 1).items()} if ema else None,
            config=CONFIG,
        ),
        CheckpointConfig(**policy),
        ranks,
    )


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("ema", [False, True])
def test_everything_comes_back_bit_for_bit(tmp_path, ema):
    path = saved(tmp_path, 500, best=400, ema=ema)
    assert path == tmp_path / "checkpoints" / "step-00000500" == checkpoint_path(tmp_path, 500)
    loaded = load_checkpoint(path)
    assert loaded.state == RunState(500, "cache", 1000, 0.25, 400)
    assert loaded.config == CONFIG and loaded.path == path and loaded.processes == 1
    average = {name: tensor.float() for name, tensor in tensors(501).items()}
    expected = [(loaded.trainable, tensors(500))] + ([(loaded.ema, average)] if ema else [])
    for ours, theirs in expected:
        assert ours is not None and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in theirs)
    assert (loaded.ema is None) is not ema
    assert loaded.optimizer[1] == {"scalars": {"a": {"step": 500}}}
    assert torch.equal(loaded.optimizer[0]["state.a.weight.state1"], torch.arange(256, dtype=torch.uint8))
    assert load_checkpoint(path, optimizer=False).optimizer == ({}, {})


FILES = [TRAINABLE, folders.OPTIMIZER, folders.OPTIMIZER_META, folders.EMA, folders.CONFIG, folders.STATE]


def test_the_files_are_those_that_the_module_names(tmp_path):
    path = saved(tmp_path, 1, ema=True)
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "COMPLETE"])


@pytest.mark.parametrize("position", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_found(tmp_path, name, position):
    path = saved(tmp_path, 1, ema=True)
    content = bytearray((path / name).read_bytes())
    content[int(position * len(content))] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load_checkpoint(path)
    assert name in str(caught.value) and caught.value.where == str(path)


@pytest.mark.parametrize("harm", ["delete", "truncate", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_short_file_is_found(tmp_path, name, harm):
    path = saved(tmp_path, 1, ema=True)
    content = (path / name).read_bytes()
    if harm == "delete":
        (path / name).unlink()
    else:
        (path / name).write_bytes(content[: len(content) // 2] if harm == "truncate" else b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def reseal(path: Path) -> None:
    """As if what stands in a checkpoint now had been written: what a forger does, or another version."""
    (path / COMPLETE).unlink()
    (path / COMPLETE).write_text(folder_checksums(path))


def change_state(path: Path, **changes: Any) -> None:
    content = json.loads((path / folders.STATE).read_text())
    (path / folders.STATE).write_text(json.dumps({**content, **changes}))
    reseal(path)


def test_a_later_format_is_told_from_damage(tmp_path):
    path = saved(tmp_path, 1)
    change_state(path, format=folders.FORMAT + 1)
    with pytest.raises(CheckpointError, match="format 3, this version reads 2"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="format 3"):
        choose_checkpoint(tmp_path, "latest")
    assert steps(tmp_path) == [1], "nothing is set aside that another version can read"


STATES: list[Any] = [
    {"moon_phase": 3, "step": 1, "cache_digest": ""},
    {"step": "1", "cache_digest": ""},
    {"step": 1.5, "cache_digest": ""},
    {"step": 1, "cache_digest": None},
    {"step": 1, "cache_digest": "", "best_step": [1]},
    {"cache_digest": ""},
    {},
    [],
    None,
    "state",
]


@pytest.mark.parametrize(
    "changes",
    [*({"state": state} for state in STATES), *({"processes": value} for value in (0, "2", None, 1.5, True, []))],
    ids=str,
)
def test_the_state_of_another_version_is_told_from_damage(tmp_path, changes):
    path = saved(tmp_path, 1)
    change_state(path, **changes)
    with pytest.raises(CheckpointError, match=r"another version of this package: state\.json"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", [folders.STATE, folders.CONFIG, folders.OPTIMIZER_META])
def test_a_file_of_another_type_is_no_traceback(tmp_path, name):
    path = saved(tmp_path, 1)
    (path / name).write_text("[1, 2]")
    reseal(path)
    with pytest.raises(CheckpointError, match=f"{name} holds a list"):
        load_checkpoint(path)


def test_an_average_of_other_tensors_is_refused(tmp_path):
    path = saved(tmp_path, 1, ema=True)
    shutil.copy(path / folders.OPTIMIZER, path / folders.EMA)
    reseal(path)
    with pytest.raises(CheckpointError, match="ema"):
        load_checkpoint(path)


def test_what_json_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        save_checkpoint(
            tmp_path,
            CheckpointContent(
                RunState(1, ""),
                trainable=tensors(),
                optimizer=({}, {"scalars": {"a": {"step": float("nan")}}}),
                ema=None,
                config={},
            ),
            CheckpointConfig(),
        )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- pruning


def test_the_last_k_and_the_best_stay(tmp_path):
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 20)):
        saved(tmp_path, step, best=best, keep_last=2)
    assert steps(tmp_path) == [20, 40, 50]
    saved(tmp_path, 60, best=60, keep_last=2)
    assert steps(tmp_path) == [50, 60]


def test_without_keep_best_only_the_last_stay(tmp_path):
    for step in (10, 20, 30):
        saved(tmp_path, step, best=10, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [30]


def test_the_old_one_is_removed_only_after_the_new_one_stands(tmp_path, monkeypatch):
    saved(tmp_path, 10, keep_last=1)
    seen = []
    real = save.prune
    monkeypatch.setattr(save, "prune", lambda *a: (seen.append(steps(tmp_path)), real(*a)))
    saved(tmp_path, 20, keep_last=1)
    assert seen == [[10, 20]] and steps(tmp_path) == [20]


def test_a_failed_save_keeps_the_old_one(tmp_path, monkeypatch):
    saved(tmp_path, 10, keep_last=1)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(save, "atomic_save_tensors", full_disk)
    with pytest.raises(CheckpointError, match="no space"):
        saved(tmp_path, 20, keep_last=1)
    assert steps(tmp_path) == [10]
    load_checkpoint(checkpoint_path(tmp_path, 10))


def test_an_interrupted_removal_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        saved(tmp_path, step)

    def killed(path: Path, **_: object) -> None:
        (path / TRAINABLE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1, None)
    assert steps(tmp_path) == [20]
    monkeypatch.undo()
    clear_interrupted(tmp_path)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 10)
    path = saved(tmp_path, 10, best=10)
    assert load_checkpoint(path).state.best_step == 10 and steps(tmp_path) == [10]


def _keep_saving(run_dir: Path) -> None:
    for step in range(1, 10_000):
        saved(run_dir, step, keep_last=2)


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    survived = []
    for delay_s in (0.03, 0.05, 0.08, 0.11):
        writer = multiprocessing.get_context("fork").Process(target=_keep_saving, args=(tmp_path,))
        writer.start()
        while not steps(tmp_path):
            time.sleep(0.005)
        time.sleep(delay_s)
        writer.kill()
        writer.join()
        clear_interrupted(tmp_path)
        found = choose_checkpoint(tmp_path, "latest")
        assert found is not None and not list((tmp_path / "checkpoints").glob("*.partial"))
        survived.append(found.state.step)
        shutil.rmtree(tmp_path / "checkpoints")
    assert len(survived) == 4 and max(survived) > 1


def _save_as_rank(rank: int, run_dir: Path) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{run_dir}/meet")
    torch.distributed.barrier()
    path = saved(run_dir / f"rank{rank}", 5, ranks=ProcessGroup(rank, 2))
    (run_dir / f"said{rank}").write_text(str(path))
    torch.distributed.barrier()  # gloo connects in the background: who leaves first would cut the other off
    torch.distributed.destroy_process_group()


def test_only_rank_0_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_save_as_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert steps(tmp_path / "rank0") == [5] and not (tmp_path / "rank1").exists()
    assert (tmp_path / "said1").read_text().endswith("step-00000005")
    assert load_checkpoint(checkpoint_path(tmp_path / "rank0", 5)).processes == 2


# ------------------------------------------------------------------------------------------------------------- finding


def chosen(run_dir: Path, resume: str | Path) -> Path | None:
    found = choose_checkpoint(run_dir, resume)
    assert found is None or isinstance(found, LoadedCheckpoint)
    return None if found is None else found.path


def test_latest_is_the_newest_one(tmp_path, caplog):
    assert chosen(tmp_path, "latest") is None
    saved(tmp_path, 9)
    newest = saved(tmp_path, 10)
    shutil.copytree(newest, newest.with_name("step-00000012.1-aa.partial"))
    (newest.parent / "step-notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path, "latest") == newest
    assert not caplog.text


def test_a_folder_without_its_marker_is_damaged(tmp_path, caplog):
    older, newest = saved(tmp_path, 9), saved(tmp_path, 10)
    (newest / COMPLETE).unlink()
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path, "latest") == older
    assert "COMPLETE is missing" in caplog.text and not newest.exists()


def test_none_begins_but_never_over_another_run(tmp_path):
    assert chosen(tmp_path, "none") is None
    path = saved(tmp_path, 10)
    for _ in ("whole", "and damaged"):
        with pytest.raises(CheckpointError, match="up to step 10, and resume is none") as caught:
            choose_checkpoint(tmp_path, "none")
        assert "output_dir" in caught.value.fix and path.is_dir()
        (path / COMPLETE).unlink(missing_ok=True)


def test_a_named_checkpoint_must_be_one(tmp_path):
    first, last = saved(tmp_path, 10), saved(tmp_path, 20)
    assert chosen(tmp_path, last) == last == chosen(tmp_path, str(last))
    with pytest.raises(CheckpointError, match="there is no checkpoint") as caught:
        choose_checkpoint(tmp_path, tmp_path / "checkpoints" / "step-00000030")
    assert "step-00000010, step-00000020" in caught.value.fix
    with pytest.raises(CheckpointError, match="a run's folder") as caught:
        choose_checkpoint(tmp_path, tmp_path)
    assert str(last) in caught.value.fix
    (first / COMPLETE).unlink()
    for read in (lambda: choose_checkpoint(tmp_path, first), lambda: load_checkpoint(first)):
        with pytest.raises(CheckpointError, match="incomplete"):
            read()


def test_two_histories_do_not_mix_in_one_folder(tmp_path):
    first = saved(tmp_path / "a", 10)
    saved(tmp_path / "a", 20)
    with pytest.raises(CheckpointError, match=r"do not lead to step-00000010: step-00000020"):
        choose_checkpoint(tmp_path / "a", first)
    assert chosen(tmp_path / "b", first) == first, "another, empty folder may continue from it"
    saved(tmp_path / "b", 5)
    with pytest.raises(CheckpointError, match="step-00000005"):
        choose_checkpoint(tmp_path / "b", first)


def test_resume_reads_words_and_paths():
    read = TypeAdapter(CheckpointConfig).validate_python
    assert read({}).resume == "latest" and read({"resume": "none"}).resume == "none"
    assert read({"resume": "runs/a/checkpoints/step-00000010"}).resume == Path("runs/a/checkpoints/step-00000010")


# ----------------------------------------------------------------------------------------------- changed configuration


def changed(**sections: dict[str, Any] | str) -> dict[str, Any]:
    return {**CONFIG, **{k: {**CONFIG[k], **v} if isinstance(v, dict) else v for k, v in sections.items()}}


def test_equal_configurations_do_not_differ():
    assert compare_configs(CONFIG, CONFIG) == []
    written = {**CONFIG, "output_dir": Path("run"), "optimizer": {**CONFIG["optimizer"], "betas": (0.9, 0.95)}}
    assert compare_configs(CONFIG, written) == [], "a path is its text, a tuple its list"


def test_differences_are_named_field_by_field():
    new = changed(optimizer={"lr": 2e-4}, train={"seed": 1, "ema_decay": 0.99}, output_dir="elsewhere")
    found = {d.field: (d.old, d.new, d.allowed) for d in compare_configs(CONFIG, new)}
    assert found == {
        "optimizer.lr": (1e-4, 2e-4, True),
        "output_dir": ("run", "elsewhere", True),
        "train.ema_decay": (None, 0.99, False),
        "train.seed": (42, 1, False),
    }


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"dtype": "fp32"}},
        {"method": {"rank": 8}},
        {"method": {"kind": "full"}},
        {"optimizer": {"kind": "adamw"}},
        {"optimizer": {"kwargs": {"momentum": 0.9}}},
        {"train": {"batch_size": 2}},
        {"train": {"accumulation": 4}},
        {"train": {"seed": 0}},
        {"something_new": {"field": 1}},
    ],
    ids=str,
)
def test_what_makes_it_another_run_is_refused(sections):
    new = {**CONFIG, **sections} if "something_new" in sections else changed(**sections)
    (difference,) = compare_configs(CONFIG, new)
    with pytest.raises(CheckpointError) as caught:
        require_same_run(CONFIG, new, where="step-00000010")
    assert difference.field in str(caught.value) and difference.reason in str(caught.value)
    assert caught.value.where == "step-00000010" and "output_dir" in caught.value.fix


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 200}},
        {"optimizer": {"lr": 1e-5}},
        {"method": {"dropout": 0.1}},
        {"lr_schedule": {"kind": "cosine", "final": 0.1}},
        {"memory": {"checkpointing": "none"}},
        {"data": {"caption_dropout": 0.2, "sources": [{"path": "moved"}]}},
        {"output_dir": "elsewhere"},
    ],
    ids=str,
)
def test_what_a_run_can_go_on_with_is_told(sections):
    told = require_same_run(CONFIG, changed(**sections), where="")
    assert told and all(difference.allowed and difference.reason for difference in told)


def test_a_model_under_another_of_its_names_is_the_same():
    names = ("THUDM/CogVideoX-5b", "zai-org/CogVideoX-5b", "5b")
    for name in names:
        assert not compare_configs(changed(model={"pretrained": names[0]}), changed(model={"pretrained": name}))
    (change,) = compare_configs(changed(model={"pretrained": "5b"}), changed(model={"pretrained": "5b-i2v"}))
    assert not change.allowed


def test_all_refused_fields_are_told_at_once():
    with pytest.raises(CheckpointError) as caught:
        require_same_run(
            CONFIG, changed(train={"seed": 1, "batch_size": 2, "steps": 7}, model={"dtype": "x"}), where=""
        )
    text = str(caught.value)
    assert "train.seed: 42 -> 1" in text and "train.batch_size" in text and 'model.dtype: "bf16" -> "x"' in text
    assert "train.steps" not in text


def test_processes_and_accumulation_may_trade_places():
    (told,) = require_same_run(CONFIG, changed(train={"accumulation": 1}), where="", processes=(1, 2))
    assert told.field == "train.accumulation" and told.allowed
    assert require_same_run(CONFIG, CONFIG, where="", processes=(2, 2)) == []
    with pytest.raises(
        CheckpointError, match=r"number of processes: 1 -> 2 \(a step would have 4 micro-batches, not 2"
    ):
        require_same_run(CONFIG, changed(train={"steps": 7}), where="", processes=(1, 2))
    with pytest.raises(CheckpointError, match=r"train\.accumulation"):
        require_same_run(CONFIG, changed(train={"accumulation": 3}), where="", processes=(1, 2))


def test_every_rule_names_a_field_that_exists():
    """A renamed field would otherwise fall back to its section's rule unseen."""
    from finetune.config.schema import RunConfig

    schema = RunConfig.model_json_schema()
    known = {""}

    def walk(node: dict[str, Any], prefix: str) -> None:
        if "$ref" in node:
            walk(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], prefix)
        for branch in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
            walk(branch, prefix)
        for name, child in node.get("properties", {}).items():
            known.add(f"{prefix}{name}")
            walk(child, f"{prefix}{name}.")

    walk(schema, "")
    assert len(known) > 40 and issubclass(RunConfig, BaseModel)
    assert set(compare._RULES) <= known, set(compare._RULES) - known
    assert {name for name in known if name and "." not in name} <= set(compare._RULES), "a section without a rule"
