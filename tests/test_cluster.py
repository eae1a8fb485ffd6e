"""The job script of docs/cluster.md, run as it stands: with two tasks, and stand-ins for what SLURM would do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from waiting import HANG_S
from worlds import run_values

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")

SRUN = """#!{python}
import os, subprocess, sys, time
words = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = []
for rank in range(2):
    place = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2")
    tasks.append(subprocess.Popen(words, env=os.environ | place))
with open({pids!r}, "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" >> {requeued}; else echo 127.0.0.1; fi
"""


def blocks() -> list[str]:
    return re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.M | re.S)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with stand-ins for srun and scontrol, as a job of two tasks on one node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "srun": SRUN.format(python=sys.executable, pids=str(tmp_path / "pids")),
        "scontrol": SCONTROL.format(requeued=tmp_path / "requeued"),
        "finetune": f'#!/bin/sh\nexec {sys.executable} -m finetune "$@"\n',
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node",
        "SLURM_CPUS_PER_TASK": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def test_the_scripts_are_shell():
    scripts = blocks()
    assert len(scripts) == 5 and scripts[0].startswith("#!/bin/bash\n#SBATCH")
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert subprocess.run(["bash", "-n"], input="if true", text=True, capture_output=True).returncode != 0


def requeued(script: str, tmp_path: Path, slurm: dict[str, str], code: int) -> bool:
    """Whether the job is requeued whose training ends with ``code``."""
    (tmp_path / "bin" / "finetune").write_text(f"#!/bin/sh\nexit {code}\n")
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=slurm, capture_output=True, timeout=60)
    assert ended.returncode == code, ended.stderr.decode()
    return (tmp_path / "requeued").is_file()


@pytest.mark.parametrize("code", [0, 1, 2, 75, 143])
def test_a_preempted_job_alone_is_requeued(code, tmp_path, slurm):
    assert requeued(blocks()[0], tmp_path, slurm, code) is (code == 75)


def test_a_script_that_requeues_nothing_is_noticed(tmp_path, slurm):
    """Canary: the stand-ins do not requeue by themselves, and 75 reaches the script."""
    script = "".join(line for line in blocks()[0].splitlines(keepends=True) if "requeue" not in line)
    assert script != blocks()[0] and not requeued(script, tmp_path, slurm, 75)


@pytest.mark.slow
def test_a_job_that_is_preempted_is_requeued_and_goes_on(tiny_model, demo_clips, tmp_path, slurm):
    values = run_values(tiny_model(), demo_clips, tmp_path / "run", train={"steps": 400})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    script, precompute = blocks()[0], blocks()[2]
    assert "finetune precompute" in precompute

    def job(text: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", text], cwd=tmp_path, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    # The block stands alone on the page; in a job the addresses come from the lines of the script.
    addresses = "export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))\n"
    encoding = job(addresses + precompute)
    said, _ = encoding.communicate(timeout=HANG_S)
    assert encoding.returncode == 0 and "encoded" in said, said

    first = job(script)
    assert first.stdout is not None
    lines = []
    for line in first.stdout:
        lines.append(line)
        if re.match(r"step +1/", line):
            break
    else:
        raise AssertionError("".join(lines))
    time.sleep(0.5)
    for pid in (tmp_path / "pids").read_text().split():  # SLURM signals the tasks, not the script
        os.kill(int(pid), signal.SIGUSR1)
    rest, _ = first.communicate(timeout=HANG_S)
    assert first.returncode == 75, "".join(lines) + rest
    assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]
    (stopped,) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert (stopped / "trainable").is_dir() and stopped.name != "step-00000400"

    again = job(script)
    said, _ = again.communicate(timeout=HANG_S)
    assert again.returncode == 0, said
    assert f"continuing after {int(stopped.name[5:])} from" in said
    assert (tmp_path / "run" / "checkpoints" / "step-00000400").is_dir()
