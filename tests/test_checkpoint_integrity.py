"""A checkpoint is used as it was written or not at all: flips, truncations and zeroed ranges anywhere in it."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FILES, KINDS, Harm, assert_as_written, copied, newest, rewrite_marker, steps, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from worlds import assert_same_run, fabricate_cache, run_config

from finetune import export
from finetune.checkpoint import folders
from finetune.checkpoint.folders import HISTORY, list_checkpoints, prune
from finetune.checkpoint.load import choose_checkpoint, load_checkpoint
from finetune.config.schema import RunConfig
from finetune.core import checksums
from finetune.core.checksums import ChecksummedFolder, DamageError, folder_checksums
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError, ConfigError
from finetune.core.files import COMPLETE, LORA_FILE, TRAINABLE
from finetune.core.tensor_files import atomic_save_tensors
from finetune.inference.adapters import read_sources
from finetune.inference.request import AdapterArgument
from finetune.methods.adapter import read_adapter
from finetune.trainers.loop import train
from finetune.trainers.setup import hold_run_folder

harms = st.builds(
    Harm,
    what=st.sampled_from(["flip", "flip", "flip", "zero", "cut", "drop", "grow", "delete"]),
    file=st.sampled_from(FILES),
    at=st.floats(0, 1, exclude_max=True),
    length=st.integers(1, 600),
    bit=st.integers(0, 7),
)


@pytest.fixture(scope="module", params=KINDS)
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run with two whole checkpoints, to be copied."""
    run = tmp_path_factory.mktemp(request.param)
    for step in (10, 20):
        write(run, step, request.param)
    return request.param, run


def check_case(kind: str, run: Path, harm: Harm) -> bool:
    """Harm the newer checkpoint: it is named and never used, and the older one is. False if no byte changed."""
    folder = newest(run)
    before = (folder / harm.file).read_bytes()
    if not harm.do(folder):
        return False
    try:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(folder)
        assert caught.value.where == str(folder) and harm.file in str(caught.value), str(caught.value)
        assert "step-00000010" in caught.value.fix
        assert_as_written(choose_checkpoint(run, "latest"), 10, kind)
        assert not folder.exists()
        (aside,) = folder.parent.glob("step-00000020.damaged-*")
        aside.rename(folder)
    finally:
        (folder / harm.file).write_bytes(before)
    return True


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(harm=harms)
@example(Harm("flip", COMPLETE, 0.999))
@example(Harm("cut", COMPLETE, 0.0))
@example(Harm("delete", COMPLETE, 0.0))
@example(Harm("flip", folders.STATE, 0.0))
def test_harm_anywhere_is_named_and_the_one_before_is_used(intact, harm):
    check_case(*intact, harm)


@pytest.mark.slow
@settings(QUICK, max_examples=1000)
@given(harm=harms)
def test_harm_anywhere_a_thousand_times(intact, harm):
    check_case(*intact, harm)


@pytest.mark.parametrize("name", FILES)
def test_every_single_bit_counts(intact, name):
    """Not a sample: each bit of the small files, and of the large ones every bit of every 7th byte."""
    _, run = intact
    with copied(run) as case:
        folder = newest(case)
        content = (folder / name).read_bytes()
        step = 1 if len(content) < 300 else 7
        for place in range(0, len(content), step):
            changed = bytearray(content)
            changed[place] ^= 1 << (place % 8)
            (folder / name).write_bytes(changed)
            with pytest.raises(DamageError) as caught:
                ChecksummedFolder.open(folder).read_bytes(name)
            assert caught.value.path == folder / name
        (folder / name).write_bytes(content)
        assert choose_checkpoint(case, "latest").path == folder


@pytest.mark.parametrize("name", [TRAINABLE, folders.OPTIMIZER, folders.EMA])
def test_without_the_checksums_damage_gets_through(intact, name, monkeypatch):
    """The canary: a flipped bit of a tensor is then loaded as if nothing had happened."""
    kind, run = intact
    with copied(run) as case:
        assert Harm("flip", name, 0.98).do(newest(case))
        monkeypatch.setattr(ChecksummedFolder, "_compare", lambda *_: None)
        found = choose_checkpoint(case, "latest")
        assert found is not None and found.state.step == 20
        with pytest.raises(AssertionError):
            assert_as_written(found, 20, kind)


