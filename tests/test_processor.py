"""How often things are done that cost processor time; ``benchmarks/processor.py`` measures what they cost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from finetune.core.collector import collector_paused
from finetune.core.rng import seed_global
from finetune.core.types import Bucket
from finetune.datasets import decode
from finetune.datasets.schedule import Item, StepPlan
from finetune.testing.demo import Scene, write_clips

ROOT = Path(__file__).parents[1]


def test_a_header_is_read_in_one_opening(tmp_path, monkeypatch):
    write_clips(tmp_path, [Scene("circle", "red", "left")])
    (video,) = tmp_path.rglob("*.mp4")
    index, real, openings = decode.read_index(video), av.open, []
    monkeypatch.setattr(av, "open", lambda *args, **options: (openings.append(args), real(*args, **options))[1])
    probe = decode.probe_file(video)
    assert len(openings) == 1
    assert list(probe.frame_times_s) == [(pts - index.pts[0]) * index.time_base for pts in index.pts]


def test_a_seed_gives_the_numbers_of_manual_seed():
    torch.manual_seed(7 << 40)
    theirs = torch.rand(5)
    seed_global(7 << 40, torch.device("cpu"))
    assert torch.equal(torch.rand(5), theirs)


def test_cycles_are_looked_for_again_whatever_ends_the_pause():
    with pytest.raises(KeyError), collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled(), "a pause in a pause does not end it"
        raise KeyError
    assert gc.isenabled()


ENDING = """
import atexit, gc, os, sys
import finetune.cli.main as cli
def main(argv):
    atexit.register(print, "at exit")
    print(argv, gc.get_threshold()[0])
    return 75
leave = os._exit
cli.main, os._exit = main, lambda code: (print("left"), sys.stdout.flush(), leave(code))
cli.program(["train"])
"""


def test_a_program_ends_with_its_code_when_all_is_done_that_waits_for_its_end(tmp_path):
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "['train'] 10000\nat exit\nleft\n"), done.stderr


@pytest.mark.parametrize("program", ["-m finetune doctor", "train.py"])
def test_every_program_ends_so(program, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; leave = os._exit; os._exit = lambda code: leave(code + 1)")
    command = [sys.executable, *program.split(), "--config", str(tmp_path / "nowhere.yaml")]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}).returncode == 3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_epoch_is_cut_into_batches_of_one_bucket_each(batch_size):
    """Each batch is cut out when its step comes: no clip is left out, none stands twice."""
    buckets = [Bucket(9, 64, 64), Bucket(9, 32, 64)]
    plan = StepPlan(tuple(Item(buckets[number % 5 == 0], 1.0) for number in range(23)), 7, batch_size, 1)
    batches = [micro.items for step in range(plan.start_of(1)) for micro in plan.step(step)]
    assert sorted(clip for batch in batches for clip in batch) == list(range(23))
    assert all(len({plan.items[clip].bucket for clip in batch}) == 1 for batch in batches)
    assert sum(len(batch) < batch_size for batch in batches) <= 2
