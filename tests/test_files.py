"""Files that are whole or absent, whatever call to the disk fails, and digests that are what they say."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from broken_disk import CALLS, disk
from hypothesis import given
from hypothesis import strategies as st

from finetune.core import checksums, files, tensor_files
from finetune.core.errors import CheckpointError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def tree(folder: Path) -> dict[str, bytes]:
    """Every path below ``folder``: a file's bytes, or ``b"/"`` for a directory."""
    return {
        path.relative_to(folder).as_posix(): b"/" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


# ------------------------------------------------------------------------------------------------------- safetensors


def every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.arange(12).reshape(3, 4)
    return {
        **{str(dtype): numbers.to(dtype) for dtype in tensor_files.DTYPES},
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "odd": torch.ones(5, dtype=torch.uint8),
        "strided": torch.arange(12.0).reshape(3, 4).t()[::2],
        "grad": torch.ones(2, requires_grad=True),
        'größe, "x"\n': torch.ones(1),
    }


def test_tensors_come_back_through_the_library_bit_for_bit(tmp_path):
    ours = every_dtype()
    tensor_files.atomic_save_tensors(tmp_path / "t.safetensors", ours, {"who": "ü"})
    with safetensors.safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"who": "ü"}
    theirs = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert theirs.keys() == ours.keys() and len(ours) >= 20
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape
        ours_bits, theirs_bits = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, theirs[name]))
        assert ours_bits.equal(theirs_bits), name


def test_the_file_is_the_one_the_library_writes(tmp_path):
    ours = {name: tensor.detach().contiguous() for name, tensor in every_dtype().items()}
    tensor_files.atomic_save_tensors(tmp_path / "ours", ours)
    safetensors.torch.save_file(ours, tmp_path / "theirs")
    ours_bytes, theirs_bytes = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    assert len(ours_bytes) == len(theirs_bytes)
    begin = 8 + int.from_bytes(ours_bytes[:8], "little")
    assert begin % 8 == 0 and ours_bytes[begin:].count(0) == theirs_bytes[begin:].count(0)


def test_the_dtypes_are_the_librarys():
    theirs, ours = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}, tensor_files.DTYPES
    assert {dtype: theirs[dtype] for dtype in ours} == ours and len(ours) >= 14