def test_large_files_are_verified_and_mapped(intact, monkeypatch):
    kind, run = intact
    monkeypatch.setattr(checksums, "MAPPED_ABOVE", 16)
    assert_as_written(choose_checkpoint(run, "latest"), 20, kind)
    for harm in (
        Harm("flip", TRAINABLE, 0.9),
        Harm("cut", folders.OPTIMIZER, 0.5),
        Harm("delete", folders.EMA, 0),
    ):
        assert check_case(kind, run, harm)


# ------------------------------------------------------------------------------------------------- falling back, or not


def test_it_falls_back_as_far_as_it_must_and_says_so(tmp_path, caplog):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    paths = dict(list_checkpoints(tmp_path))
    Harm("flip", TRAINABLE, 0.5).do(paths[40])
    Harm("cut", folders.CONFIG, 0.5).do(paths[30])
    Harm("flip", folders.STATE, 0.5).do(paths[10])
    with caplog.at_level(logging.WARNING):
        assert_as_written(choose_checkpoint(tmp_path, "latest"), 20)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    for step, name in ((40, TRAINABLE), (30, folders.CONFIG)):
        assert f"step-000000{step} is damaged: {name} is not as it was written" in caplog.text
    assert "continues from step-00000020" in caplog.text
    assert steps(tmp_path) == [10, 20], "what is older than the one used is left alone"
    caplog.clear()
    assert_as_written(choose_checkpoint(tmp_path, "latest"), 20)
    assert not caplog.records, "said once"


def test_none_whole_is_an_error_and_never_a_new_start(tmp_path):
    for step in (10, 20):
        Harm("flip", folders.OPTIMIZER, 0.7).do(write(tmp_path, step, "full"))
    for _ in ("now", "and whenever it is tried again"):
        with pytest.raises(CheckpointError, match="no checkpoint of this run is whole") as caught:
            choose_checkpoint(tmp_path, "latest")
        assert "step-00000010" in str(caught.value) and folders.OPTIMIZER in str(caught.value)
        assert len(steps(tmp_path)) == 2, "nothing is renamed where nothing is gained"
    for _, path in list_checkpoints(tmp_path):
        path.rename(path.with_name(f"{path.name}.damaged-0123abcd"))
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        choose_checkpoint(tmp_path, "latest")


def test_a_named_checkpoint_that_is_damaged_is_an_error_that_names_the_whole_ones(tmp_path):
    paths = [write(tmp_path, step) for step in (10, 20, 30)]
    Harm("flip", folders.OPTIMIZER, 0.5).do(paths[0])
    Harm("flip", folders.EMA, 0.5).do(paths[2])
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(tmp_path, paths[2])
    assert caught.value.what == "the checkpoint is damaged: ema.safetensors is not as it was written"
    assert caught.value.fix == "use another one; whole are step-00000020"
    assert paths[2].is_dir(), "what was asked for by name is not renamed"


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(tmp_path, request, kind, name):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    (newer / name).unlink()
    if kind == "pipe":
        os.mkfifo(newer / name)
        writer = threading.Timer(20, lambda: (newer / name).open("wb").close())  # a test that fails must not hang
        writer.daemon = True
        writer.start()
        request.addfinalizer(writer.cancel)
    else:  # one that does end, or a failure would take all memory
        (newer / name).symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        choose_checkpoint(tmp_path, newer)
    found = choose_checkpoint(tmp_path, "latest")
    assert found is not None and found.path == older


def test_an_input_output_error_is_damage_and_missing_permission_is_not(tmp_path, monkeypatch):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    real = Path.read_bytes

    def failing(number: int) -> Callable[[Path], bytes]:
        def read(path: Path) -> bytes:
            if path == newer / folders.CONFIG:
                raise OSError(number, "failing disk")
            return real(path)

        return read

    monkeypatch.setattr(Path, "read_bytes", failing(13))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*failing disk"):
        choose_checkpoint(tmp_path, "latest")
    assert newer.is_dir()
    monkeypatch.setattr(Path, "read_bytes", failing(5))
    found = choose_checkpoint(tmp_path, "latest")
    assert found is not None and found.path == older and not newer.exists()


