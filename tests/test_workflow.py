"""From raw footage to a trained adapter, by the commands that each verb prints as the next."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from footage import encode, scene
from tiny_vlm import save_image_model
from worlds import saved_steps

from finetune.caching.request import require_manifest
from finetune.cli.app import OK, WARNED
from finetune.cli.main import main
from finetune.config.schema import load_config
from finetune.core.errors import DataError
from finetune.datasets.cache import Cache
from finetune.datasets.decode import probe_file
from finetune.datasets.geometry import seconds_of
from finetune.footage.ledger import read_rows

VIDEOS = (".mp4", ".mkv", ".avi")


@pytest.mark.parametrize("real", [False, True], ids=["made here", "real clips"])
def test_footage_becomes_a_trained_adapter(real, tiny_model, tmp_path, monkeypatch, capsys, request):
    raw, clips = tmp_path / "raw", tmp_path / "clips"
    if real:
        raw.mkdir()
        for video in list(videos(request.getfixturevalue("real_clips")))[::5]:
            shutil.copy(video, raw / f"real {video.name}")
    else:  # footage of every kind: test_prepare
        for number in range(5):
            encode(raw / f"day{number}" / "film.mp4", scene(number, 20))
        (raw / "page.mp4").write_text("<!doctype html><title>Log in</title>")
    model, captioner = tiny_model(), save_image_model(tmp_path / "vlm")
    monkeypatch.chdir(tmp_path)
    verbs: list[str] = []

    def typed(line: str, *words: str, codes: tuple[int, ...] = (OK,)) -> str:
        """The command that a command says is next."""
        program, verb, *rest = shlex.split(line)
        verbs.append(verb)
        code = main([verb, *rest, *words])
        assert program == "finetune" and code in codes, (code, capsys.readouterr().err)
        (following,) = re.findall(r"^next: (.*)$", capsys.readouterr().out, re.M)
        return following

    options = ("--model", str(model), "--frames", "9", "--limit", "min_short_side=64", "frozen_s=0.5")
    line = typed("finetune prepare raw --out clips --report", *options)
    spans = read_rows(clips / "ledger.jsonl")
    assert {span["source"] for span in spans} == {str(path.relative_to(raw)) for path in videos(raw)}
    assert sum(span["seconds"] for span in spans) == pytest.approx(sum(map(length_s, videos(raw))))
    kept = {span["clip"] for span in spans if span["outcome"] == "kept"}
    assert kept == {path.relative_to(clips).as_posix() for path in videos(clips)} and len(kept) >= (2 if real else 5)

    line = typed(line, "--model", str(captioner), "--frames", "4", "--side", "64", "--review", "captions.html")
    rows = read_rows(clips / "metadata.jsonl")
    assert {row["file_name"] for row in rows if row["caption"]} == kept

    line = typed(line)
    line = typed(line, codes=(OK, WARNED))  # a random model's captions differ between processors, and so their faults
    page = Path("doctor.html").read_text()
    assert not [name for name in kept if name not in page]

    line = typed(line)
    config = load_config(Path("run.yaml"))
    cache = Cache(config.cache.dir)
    manifest = require_manifest(config, cache)
    assert {Path(item.clip.partition("#")[0]).name for item in manifest.items} == {Path(name).name for name in kept}
    assert all(manifest.keys(kind) and manifest.keys(kind) <= cache.keys(kind) for kind in ("latents", "prompts"))

    typed(line, "--set", "train.steps=2", "validation.samples=[]")
    assert verbs == ["prepare", "caption", "init", "doctor", "precompute", "train"]
    assert saved_steps(tmp_path / "runs" / "run") == [2]


def videos(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix in VIDEOS)


def length_s(video: Path) -> float:
    try:
        return seconds_of(probe_file(video))
    except DataError:
        return 0.0
