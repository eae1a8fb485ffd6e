"""What is published: distributions are built, and the wheel is installed and used where no checkout is in sight."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

import finetune

ROOT = Path(finetune.__file__).parent.parent
DEVELOPMENT = {
    "build",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "playwright",
    "zensical",
}
Command = Callable[..., str]


def release_script() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_files() -> set[str]:
    files = [path for path in (ROOT / "finetune").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as a release is, by way of the source distribution, from a copy of this checkout."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "finetune", tree / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    source, built = sorted(release_script().build(tree, out), key=lambda path: path.suffix)
    assert source.suffix == ".gz" and built.suffix == ".whl"
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Command:
    """Runs a program of an environment that holds the wheel, and this one's libraries after it; what it printed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    ours = ("PYTHONPATH", "FINETUNE_", "VIRTUAL_ENV")  # by the first, pip would find it installed in the checkout
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, env=environment)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Folders in a .pth file come after the environment's own, and editable installs in them are not heeded.
    (packages / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    environment |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(program: str, *words: str, cwd: Path) -> str:
        command = [str(python.with_name(program)), *words]
        done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def extras_fault(text: str, extras: set[str]) -> set[str]:
    """The extras that a text names and that do not exist."""
    named = re.findall(r"cogvideox-finetune\[([\w,]+)\]", text)
    return {name for names in named for name in names.split(",")} - extras


def test_the_wheel_holds_the_package_and_works_away_from_the_checkout(wheel, installed, demo_clips, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    assert {"finetune/py.typed", "finetune/templates/page.html", "finetune/assets/models/5b/model_index.json"} < names
    assert "finetune/assets/demo/transformer/diffusion_pytorch_model.safetensors" in names
    metadata = metadata_of(wheel)
    assert metadata["Version"] == finetune.__version__ and metadata["License-Expression"] == "Apache-2.0"
    needed = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch", "diffusers", "typer"} <= needed and not needed & DEVELOPMENT
    extras = set(metadata.get_all("Provides-Extra"))
    texts = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("finetune/*/*.py"), *ROOT.glob("docs/*.md")]]
    assert sum("cogvideox-finetune[" in text for text in texts) >= 8
    assert extras_fault("".join(texts), extras) == set()
    assert extras_fault("pip install 'cogvideox-finetune[plot,plto]'", extras) == {"plto"}  # canary

    assert installed("finetune", "--version", cwd=tmp_path) == f"finetune {finetune.__version__}\n"
    place = installed("python", "-c", "import finetune; print(finetune.__file__)", cwd=tmp_path)
    assert "/venv/lib/" in place and str(ROOT) not in place
    shutil.copytree(demo_clips, tmp_path / "clips")
    installed("finetune", "init", "--model", "5b", "--data", "clips", "--output", "run.yaml", cwd=tmp_path)
    overrides = ("--set", "data.buckets=[9x64x64]", "cache.decode_workers=0")
    assert "4 clips from 4 videos" in installed("finetune", "check", "--config", "run.yaml", *overrides, cwd=tmp_path)


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel(installed, tmp_path):
    printed = installed("finetune", "quickstart", "--output", "first", cwd=tmp_path)
    assert "What changed" in printed
    assert (tmp_path / "first" / "before_and_after.png").is_file() and (tmp_path / "first/run/report.html").is_file()
    # train.py is for clones; this is what starts several processes elsewhere. The run is finished, and says so.
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "finetune", "train")
    installed("python", *launch, "--config", "first/run.yaml", cwd=tmp_path)


# ------------------------------------------------------------------------------------------------------------ releases


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small repository that can be released as 1.2.0."""
    root = tmp_path / "checkout"
    (root / "finetune").mkdir(parents=True)
    (root / "finetune" / "__init__.py").write_text('"""A package."""\n\n__version__ = "1.2.0"\n')
    (root / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.0\n\nNew.\n\n## 1.1.0\n")
    git(root, "init", "--quiet")
    commit(root)
    return root


def git(root: Path, *words: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(root), *author, *words], check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "x")


@pytest.mark.parametrize(
    ("headings", "uncommitted", "tag", "said"),
    [
        ("## 1.2.0\n", False, "v1.1.0", None),
        ("## Unreleased\n\n## 1.2.0\n", False, "v1.1.0", "begins with Unreleased"),
        ("", False, "v1.1.0", "begins with nothing"),
        ("## 1.2.0\n", True, "v1.1.0", "not as committed: new.py (1 in all)"),
        ("## 1.2.0\n", False, "v1.2.0", "v1.2.0 is tagged already"),
    ],
)
def test_what_does_not_fit_together_is_not_released(checkout, headings, uncommitted, tag, said):
    (checkout / "CHANGELOG.md").write_text(f"# Changes\n\n{headings}")
    (checkout / "x").touch()
    commit(checkout)
    git(checkout, "tag", tag)
    if uncommitted:
        (checkout / "new.py").touch()
    faults = release_script().faults(checkout)
    assert len(faults) == (said is not None) and (said is None or said in faults[0])


# --------------------------------------------------------------------------------------------------- files for others


def test_an_image_copies_what_there_is_and_what_docker_is_given():
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    sources = {name for names in copied for name in names.split()}
    given = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M))
    assert len(sources) >= 6 and all((ROOT / name).exists() for name in sources)
    assert {name.split("/")[0] for name in sources} == given


def test_issue_forms_and_the_citation_have_what_their_readers_require():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert {path.stem for path in forms} == {"bug", "question"}
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert form["name"] and form["description"] and all(field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)
        assert "finetune --version" in str(fields)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation, "it stands in finetune.__version__ alone"
