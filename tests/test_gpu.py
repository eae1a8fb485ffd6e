"""The real trainer at full size, with random weights made on the device from the models' configurations.

Memory and speed are real, quality is not. ``make test-gpu`` prints peak GiB and s/step; with FINETUNE_GPU_RESULTS=FILE
the rows are kept as JSON, each as soon as it is there. All of it takes longer than ten minutes; ``ONLY=5b make
test-gpu`` is a piece of it (``conftest.GPU_PIECES``, ``benchmarks/README.md``). Nothing here needs PyAV or
``datasets``. The same path runs at tiny size on the CPU first (``test_the_path_on_a_cpu``), so that the time on a GPU
is not spent on its mistakes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GPU_PIECES
from worlds import fabricate_cache, run_config

from finetune import export
from finetune.checkpoint.load import load_checkpoint
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.trainers.loop import train

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from record import Record, versions  # noqa: E402

LORA = {"kind": "lora", "rank": 128, "alpha": 64}
FULL = {"kind": "full"}


class Shown(Record):
    def add(self, row: dict[str, object]) -> None:
        super().add(row)
        shown = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in row.items()}
        print(*(f"{name} {value}" for name, value in shown.items()), sep="  ")


@pytest.fixture(scope="module")
def results() -> Shown:
    """Rows as they come: printed, and on request kept."""
    target = os.environ.get("FINETUNE_GPU_RESULTS")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return Shown(Path(target) if target else None, device, key="case")


def random_model(variant: str, folder: Path, device: torch.device) -> Path:
    """A folder with a full-size transformer of random bf16 weights, and the other components' configurations."""
    from diffusers import CogVideoXTransformer3DModel

    shutil.copytree(known_model(variant), folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = CogVideoXTransformer3DModel.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


def drive(
    model: Path, output: Path, bucket: str, method: dict[str, object], optimizer: str = "adamw8bit"
) -> dict[str, object]:
    """Train two steps, resume for two more, export; what it took."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def config(steps: int):
        return run_config(
            model,
            output / "no-videos-here",
            output / "run",
            data={"sources": [{"path": str(output / "no-videos-here")}], "buckets": [bucket]},
            cache={"mode": "require"},
            method=method,
            optimizer={"kind": optimizer, "lr": 1e-4},
            train={"steps": steps},
        )

    fabricate_cache(config(2))
    first = train(config(2))
    assert first.step == 2
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    second = train(config(5))
    assert second.step == 5
    torch.cuda.empty_cache() if torch.cuda.is_available() else None
    begun = time.perf_counter()
    exported = export(output / "run", output / "export")
    assert exported.max_abs_diff <= exported.tolerance
    return {
        "peak_gib": second.peak_gib,
        "s_per_step": second.s_per_step or 0.0,
        "export_s": time.perf_counter() - begun,
        "export_max_abs_diff": exported.max_abs_diff,
    }


@pytest.mark.parametrize("method", [LORA | {"rank": 4}, FULL], ids=["lora", "full"])
def test_the_path_on_a_cpu(tiny_model, tmp_path, method):
    row = drive(tiny_model("5b-i2v"), tmp_path, "9x64x64", method)
    assert row["peak_gib"] > 0


def test_training_from_a_complete_cache_imports_no_decoder(tiny_model, tmp_path):
    config = run_config(
        tiny_model(),
        tmp_path / "no-videos-here",
        tmp_path / "run",
        cache={"mode": "require"},
        tracking={"kind": "tensorboard"},
        train={"steps": 1},
    )
    fabricate_cache(config)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    script = f"""
import sys
for name in ("av", "datasets", "imageio", "imageio_ffmpeg"):
    sys.modules[name] = None  # as if it were not installed
from finetune import load_config, train
try:
    import av
except ModuleNotFoundError:
    print("blocked")
print("steps", train(load_config({str(tmp_path / "run.yaml")!r})).step)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "blocked" in finished.stdout and "steps 1" in finished.stdout


def test_rows_are_kept_as_they_come_and_pieces_fill_one_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    for piece in (["a", "b"], ["b", "c"]):
        record = Record(path, "a card", key="case")
        for case in piece:
            record.add({"case": case, "of": piece})
            found = json.loads(path.read_text())
            assert torch.__version__.startswith(found["versions"]["torch"])
            assert case in [row["case"] for row in found["rows"]]
    assert [(row["case"], row["of"][0]) for row in found["rows"]] == [("a", "a"), ("b", "b"), ("c", "b")]
    Record(path, "another card", key="case").add({"case": "a"})
    assert json.loads(path.read_text())["rows"] == [{"case": "a"}]  # rows of another machine do not stand beside ours
    path.write_text("{ cut off")
    assert Record(path, "a card", key="case").about["device"] == "a card"
    Record(None, "a card", key="case").add({"case": "a"})


def test_a_package_without_metadata_has_no_version():
    assert versions(["torch", "no-such-package"])["no-such-package"] is None


def test_every_gpu_test_is_in_one_piece(request):
    """Of those collected: all, where the whole suite runs."""
    tests = [item.nodeid for item in request.session.items if "gpu" in item.keywords]
    if len(tests) < 20:
        pytest.skip("the GPU tests were not collected")
    for test in tests:
        assert len([name for name, piece in GPU_PIECES.items() if re.search(piece, test)]) == 1, test
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in GPU_PIECES if f"| `{name}` |" not in readme] == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant,method",
    [("2b", LORA), ("5b", LORA), ("5b-i2v", LORA), ("2b", FULL)],
    ids=["2b-lora", "5b-lora", "5b-i2v-lora", "2b-full"],
)
def test_full_size(tmp_path, results, variant, method):
    model = random_model(variant, tmp_path / "model", torch.device("cuda"))
    try:
        row = drive(model, tmp_path, "49x480x720", method)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)  # tens of GB each
    results.add({"case": f"{variant} {method['kind']} 49x480x720"} | row)
    assert row["peak_gib"] < 80