def test_a_damaged_one_goes_when_a_newer_one_stands(tmp_path):
    write(tmp_path, 10)
    Harm("flip", TRAINABLE, 0.5).do(write(tmp_path, 20))
    choose_checkpoint(tmp_path, "latest")
    (aside,) = (tmp_path / "checkpoints").glob("*.damaged-*")
    write(tmp_path, 15)
    prune(tmp_path, 9, None)
    assert aside.is_dir()
    write(tmp_path, 20)
    assert not aside.exists() and steps(tmp_path) == [10, 15, 20]


def test_a_checkpoint_pruned_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = write(tmp_path, 10)
    real = ChecksummedFolder.open

    def pruned(folder: Path) -> ChecksummedFolder:
        opened = real(folder)
        shutil.rmtree(folder)
        return opened

    monkeypatch.setattr(ChecksummedFolder, "open", pruned)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(path)


# -------- folders with checksums


@given(
    names=st.lists(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
            lambda name: name not in (".", "..", COMPLETE) and len(name.encode()) < 200
        ),
        max_size=4,
        unique=True,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_name_can_stand_in_the_marker(tmp_path, names):
    shutil.rmtree(tmp_path / "f", ignore_errors=True)
    (tmp_path / "f" / "inner").mkdir(parents=True)
    for name in names:
        (tmp_path / "f" / "inner" / name).write_bytes(name.encode())
    (tmp_path / "f" / COMPLETE).write_text(folder_checksums(tmp_path / "f"))
    folder = ChecksummedFolder.open(tmp_path / "f")
    assert {name: folder.read_bytes(f"inner/{name}") for name in names} == {name: name.encode() for name in names}
    assert set(folder.checksums) == {f"inner/{name}" for name in names}


def test_what_the_marker_does_not_name_is_not_read(tmp_path):
    path = write(tmp_path, 10)
    (path / "extra.json").write_text("{}")
    with pytest.raises(DamageError, match=r"COMPLETE does not name extra\.json"):
        ChecksummedFolder.open(path).read_json("extra.json")


@pytest.mark.parametrize("marker", [b"", b"\n", b"x", b"\xff\xfe", b"a  b\n", b'0  "\\\n0\n', b"one two three\n\n"])
def test_a_marker_that_is_none_is_damage(tmp_path, marker):
    (tmp_path / COMPLETE).write_bytes(marker)
    with pytest.raises(DamageError, match="COMPLETE is not as it was written"):
        ChecksummedFolder.open(tmp_path)


# ------------------------------------------------------------------------------------------------ continuing an adapter


def test_an_adapter_of_a_damaged_checkpoint_or_export_is_not_continued(tmp_path):
    path = write(tmp_path, 10)
    assert read_adapter(path).settings["alpha"] == 2.0
    for name in (TRAINABLE, folders.CONFIG, COMPLETE):
        with copied(path) as case:
            Harm("flip", name, 0.6).do(case)
            with pytest.raises(ConfigError, match=f"the adapter is damaged: {name}"):
                read_adapter(case)
    with copied(path) as case:
        Harm("flip", TRAINABLE, 0.9).do(case)
        (case / COMPLETE).unlink()
        assert read_adapter(case).settings["rank"] == 4, "the canary, and the way out for who changed it on purpose"


@pytest.mark.parametrize("settings", ["[1]", "{", '{"transformer.lora_alpha": "many"}'])
def test_an_adapters_strange_header_is_no_traceback(tmp_path, settings):
    tensors = {"transformer.x.lora_A.weight": torch.zeros(4, 8), "transformer.x.lora_B.weight": torch.zeros(8, 4)}
    save_file(tensors, tmp_path / LORA_FILE, {"lora_adapter_metadata": settings})
    with pytest.raises(ConfigError, match=r"cannot be read|not a number"):
        read_adapter(tmp_path)


# ------------------------------------------------------------------------------------------------------ whole trainings


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_falls_back_and_ends_as_if_nothing_had_happened(tiny_model, tmp_path, kind):
    """Steps 3 and 4 are damaged: the run goes on from 2 and ends with the weights of an uninterrupted one."""
    changes = {"cache": {"mode": "require"}, "checkpoint": {"every": 1, "keep_last": 9}, "method": {"kind": kind}}
    config = run_config(tiny_model("5b"), tmp_path / "none", tmp_path / "run", **changes, train={"steps": 4})
    fabricate_cache(config)
    train(config)
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    paths = dict(list_checkpoints(tmp_path / "run"))
    Harm("flip", folders.OPTIMIZER, 0.9).do(paths[4])
    Harm("cut", TRAINABLE, 0.9).do(paths[3])
    with (tmp_path / "run" / HISTORY).open("ab") as history:
        history.write(b'{"step": 2, "heldout": \x00\n')
    assert train(config).step == 4
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.damaged-*")), "superseded by the new ones"


def test_an_export_of_a_damaged_newest_checkpoint_names_the_whole_ones(tiny_model, tmp_path):
    changes = {"cache": {"mode": "require"}, "checkpoint": {"every": 1, "keep_last": 9}, "train": {"steps": 3}}
    config = run_config(tiny_model("5b"), tmp_path / "none", tmp_path / "run", **changes)
    fabricate_cache(config)
    train(config)
    paths = dict(list_checkpoints(tmp_path / "run"))
    exported = export(tmp_path / "run", tmp_path / "whole").folder
    for harm, words in (
        (Harm("flip", TRAINABLE, 0.9), "damaged: trainable"),
        (Harm("cut", folders.CONFIG, 0.5), "damaged: config"),
        (Harm("delete", COMPLETE, 0), "incomplete: it has no COMPLETE"),
    ):
        with copied(tmp_path / "run") as case:
            harm.do(newest(case))
            with pytest.raises(CheckpointError, match=words) as caught:
                export(case, tmp_path / "export")
            assert "step-00000001, step-00000002" in caught.value.fix and not (tmp_path / "export").exists()
    Harm("flip", folders.OPTIMIZER, 0.5).do(paths[3])
    export(tmp_path / "run", tmp_path / "export")  # the optimizer's state is no part of it
    # What an export holds is verified when it is read again.
    assert read_adapter(exported).settings["rank"] == 4
    for file in (LORA_FILE, COMPLETE):
        with copied(exported) as case:
            Harm("flip", file, 0.7).do(case)
            with pytest.raises(ConfigError, match=f"the adapter is damaged: {file}"):
                read_adapter(case)
            (fault,) = read_sources([AdapterArgument(case)])[1]
            assert fault.what.startswith(f"the adapter is damaged: {file}")


def test_a_second_training_of_a_run_folder_is_refused(tiny_model, tmp_path):
    config = run_config(tiny_model("5b"), tmp_path / "none", tmp_path / "run", cache={"mode": "require"})
    fabricate_cache(config)
    refused = pytest.raises(CheckpointError, match="another training writes to this run folder")
    with hold_run_folder(tmp_path / "run", ProcessGroup(), print), refused:
        train(config)


# ------------------------------------------------------------------------ checkpoints that are whole, and not the run's


def state(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / folders.STATE).read_text())
        content["state"] |= changes
        (folder / folders.STATE).write_text(json.dumps(content))

    return change


