"""Show that a change that only moves code moves no number: run two commits on the same inputs and compare the results.

    python scripts/equality.py REVISION [--block stock] [--plans] [--json FILE]

Both commits are driven through their command lines, in processes of their own, so that nothing here depends on where
code lies. Compared are loss curves, digests of trained weights, cache addresses and tensors, exported tensors, and with
``--plans`` the predicted peaks of every file in ``configs/``. The commit at hand then continues a run of ``REVISION``
from its cache and its checkpoint in mid-run, and has to end where that run ended. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VARIANTS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
RUNS = [(variant, "lora") for variant in VARIANTS] + [("2b", "full"), ("1.5-5b-i2v", "full")]
METHODS = {
    "lora": "method: {kind: lora, rank: 4, alpha: 8, targets: all-linear}\noptimizer: {kind: adamw, lr: 1.0e-2}",
    "full": "method: {kind: full}\noptimizer: {kind: adamw8bit, lr: 1.0e-3}",
}
CONFIG = """\
model: {{pretrained: {model}, dtype: fp32}}
data: {{sources: [{{path: {clips}}}], buckets: [9x64x64], fps: 8, holdout: 0.25, caption_dropout: 0.2}}
cache: {{dir: {cache}, decode_workers: 0, image_draws: 2}}
{method}
lr_schedule: {{kind: cosine, warmup_steps: 2, final: 0.1}}
train: {{steps: 6, batch_size: 2, accumulation: 2, max_grad_norm: 0.5, ema_decay: 0.9, seed: 7}}
validation: {{every: 3}}
checkpoint: {{every: 3}}
memory: {memory}
output_dir: {output}
"""
MEMORY = {"lora": "{{block: {block}, activations: host}}", "full": "{{}}"}
MAKE_INPUTS = """\
import sys
from pathlib import Path
{imports}
folder = Path(sys.argv[1])
for variant in {variants}:
    build_tiny(folder / variant, variant)
scenes = ("circle red left", "square blue up", "triangle green right", "ring yellow down")
write_clips(folder / "clips", [Scene(*scene.split()) for scene in scenes])
"""
Numbers = dict[str, Any]


def main() -> int:
    """Parse the command line, run both commits, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--block", choices=("lean", "stock"), default="lean", help="how a LoRA's blocks are computed")
    parser.add_argument("--plans", action="store_true", help="also the planner, some ten minutes for each commit")
    parser.add_argument("--json", type=Path, help="keep both sides' numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        before = scratch / "before"
        _git("worktree", "add", "--quiet", "--detach", str(before), args.revision)
        try:
            inputs = _make_inputs(before, scratch / "inputs")
            theirs = measure(before, inputs, scratch / "theirs", block=args.block, plans=args.plans)
            ours = measure(ROOT, inputs, scratch / "ours", block=args.block, plans=args.plans)
            ours["continued from the other's checkpoint"] = continued(inputs, scratch / "theirs")
            theirs["continued from the other's checkpoint"] = theirs["2b lora"]["weights"]
        finally:
            _git("worktree", "remove", "--force", str(before))
    if args.json is not None:
        args.json.write_text(json.dumps({"before": theirs, "after": ours}, indent=1))
    different = differences(theirs, ours)
    for line in different:
        print(f"differs: {line}")
    print(f"{_count(theirs)} numbers of {args.revision}, {len(different)} different here")
    return 1 if different else 0


def measure(checkout: Path, inputs: Path, scratch: Path, *, block: str, plans: bool) -> Numbers:
    """Everything one commit makes of the inputs, by name."""
    numbers: Numbers = {}
    for variant, method in RUNS:
        run = scratch / f"{variant}-{method}"
        config = write_config(inputs, scratch, variant, method, block)
        _finetune(checkout, "train", "--config", str(config))
        _finetune(checkout, "export", str(run))
        numbers[f"{variant} {method}"] = {
            "curves": _curves(run),
            "weights": _weights(run, 6),
            "export": _tensors(run / "export"),
        }
        print(f"{checkout.name}: {variant} {method}", file=sys.stderr, flush=True)
    numbers["cache"] = _tensors(scratch / "cache")
    for config in sorted((ROOT / "configs").glob("*.yaml")) if plans else ():
        planned = _finetune(checkout, "plan", "--config", str(config), "--json", home=scratch)
        numbers[f"plan {config.stem}"] = json.loads(planned)
        print(f"{checkout.name}: plan {config.stem}", file=sys.stderr, flush=True)
    return numbers


def continued(inputs: Path, scratch: Path) -> str:
    """Digest of the weights after the commit at hand has done the second half of the other's run."""
    run = scratch / "2b-lora"
    (run / "checkpoints" / "step-00000006").rename(scratch / "aside")
    _finetune(ROOT, "train", "--config", str(scratch / "2b-lora.yaml"), "--set", "cache.mode=require")
    return _weights(run, 6)


def write_config(inputs: Path, scratch: Path, variant: str, method: str, block: str) -> Path:
    """One run's YAML file; the run's folder lies beside it."""
    scratch.mkdir(exist_ok=True)
    output = scratch / f"{variant}-{method}"
    values = {"model": inputs / variant, "clips": inputs / "clips", "cache": scratch / "cache", "output": output}
    path = scratch / f"{output.name}.yaml"
    path.write_text(CONFIG.format(**values, method=METHODS[method], memory=MEMORY[method].format(block=block)))
    return path


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Where two trees of numbers differ, one line each."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = dict.fromkeys((*before, *after))
        prefix = f"{name} / " if name else ""
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{prefix}{key}")]
    return [] if before == after else [f"{name}: {before} before, {after} now"]


def _count(numbers: Any) -> int:
    return sum(map(_count, numbers.values())) if isinstance(numbers, Mapping) else 1


def _make_inputs(checkout: Path, folder: Path) -> Path:
    """Models and clips, made once: by the commit whose package says where their makers are."""
    moved = (checkout / "finetune" / "testing").is_dir()
    places = ("finetune.testing.demo", "finetune.testing.tiny") if moved else ("finetune.demo", "finetune.tiny")
    imports = f"from {places[0]} import Scene, write_clips\nfrom {places[1]} import build_tiny"
    code = MAKE_INPUTS.format(imports=imports, variants=VARIANTS)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=checkout, env=_environment(checkout))
    return folder


def _finetune(checkout: Path, *words: str, home: Path | None = None) -> str:
    """What a verb of this commit prints; plans kept by other commits are not seen."""
    environment = _environment(checkout) | ({} if home is None else {"XDG_CACHE_HOME": str(home / "kept")})
    command = [sys.executable, "-m", "finetune", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: finetune {' '.join(words)} ended with {done.returncode}\n{done.stderr}")
    return done.stdout


def _environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _git(*words: str) -> None:
    subprocess.run(["git", *words], check=True, cwd=ROOT)


def _weights(run: Path, step: int) -> str:
    state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    return str(state["state"]["weights"])


def _curves(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in sorted(tags)}


def _tensors(folder: Path) -> dict[str, str]:
    """Digest of every safetensors file below a folder, by its path: names, dtypes, shapes and bytes of its tensors."""
    import torch
    from safetensors import safe_open

    digests = {}
    for path in sorted(folder.rglob("*.safetensors")):
        digest = hashlib.blake2b(digest_size=16)
        with safe_open(path, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digests[path.relative_to(folder).as_posix()] = digest.hexdigest()
    if not digests:
        raise SystemExit(f"{folder} holds no tensors to compare")
    return digests


if __name__ == "__main__":
    sys.exit(main())