STRATEGIES = {
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "fsdp2_offload": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "zero3_offload": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    },
}


def in_a_process(run_yaml: Path, strategy: str) -> None:
    """``finetune train`` under a strategy that shards, in a process of its own: DeepSpeed can be set up only once."""
    command = [sys.executable, "-m", "finetune", "train", "--config", str(run_yaml)]
    finished = subprocess.run(
        command, env=os.environ | STRATEGIES.get(strategy, {}), capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("method", [LORA | {"rank": 4}, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharding_strategies_on_one_gpu(tiny_model, tmp_path, strategy, method):
    """A group of one over NCCL: two steps, two more after a resume, and an export, against a plain run."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    saved = {}
    for name in (strategy, "plain"):
        for steps in (2, 4):
            config = run_config(
                tiny_model("5b"),
                tmp_path / "no-videos-here",
                tmp_path / name,
                cache={"mode": "require"},
                method=method,
                train={"steps": steps, "accumulation": 2},
            )
            fabricate_cache(config)
            run_yaml = tmp_path / f"{name}.yaml"
            run_yaml.write_text(config.to_yaml())
            in_a_process(run_yaml, name)
        saved[name] = load_checkpoint(tmp_path / name / "checkpoints" / "step-00000004").trainable
    for key, theirs in saved["plain"].items():
        torch.testing.assert_close(saved[strategy][key], theirs, rtol=1e-3, atol=1e-5, msg=key)
    exported = export(tmp_path / strategy, tmp_path / "export")
    assert exported.max_abs_diff <= exported.tolerance


@pytest.mark.gpu
def test_full_size_under_fsdp2(tmp_path, results, monkeypatch):
    """What gathering costs where there is nobody to gather from: 5B LoRA, to compare with the row of ``5b-lora``."""
    for name, value in STRATEGIES["fsdp2"].items():
        monkeypatch.setenv(name, value)
    model = random_model("5b", tmp_path / "model", torch.device("cuda"))
    try:
        row = drive(model, tmp_path, "49x480x720", LORA, optimizer="adamw")
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    results.add({"case": "5b lora 49x480x720 fsdp2 x1"} | row)
    assert row["peak_gib"] < 80


def weights_of_runs(model: Path, root: Path, method: dict[str, object], *, deterministic: bool) -> list[str]:
    """Digests of the weights after the same three steps, twice."""
    digests = []
    for number in range(2):
        config = run_config(
            model,
            root / "no-videos-here",
            root / f"run-{number}-{deterministic}",
            data={"sources": [{"path": str(root / "no-videos-here")}], "buckets": ["9x64x64"]},
            cache={"mode": "require"},
            method=method,
            optimizer={"kind": "adamw8bit", "lr": 1e-3},
            train={"steps": 3, "deterministic": deterministic},
        )
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
        fabricate_cache(config)
        digests.append(train(config).weights)
    return digests


def test_the_comparison_of_weights_on_a_cpu(tiny_model, tmp_path):
    first, second = weights_of_runs(tiny_model(), tmp_path, FULL, deterministic=True)
    assert first == second and len(first) == 32


@pytest.mark.gpu
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("variant", ["2b", "5b-i2v"])
def test_deterministic_kernels_repeat_bit_for_bit(tiny_model, tmp_path, results, variant, method):
    """Wide heads, so that the attention kernels are those of the published models; without the mode, for the record."""
    model = tiny_model(variant, num_attention_heads=8, attention_head_dim=64)
    settled = weights_of_runs(model, tmp_path, method, deterministic=True)
    open_ended = weights_of_runs(model, tmp_path, method, deterministic=False)
    results.add(
        {
            "case": f"repeatable {variant} {method['kind']}",
            "deterministic": settled[0] == settled[1],
            "by_default": open_ended[0] == open_ended[1],
        }
    )
    assert settled[0] == settled[1]


@pytest.mark.gpu
def test_deterministic_kernels_at_full_size(tmp_path, results):
    """Two steps of the 2B model at its native size, twice: the same weights, and what it costs."""
    model = random_model("2b", tmp_path / "model", torch.device("cuda"))
    digests: dict[bool, list[str]] = {True: [], False: []}
    seconds: dict[bool, float] = {}
    try:
        for deterministic in (True, False):
            for number in range(2):
                config = run_config(
                    model,
                    tmp_path / "no-videos-here",
                    tmp_path / f"run-{number}-{deterministic}",
                    data={"sources": [{"path": str(tmp_path / "no-videos-here")}], "buckets": ["49x480x720"]},
                    cache={"mode": "require"},
                    method=LORA,
                    train={"steps": 3, "deterministic": deterministic},
                )
                fabricate_cache(config)
                report = train(config)
                digests[deterministic].append(report.weights)
                seconds[deterministic] = report.s_per_step or 0.0
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    results.add(
        {
            "case": "repeatable 2b lora 49x480x720",
            "by_default": len(set(digests[False])) == 1,
            "s_per_step": seconds[False],
            "s_per_step_deterministic": seconds[True],
        }
    )
    assert len(set(digests[True])) == 1


@pytest.mark.gpu
def test_encoders_at_full_size(results):
    """One 49x480x720 clip through the VAE, untiled, and one caption through T5 v1.1 XXL."""
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5Config, T5EncoderModel

    from finetune.cogvideox.encode import encode_prompts, encode_video
    from finetune.testing.tiny import tiny_text

    folder = known_model("5b")
    spec = read_spec(str(folder))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            vae = AutoencoderKLCogVideoX.from_config(json.loads((folder / "vae" / "config.json").read_text())).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    pixels = torch.randint(0, 256, (1, 3, 49, 480, 720), dtype=torch.uint8)

    def timed(name, work):
        work()  # warm-up
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        row = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "s": time.perf_counter() - begun}
        results.add({"case": name} | row)
        return result

    with torch.no_grad():
        mean, std = timed("vae encode 49x480x720", lambda: encode_video(vae, pixels))
    assert mean.shape == std.shape == (1, 16, 13, 60, 90)
    vae.cpu()
    torch.cuda.empty_cache()

    config = T5Config(**json.loads((folder / "text_encoder" / "config.json").read_text()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            encoder = T5EncoderModel(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    backend = tiny_text()[0].backend_tokenizer
    with torch.no_grad():
        embeds = timed("t5 encode 1 caption", lambda: encode_prompts(backend, encoder, ["a red circle"], spec))
    assert embeds.shape == (1, 226, 4096)