def tensors_of(name: str, act: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Change the first tensor of a file that has more than one element."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        act(tensors, next(key for key in sorted(tensors) if tensors[key].numel() > 1))
        atomic_save_tensors(folder / name, tensors)
        if name == TRAINABLE:
            state(weights="")(folder)  # or the digest would tell

    return change


def cut(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key].flatten()[:1].clone()


def halve(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key].half()


def drop(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def more(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}.more"] = torch.zeros(3)


def not_finite(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key].flatten()[0] = math.nan


def endless(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key.rpartition('.')[0]}.step"].fill_(1e30)


def shared_with_nothing(folder: Path) -> None:
    content = json.loads((folder / folders.OPTIMIZER_META).read_text())
    content["shared"]["state.more.exp_avg"] = "nothing"
    (folder / folders.OPTIMIZER_META).write_text(json.dumps(content))


def other_numbers(folder: Path) -> None:
    tensors = load_file(folder / TRAINABLE)
    atomic_save_tensors(folder / TRAINABLE, {name: tensor + 1 for name, tensor in tensors.items()})


STRANGE = {
    "step": (state(step=3), "step is 3 in step-00000002"),
    "samples": (state(samples_seen=7), "has seen 7 samples in 2 steps, and the plan has 2"),
    "negative": (state(samples_seen=-1), "samples_seen -1"),
    "best": (state(best_step=5, best_heldout_loss=0.5), "best_step 5 at step 2"),
    "nan": (state(best_step=1, best_heldout_loss=float("nan")), "best_heldout_loss is nan"),
    "best without a loss": (state(best_step=1), "best_heldout_loss is None, best_step 1"),
    "a loss below nothing": (state(best_step=1, best_heldout_loss=-1.0), "best_heldout_loss is -1.0"),
    "shared with nothing": (shared_with_nothing, "exp_avg is that of nothing, which is missing, which nothing reads"),
    "endless": (tensors_of(folders.OPTIMIZER, endless), r"step is 1\.0\d*e\+30"),
    "not finite": (tensors_of(TRAINABLE, not_finite), "weights, or their average, are not finite"),
    "average not finite": (tensors_of(folders.EMA, not_finite), "weights, or their average, are not finite"),
    "other weights": (other_numbers, "does not hold the weights whose digest"),
    "no average": (lambda folder: (folder / folders.EMA).unlink(), "holds no moving average, and this run keeps one"),
    **{
        f"{act.__name__} of {name}": (tensors_of(name, act), words)
        for name, words in (
            (TRAINABLE, "not this model's trainable tensors|does not hold the tensors of trainable"),
            (folders.OPTIMIZER, "the optimizer's state is not one of AdamW"),
            (folders.EMA, "does not hold the tensors of trainable|in another dtype than float32"),
        )
        for act in (cut, halve, drop, more)
    },
}


@pytest.fixture(scope="module")
def ended(tiny_model, tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("ended")
    changes = {"cache": {"mode": "require"}, "train": {"steps": 2, "ema_decay": 0.9}}
    config = run_config(tiny_model("5b"), folder / "none", folder / "run", **changes)
    fabricate_cache(config)
    train(config)
    return config


@pytest.mark.parametrize("case", STRANGE)
def test_a_whole_checkpoint_that_is_not_what_it_says_is_refused_by_name(ended, case):
    """Not damage, so none before it is taken: whoever rewrote it meant something, and learns what does not fit."""
    act, words = STRANGE[case]
    with copied(ended.output_dir) as run:
        folder = newest(run)
        act(folder)
        rewrite_marker(folder)
        with pytest.raises(CheckpointError, match=words) as caught:
            train(ended.model_copy(update={"output_dir": run}))
        assert str(folder) in caught.value.where and caught.value.fix
        assert [path for _, path in list_checkpoints(run)] == [folder]


@pytest.mark.parametrize("content", [{}, {"method": 5, "model": {}, "data": {}}, {"method": {"kind": "lora"}}])
def test_an_adapter_of_a_checkpoint_without_its_settings_is_refused(ended, content):
    with copied(ended.output_dir) as run:
        (newest(run) / folders.CONFIG).write_text(json.dumps(content))
        rewrite_marker(newest(run))
        (fault,) = read_sources([AdapterArgument(run)])[1]
        assert "config.json is none of this package" in fault.what and str(run) in fault.where


def test_a_run_that_is_rewritten_as_it_was_goes_on(ended):
    """Canary: it is the change that is refused, not the checksum."""
    with copied(ended.output_dir) as run:
        folder = newest(run)
        state()(folder)
        rewrite_marker(folder)
        longer = ended.train.model_copy(update={"steps": 3})
        assert train(ended.model_copy(update={"output_dir": run, "train": longer})).step == 3


def test_a_checkpoint_from_beyond_the_end_is_refused(ended):
    with copied(ended.output_dir) as run:
        shorter = ended.train.model_copy(update={"steps": 1})
        with pytest.raises(CheckpointError, match="has taken 2 steps, and the run is to take 1"):
            train(ended.model_copy(update={"output_dir": run, "train": shorter}))