def test_a_dtype_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="x is torch"):
        tensor_files.atomic_save_tensors(tmp_path / "t", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert tree(tmp_path) == {}


def test_the_space_a_file_takes_is_known_before(tmp_path):
    tensor_files.atomic_save_tensors(tmp_path / "t", every_dtype())
    assert (tmp_path / "t").stat().st_size == tensor_files.file_bytes(every_dtype()) > 500


# --------------------------------------------------------------------------------------------------------- checksums


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_a_checksum_sees_the_bytes_and_not_their_parts(parts):
    assert checksums.checksum_bytes(*parts) == checksums.checksum_bytes(memoryview(b"".join(parts)))
    assert checksums.checksum_bytes(*parts) == xxhash.xxh3_128_hexdigest(b"".join(parts))
    assert checksums.checksum_bytes(*parts, b"x") != checksums.checksum_bytes(*parts)


@pytest.mark.parametrize("size", [0, 1, files.CHUNK - 1, files.CHUNK, 2 * files.CHUNK + 5])
def test_a_files_checksum_is_what_writing_it_returned(tmp_path, size):
    content = os.urandom(size)
    checksum = files.atomic_write_bytes(tmp_path / "f", content)
    assert checksum == checksums.checksum_file(tmp_path / "f") == checksums.checksum_bytes(content)
    tensors = {"x": torch.frombuffer(bytearray(content + b"!"), dtype=torch.uint8)}
    checksum = tensor_files.atomic_save_tensors(tmp_path / "t", tensors)
    assert checksum == checksums.checksum_file(tmp_path / "t") == tensor_files.weights_digest(tensors)


# ------------------------------------------------------------------------------------------ whole or absent, on errors


def write_file(folder: Path) -> None:
    files.atomic_write_bytes(folder / "a" / "b" / "f", b"new" * 100)


def write_tensors(folder: Path) -> None:
    tensor_files.atomic_save_tensors(folder / "t", {"x": torch.ones(64), "y": torch.ones(3)})


def write_folder(folder: Path) -> None:
    def fill(partial: Path) -> str:
        files.atomic_write_text(partial / "inner" / "f", "new")
        (partial / "by somebody else").write_text("new")
        return "marker"

    files.publish_dir(folder / "published", fill)


def before_nothing(folder: Path) -> None:
    (folder / "other").write_text("untouched")


def before_old(folder: Path) -> None:
    """What ``work`` will replace stands already."""
    before_nothing(folder)
    for name in ("a/b/f", "t", "published/f", f"published/{files.COMPLETE}"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")


@pytest.mark.parametrize("prepare", [before_nothing, before_old])
@pytest.mark.parametrize("work", [write_file, write_tensors, write_folder])
def test_whichever_call_fails_the_old_stands_and_nothing_is_left(tmp_path, work, prepare):
    failed = 0
    with disk() as whole:
        (tmp_path / "whole").mkdir()
        prepare(tmp_path / "whole")
        work(tmp_path / "whole")
    for number, call in enumerate(whole.calls):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder)
        before = tree(folder)
        code = ERRORS[number % len(ERRORS)]
        with pytest.raises(OSError) as caught, disk(fail_at=number, error=code):
            work(folder)
        assert caught.value.errno == code
        after = {name: content for name, content in tree(folder).items() if content != b"/" or name in before}
        # The rename of a single file cannot be taken back when the flush of its directory fails afterwards.
        flushed = number == len(whole.calls) - 1 and call == "_sync" and work is not write_folder
        assert after == before or flushed, (number, call)
        assert not list(folder.rglob("*.partial")), (number, call)
        work(folder)  # the next try succeeds
        assert tree(folder) == tree(tmp_path / "whole")
        failed += 1
    assert failed >= 5 and set(whole.calls) <= set(CALLS)


def test_the_failing_disk_can_fail(tmp_path):
    """The canary of the test above: a writer without the partial file leaves half a file behind."""

    def careless(folder: Path) -> None:
        descriptor = os.open(folder / "f", os.O_WRONLY | os.O_CREAT)
        files._write(descriptor, memoryview(b"new content"))
        os.close(descriptor)

    with pytest.raises(OSError), disk(fail_at=0):
        careless(tmp_path)
    assert tree(tmp_path) == {"f": b"new c"}


def test_nothing_writes_past_the_five_calls():
    """In the module itself the operating system is asked to change something only inside them."""

    assert not past_the_calls(inspect.getsource(files))
    assert past_the_calls("def f(path):\n    path.write_bytes(b'')") == ["f: write_bytes"]
    assert past_the_calls("def f(a, b):\n    os.replace(a, b)") == ["f: replace"]


def past_the_calls(text: str) -> list[str]:
    """Functions outside of ``CALLS`` that change the disk themselves; removing is allowed, it needs no room."""
    changing = {"replace", "rename", "fsync", "mkdir", "makedirs", "write_bytes", "write_text", "link", "symlink"}
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name not in CALLS:
            attributes = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            named = [function.attr for function in attributes if isinstance(function, ast.Attribute)]
            found += [f"{node.name}: {name}" for name in named if name in changing]
    return found


# -------------------------------------------------------------------------------------------------- surviving a crash


def recorded(work: Callable[[Path], None], folder: Path) -> list[str]:
    with disk() as seen:
        work(folder)
    return seen.calls


def test_what_has_a_name_is_on_the_disk_first(tmp_path):
    """Content is flushed before the rename, and the directory that holds the name after it."""
    assert recorded(lambda f: files.atomic_write_bytes(f / "f", b"x"), tmp_path) == [
        "_create", "_write", "_sync", "_rename", "_sync",
    ]  # fmt: skip
    calls = recorded(write_folder, tmp_path)
    # The two files and two directories that `fill` made, whoever wrote them; the marker; the name.
    marker_and_name = ["_create", "_write", "_sync", "_rename", "_sync", "_rename", "_sync"]
    assert calls[-11:] == ["_sync"] * 4 + marker_and_name


def test_a_file_system_that_cannot_flush_directories_is_no_error(tmp_path, monkeypatch):
    real = files._sync_path
    refused = []

    def picky(path: Path) -> None:
        if path.is_dir():
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        real(path)

    monkeypatch.setattr(files, "_sync_path", picky)
    write_folder(tmp_path)
    assert refused and files.is_complete(tmp_path / "published")


def test_a_directory_being_replaced_by_a_killed_writer_gets_its_name_back(tmp_path, monkeypatch):
    before_old(tmp_path)
    real, renamed = files._rename, []

    def killed(source: Path, target: Path) -> None:
        if target.name == "published" and not source.name.endswith(files._REPLACED):
            raise KeyboardInterrupt
        if source.name.endswith(files._REPLACED):
            raise KeyboardInterrupt  # dead: it does not clean up either
        renamed.append(target)
        real(source, target)

    monkeypatch.setattr(files, "_rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "published").exists()
    assert files.undo_interrupted(tmp_path) == [tmp_path / "published"]
    assert (tmp_path / "published" / "f").read_text() == "old" and files.is_complete(tmp_path / "published")
    assert files.undo_interrupted(tmp_path) == []


def test_a_replaced_directory_does_not_come_back_beside_its_successor(tmp_path):
    before_old(tmp_path)
    shutil.copytree(tmp_path / "published", tmp_path / f"published.0011aabb{files._REPLACED}")
    assert files.undo_interrupted(tmp_path) == []


def test_the_markers_text_is_what_fill_returned(tmp_path):
    write_folder(tmp_path)
    assert (tmp_path / "published" / files.COMPLETE).read_text() == "marker"
    files.publish_dir(tmp_path / "plain", lambda partial: None)
    assert (tmp_path / "plain" / files.COMPLETE).read_text() == "" and files.is_complete(tmp_path / "plain")


# -------------------------------------------------------------------------------------------------------------- space


def test_too_little_space_is_told_with_figures(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 5 * 2**20})
    asked = []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: (asked.append(path), usage)[1])
    where = tmp_path / "not" / "yet" / "there"
    files.require_space(where, 5 * 2**20, kind=CheckpointError, what="it", fix="")
    with pytest.raises(CheckpointError) as caught:
        files.require_space(where, 3 * 2**30, kind=CheckpointError, what="the checkpoint", fix="make room")
    assert caught.value.what == "the checkpoint needs 3.00 GiB and the disk has 5.000 MiB free"
    assert (caught.value.where, caught.value.fix) == (str(where), "make room") and asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(("size", "words"), [(0, "0.000 MiB"), (2**20, "1.000 MiB"), (2**30 // 5, "0.20 GiB")])
def test_sizes_for_people(size, words):
    assert files.human_size(size) == words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "df -i"), (errno.EDQUOT, "quotas of either"), (errno.EMFILE, "ulimit -n"),
        (errno.EROFS, "writable"), (errno.EIO, "the kernel's log"),
    ],
)  # fmt: skip
def test_the_fix_follows_the_error(code, words):
    assert words in files.disk_fix(OSError(code, ""))
