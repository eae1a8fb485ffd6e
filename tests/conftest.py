"""What many tests share: tiny models of every variant and a small world of clips, each made once per worker."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from launcher import Launcher

    from finetune.config.schema import RunConfig
    from finetune.trainers.loop import TrainReport

LONGEST = (
    "test_ui_browser",
    "test_quickstart",
    "test_overfit",
    "test_soak",
    "test_distributed",
    "test_signals",
    "test_faults_ranks",
    "test_export_matrix",
    "test_parallel",
    "test_deepspeed",
    "test_golden",
    "test_determinism",
    "test_cluster",
    "test_precompute",
    "test_cache_concurrency",
)

GPU_PIECES = {
    "techniques": r"test_(memory|release|streaming|adaln_offload)\.py",
    "kernels": r"test_(kernels|placement)\.py",
    "2b": r"full_size\[2b",
    "5b": r"full_size\[5b-lora",
    "5b-i2v": r"full_size\[5b-i2v",
    "encoders": "encoders",
    "deterministic": "deterministic",
    "fsdp2": r"strategies_on_one_gpu\[fsdp2-",
    "fsdp2-offload": r"strategies_on_one_gpu\[fsdp2_offload",
    "fsdp2-5b": "full_size_under_fsdp2",
    "zero2": r"strategies_on_one_gpu\[zero2",
    "zero3": r"strategies_on_one_gpu\[zero3-",
    "zero3-offload": r"strategies_on_one_gpu\[zero3_offload",
}
"""What ``--only`` takes beside regular expressions: pieces of ``pytest -m gpu``, each meant to fit ten minutes."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if torch.cuda.is_available():  # it is read once in a process, of which deterministic runs are not the first tests
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.set_num_threads(1)
gc.set_threshold(10_000, 10, 10)  # as a command does
# No power cut is tested, and a run of a second waits for the disk some forty times; a wrong descriptor stays an error.
os.fsync = os.fstat  # type: ignore[assignment]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only", default="", help=f"a piece of the GPU tests ({', '.join(GPU_PIECES)}), or a pattern")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; slow ones run when asked for by ``-m slow``; the longest go first.

    Tests that share what is costly to make go to the same worker (``--dist loadgroup``), so that it is made once.
    """
    only = config.getoption("--only")
    left_out = [item for item in items if not re.search(GPU_PIECES.get(only, only), item.nodeid)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # Begun last, a test of a minute keeps one worker busy while the other has nothing left.
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    asked = config.getoption("-m")
    for item in items:
        if group := shares(item):
            item.add_marker(pytest.mark.xdist_group(group))
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.timeout(600))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
        if "slow" in item.keywords and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def pytest_collection_finish() -> None:
    spare_libraries()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file of tests imported stays as well."""
    if nextitem is not None and nextitem.path != item.path:
        spare_libraries()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries in C++ complain at the end of what is left over


def spare_libraries() -> None:
    """Leave all objects of now out of garbage collections: each would walk the whole of the libraries for nothing."""
    gc.collect()
    gc.freeze()


def shares(item: pytest.Item) -> str:
    """The group of tests that one worker runs: those with the launcher's process, or a module's fixtures; or none."""
    if not isinstance(item, pytest.Function):
        return ""
    if "launcher" in item.fixturenames:
        return "launcher"
    made = (fixture for name in item.fixturenames for fixture in item._fixtureinfo.name2fixturedefs.get(name, ()))
    return item.path.stem if any(fixture.scope == "module" for fixture in made) else ""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model("5b-i2v")``: the folder of a tiny look-alike, built on first use."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    from finetune.testing.tiny import build_tiny

    assert CogVideoXPipeline and CogVideoXImageToVideoPipeline  # diffusers and transformers are loaded when used first
    spare_libraries()
    root, built = tmp_path_factory.mktemp("models"), {}

    def build(variant: str = "5b", **options: object) -> Path:
        name = "-".join([variant, *(f"{key}{value}" for key, value in sorted(options.items()))])
        if name not in built:
            built[name] = build_tiny(root / name, variant, **options)  # type: ignore[arg-type]
        return built[name]

    return build


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Runs jobs of several processes."""
    from launcher import Launcher

    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright's client; nothing is downloaded."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Playwright's client and a chromium in PATH (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def demo_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four demo clips (9x64x64, 8 fps) with ``metadata.jsonl``."""
    from finetune.testing.demo import Scene, write_clips

    folder = tmp_path_factory.mktemp("clips")
    scenes = [
        Scene("circle", "red", "left"),
        Scene("square", "blue", "up"),
        Scene("triangle", "green", "right"),
        Scene("ring", "yellow", "down"),
    ]
    write_clips(folder, scenes)
    return folder


