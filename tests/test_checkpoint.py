"""Checkpoints: whole or absent, pruned in the right order, found again, and honest about a changed configuration."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    FILES,
    KINDS,
    assert_as_written,
    change_state,
    content,
    newest,
    rewrite_marker,
    steps,
    write,
)
from pydantic import TypeAdapter
from waiting import until

from finetune.checkpoint import compare, folders, save
from finetune.checkpoint.compare import compare_configs, require_same_run
from finetune.checkpoint.folders import CheckpointConfig, checkpoint_path, clear_interrupted, prune
from finetune.checkpoint.load import choose_checkpoint, load_checkpoint
from finetune.checkpoint.save import save_checkpoint
from finetune.config.schema import RunConfig
from finetune.core import files
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError
from finetune.core.files import COMPLETE, TRAINABLE

# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ema", [False, True])
def test_everything_comes_back_bit_for_bit(tmp_path, kind, ema):
    path = write(tmp_path, 500, kind, best=400, ema=ema)
    assert path == tmp_path / "checkpoints" / "step-00000500" == checkpoint_path(tmp_path, 500)
    assert {file.name for file in path.iterdir()} == {*FILES} - (set() if ema else {folders.EMA})
    loaded = load_checkpoint(path)
    assert loaded.path == path and loaded.processes == 1 and (loaded.ema is None) is not ema
    assert_as_written(loaded, 500, kind, best=400, ema=ema)
    assert load_checkpoint(path, optimizer=False).optimizer == ({}, {})


def test_a_later_format_is_told_from_damage(tmp_path):
    path = write(tmp_path, 1)
    change_state(path, format=folders.FORMAT + 1)
    for read in (lambda: load_checkpoint(path), lambda: choose_checkpoint(tmp_path, "latest")):
        with pytest.raises(CheckpointError, match="format 3, this version reads 2"):
            read()
    assert steps(tmp_path) == [1], "nothing is renamed that another version can read"


def test_the_first_format_is_told_from_damage(tmp_path):
    path = write(tmp_path, 1)
    change_state(path, format=1)
    (path / COMPLETE).write_text("")
    for read in (lambda: load_checkpoint(path), lambda: choose_checkpoint(tmp_path, "latest")):
        with pytest.raises(CheckpointError, match="earlier version of this package"):
            read()


STATES: list[Any] = [
    {"moon_phase": 3, "step": 1, "cache_digest": ""},
    {"step": "1", "cache_digest": ""},
    {"step": 1.5, "cache_digest": ""},
    {"step": 1, "cache_digest": None},
    {"step": 1, "cache_digest": "", "best_step": [1]},
    {"cache_digest": ""},
    [],
    None,
    "state",
]


@pytest.mark.parametrize(
    "changes",
    [*({"state": state} for state in STATES), *({"processes": value} for value in (0, "2", None, 1.5, True))],
    ids=str,
)
def test_the_state_of_another_version_is_told_from_damage(tmp_path, changes):
    path = write(tmp_path, 1)
    change_state(path, **changes)
    with pytest.raises(CheckpointError, match=r"another version of this package: state\.json"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", [folders.STATE, folders.CONFIG, folders.OPTIMIZER_META, folders.EMA])
def test_a_file_of_another_content_is_no_traceback(tmp_path, name):
    path = write(tmp_path, 1)
    if name == folders.EMA:
        shutil.copy(path / folders.OPTIMIZER, path / name)
    else:
        (path / name).write_text("[1, 2]")
    rewrite_marker(path)
    with pytest.raises(CheckpointError, match=f"{name} (holds a list|does not hold the tensors)"):
        load_checkpoint(path)


def test_what_json_cannot_hold_is_not_written(tmp_path):
    nan = dataclasses.replace(content("lora", 1), optimizer=({}, {"scalars": {"a": {"step": float("nan")}}}))
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path, nan, CheckpointConfig())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- pruning


def test_the_last_k_and_the_best_stay(tmp_path):
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 20)):
        write(tmp_path, step, best=best, keep_last=2)
    assert steps(tmp_path) == [20, 40, 50]
    write(tmp_path, 60, best=60, keep_last=2)
    assert steps(tmp_path) == [50, 60]
    write(tmp_path, 70, best=50, keep_last=1, keep_best=False)
    assert steps(tmp_path) == [70]


def test_the_old_one_is_removed_only_after_the_new_one_stands(tmp_path, monkeypatch):
    write(tmp_path, 10, keep_last=1)
    seen = []
    real = save.prune
    monkeypatch.setattr(save, "prune", lambda *a: (seen.append(steps(tmp_path)), real(*a)))
    write(tmp_path, 20, keep_last=1)
    assert seen == [[10, 20]] and steps(tmp_path) == [20]


def test_an_interrupted_removal_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        write(tmp_path, step)

    def killed(path: Path, **_: object) -> None:
        (path / TRAINABLE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1, None)
    assert steps(tmp_path) == [20]
    monkeypatch.undo()
    clear_interrupted(tmp_path)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 10)
    assert load_checkpoint(write(tmp_path, 10, best=10)).state.best_step == 10 and steps(tmp_path) == [10]


def _keep_saving(run_dir: Path) -> None:
    for step in range(1, 10_000):
        write(run_dir, step, keep_last=2)


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    for step, delay_s in ((1, 0.0), (2, 0.003), (3, 0.01), (4, 0.02)):
        writer = multiprocessing.get_context("fork").Process(target=_keep_saving, args=(tmp_path,))
        writer.start()
        until(lambda step=step: max(steps(tmp_path), default=0) >= step, "so many are saved")
        time.sleep(delay_s)  # somewhere in the next one
        writer.kill()
        writer.join()
        clear_interrupted(tmp_path)
        loaded = choose_checkpoint(tmp_path, "latest")
        assert loaded is not None and loaded.state.step >= step
        assert not list((tmp_path / "checkpoints").glob("*.partial"))
        shutil.rmtree(tmp_path / "checkpoints")


def _save_as_rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    torch.distributed.barrier()
    created: list[str] = []
    create = files._create
    files._create = lambda path: (created.append(path.name), create(path))[1]
    path = write(folder / "run", 5, ranks=ProcessGroup(rank, 2))
    (folder / f"rank{rank}.json").write_text(json.dumps([str(path), created]))
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
    (path, created), (other_path, other_created) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)
    )
    assert path == other_path == str(newest(tmp_path / "run")) and steps(tmp_path / "run") == [5]
    assert len(created) == len(FILES) and other_created == []
    assert load_checkpoint(Path(path)).processes == 2


# ------------------------------------------------------------------------------------------------------------- finding


def chosen(run_dir: Path, resume: str | Path) -> Path | None:
    loaded = choose_checkpoint(run_dir, resume)
    return None if loaded is None else loaded.path


def test_latest_is_the_newest_one(tmp_path, caplog):
    assert chosen(tmp_path, "latest") is None
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    shutil.copytree(newer, newer.with_name("step-00000012.1-aa.partial"))
    (newer.parent / "step-notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path, "latest") == newer
    assert not caplog.text
    (newer / COMPLETE).unlink()
    with caplog.at_level(logging.WARNING):
        assert chosen(tmp_path, "latest") == older
    assert "COMPLETE is missing" in caplog.text and not newer.exists()


def test_none_begins_but_never_over_another_run(tmp_path):
    assert chosen(tmp_path, "none") is None
    path = write(tmp_path, 10)
    for _ in ("whole", "and damaged"):
        with pytest.raises(CheckpointError, match="up to step 10, and resume is none") as caught:
            choose_checkpoint(tmp_path, "none")
        assert "output_dir" in caught.value.fix and path.is_dir()
        (path / COMPLETE).unlink(missing_ok=True)


def test_a_named_checkpoint_must_be_one(tmp_path):
    first, last = write(tmp_path, 10), write(tmp_path, 20)
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
    first = write(tmp_path / "a", 10)
    write(tmp_path / "a", 20)
    with pytest.raises(CheckpointError, match=r"do not lead to step-00000010: step-00000020"):
        choose_checkpoint(tmp_path / "a", first)
    assert chosen(tmp_path / "b", first) == first, "another, empty folder may continue from it"
    write(tmp_path / "b", 5)
    with pytest.raises(CheckpointError, match="step-00000005"):
        choose_checkpoint(tmp_path / "b", first)


def test_resume_reads_words_and_paths():
    read = TypeAdapter(CheckpointConfig).validate_python
    for value, resume in (({}, "latest"), ({"resume": "none"}, "none"), ({"resume": "runs/a"}, Path("runs/a"))):
        assert read(value).resume == resume


# ----------------------------------------------------------------------------------------------- changed configuration

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


def changed(**sections: dict[str, Any] | str) -> dict[str, Any]:
    return {**CONFIG, **{k: {**CONFIG.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}


def test_a_run_from_before_a_source_had_an_option_is_the_same_run():
    before = {"data": {"sources": [{"path": "clips", "repeats": 1.0}]}}
    (source,) = before["data"]["sources"]
    since = {"trigger": None, "caption_prefix": None, "caption_suffix": None, "caption_dropout": None, "weight": 1.0}
    assert compare_configs(before, {"data": {"sources": [source | since]}}) == []
    (change,) = compare_configs(before, {"data": {"sources": [source | since | {"weight": 2.0}]}})
    assert change.field == "data.sources"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_from_before_goes_on_whatever_was_added_to_the_configuration_since(method):
    """As 0802f87 recorded them. A field that is new to a section in which nothing may change needs its ``_SINCE``."""
    before = json.loads((Path(__file__).parent / "golden" / "earlier_configs.json").read_text())[method]
    now = RunConfig.from_dict(
        {
            "model": {"pretrained": before["model"]["pretrained"]},
            "data": {"sources": [{"path": "/tmp/clips"}], "buckets": ["49x480x720"]},
            "method": {"kind": method},
            "train": {"steps": 10},
            "output_dir": before["output_dir"],
        }
    ).model_dump(mode="json")
    changes = {change.field: change.allowed for change in compare_configs(before, now)}
    assert all(changes.values()) and changes.keys() <= {"cache.dir", "data.control_dropout", "method.compute"}


def test_differences_are_named_field_by_field():
    written = {**CONFIG, "output_dir": Path("run"), "optimizer": {**CONFIG["optimizer"], "betas": (0.9, 0.95)}}
    assert compare_configs(CONFIG, written) == [], "a path is its text, a tuple its list"
    new = changed(optimizer={"lr": 2e-4}, train={"seed": 1, "ema_decay": 0.99}, output_dir="elsewhere")
    assert {d.field: (d.old, d.new, d.allowed) for d in compare_configs(CONFIG, new)} == {
        "optimizer.lr": (1e-4, 2e-4, True),
        "output_dir": ("run", "elsewhere", True),
        "train.ema_decay": (None, 0.99, False),
        "train.seed": (42, 1, False),
    }


REFUSED: list[dict[str, Any]] = [
    {"model": {"dtype": "fp32"}},
    {"method": {"rank": 8}},
    {"method": {"kind": "full"}},
    {"optimizer": {"kind": "adamw"}},
    {"optimizer": {"kwargs": {"momentum": 0.9}}},
    {"train": {"batch_size": 2}},
    {"train": {"accumulation": 4}},
    {"train": {"seed": 0}},
    {"something_new": {"field": 1}},
]
ALLOWED: list[dict[str, Any]] = [
    {"train": {"steps": 200}},
    {"optimizer": {"lr": 1e-5}},
    {"method": {"dropout": 0.1}},
    {"lr_schedule": {"kind": "cosine", "final": 0.1}},
    {"memory": {"checkpointing": "none"}},
    {"data": {"caption_dropout": 0.2, "sources": [{"path": "moved"}]}},
    {"output_dir": "elsewhere"},
]


@pytest.mark.parametrize("sections", [*REFUSED, *ALLOWED], ids=str)
def test_what_makes_it_another_run_is_refused_and_the_rest_is_told(sections):
    new = changed(**sections)
    if sections in ALLOWED:
        told = require_same_run(CONFIG, new, where="")
        assert told and all(difference.allowed and difference.reason for difference in told)
        return
    (difference,) = compare_configs(CONFIG, new)
    with pytest.raises(CheckpointError) as caught:
        require_same_run(CONFIG, new, where="step-00000010")
    assert difference.field in str(caught.value) and difference.reason in str(caught.value)
    assert caught.value.where == "step-00000010" and "output_dir" in caught.value.fix


def test_all_refused_fields_are_told_at_once():
    new = changed(train={"seed": 1, "batch_size": 2, "steps": 7}, model={"dtype": "x"})
    with pytest.raises(CheckpointError) as caught:
        require_same_run(CONFIG, new, where="")
    text = str(caught.value)
    assert "train.seed: 42 -> 1" in text and "train.batch_size" in text and 'model.dtype: "bf16" -> "x"' in text
    assert "train.steps" not in text


def test_a_model_under_another_of_its_names_is_the_same():
    names = ("THUDM/CogVideoX-5b", "zai-org/CogVideoX-5b", "5b")
    for name in names:
        assert not compare_configs(changed(model={"pretrained": names[0]}), changed(model={"pretrained": name}))
    (change,) = compare_configs(changed(model={"pretrained": "5b"}), changed(model={"pretrained": "5b-i2v"}))
    assert not change.allowed


def test_processes_and_accumulation_may_trade_places():
    (told,) = require_same_run(CONFIG, changed(train={"accumulation": 1}), where="", processes=(1, 2))
    assert told.field == "train.accumulation" and told.allowed
    assert require_same_run(CONFIG, CONFIG, where="", processes=(2, 2)) == []
    words = r"number of processes: 1 -> 2 \(a step would have 4 micro-batches, not 2"
    with pytest.raises(CheckpointError, match=words):
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
    assert len(known) > 40
    assert set(compare._RULES) <= known, set(compare._RULES) - known
    assert {name for name in known if name and "." not in name} <= set(compare._RULES), "a section without a rule"