@pytest.fixture(scope="session")
def encoded_cache(
    tiny_model: Callable[..., Path], demo_clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``encoded_cache("5b-i2v")``: a cache with the demo clips and a few prompts, filled on first use; copy it."""
    from worlds import run_config

    from finetune.caching.precompute import precompute

    root = tmp_path_factory.mktemp("encoded")

    def encode(variant: str = "5b", **cache: str) -> Path:
        output = root / "-".join([variant, *cache.values()]) / "run"
        if not output.parent.exists():
            prompts = ("a red circle", "a blue square", "a red circle moving left")
            samples = {"samples": [{"prompt": prompt} for prompt in prompts]} if "i2v" not in variant else {}
            precompute(
                run_config(tiny_model(variant), demo_clips, output, validation=samples, cache=cache), progress=False
            )
        return output.parent / "cache"

    return encode


@pytest.fixture
def tiny_run(
    tiny_model: Callable[..., Path], demo_clips: Path, encoded_cache: Callable[..., Path], tmp_path: Path
) -> Callable[..., RunConfig]:
    """``tiny_run("name", **changes)``: a run of four demo clips in ``tmp_path``; those of a test share one cache.

    ``changes`` are sections as ``run_values`` takes them; ``variant`` chooses another model than 5b.
    """
    from worlds import run_config

    def configure(name: str = "run", *, variant: str = "5b", **changes: Any) -> RunConfig:
        if not (tmp_path / "cache").exists():
            dtype = {key: value for key, value in changes.get("cache", {}).items() if key == "latents_dtype"}
            shutil.copytree(encoded_cache(variant, **dtype), tmp_path / "cache")
        return run_config(tiny_model(variant), demo_clips, tmp_path / name, **changes)

    return configure


@pytest.fixture
def train_tiny(tiny_run: Callable[..., RunConfig]) -> Callable[..., TrainReport]:
    """``train_tiny("name", **changes)``: the report of such a run, trained to its end."""
    from finetune.trainers.loop import train

    return lambda *names, **changes: train(tiny_run(*names, **changes))


@pytest.fixture(scope="session")
def calm_run(
    tiny_model: Callable[..., Path],
    demo_clips: Path,
    encoded_cache: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., TrainReport]:
    """``calm_run(**changes)``: the report of such a run that nothing disturbed, trained on first use."""
    from worlds import run_config

    from finetune.trainers.loop import train

    reports: dict[str, TrainReport] = {}

    def run(**changes: Any) -> TrainReport:
        key = repr(sorted(changes.items()))
        if key not in reports:
            folder = tmp_path_factory.mktemp("calm")
            shutil.copytree(encoded_cache(), folder / "cache")
            reports[key] = train(run_config(tiny_model(), demo_clips, folder / "run", **changes))
        return reports[key]

    return run


@pytest.fixture(scope="session")
def wide_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three demo clips cut to 9x32x64, another aspect ratio than ``demo_clips``."""
    from finetune.inference.videos import write_mp4
    from finetune.testing.demo import Scene, render

    folder = tmp_path_factory.mktemp("wide")
    for colour in ("red", "green", "blue"):
        scene = Scene("circle", colour, "left")
        write_mp4(folder / f"{colour}.mp4", render(scene)[:, 16:48], 8)
        (folder / f"{colour}.txt").write_text(scene.caption)
    return folder


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder of real clips, from FINETUNE_REAL_CLIPS; the test skips where there is none."""
    folder = os.environ.get("FINETUNE_REAL_CLIPS")
    if not folder:
        pytest.skip("FINETUNE_REAL_CLIPS names no folder of real clips")
    return Path(folder)


@pytest.fixture
def estimates_kept(tmp_path_factory, monkeypatch):
    """The planner's cache is in a folder that all tests share, those of other workers too."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture
def serve():
    """``serve(behave)``: an endpoint on this machine (``endpoint.Server``)."""
    from endpoint import Server

    servers = []

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
