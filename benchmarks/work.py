"""The work of one training step, counted on fake tensors: models x methods x memory states, beside the stock recipe.

    python benchmarks/work.py [--only NAME ...] [--output benchmarks/results/work.json] [--page]

Nothing is measured here: products, bytes, kernels and waits are counted as the step dispatches them, per block (two
models of one and two blocks, subtracted) and per step. ``u`` is the token stream of a block in bf16, text and video.
With ``--page`` the table and the picture of ``docs/performance.md`` are written from the file of results.

The stock recipe is what a user of diffusers and peft writes: autocast to bf16 over float32 adapters, gradient
checkpointing of every block. CUDA's autocast runs LayerNorm in float32, which the CPU's does not, so it is made to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from finetune.cogvideox.load import empty_transformer
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.objective import velocity_losses
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.schema import RunConfig
from finetune.planner.cost_model import BACKWARD_ATTENTION, DEFAULTS
from finetune.planner.fake_run import TrackedTraining, fake_batches, fake_world
from finetune.planner.step_time import BLOCK_WORK, REFERENCES, BlockUnits, step_cost
from finetune.planner.work_counter import Work, WorkCounter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "work.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "work.png"
WORK = "<!-- work: written by benchmarks/work.py --page -->", "<!-- /work -->"
SECONDS = "<!-- seconds: written by benchmarks/work.py --page -->", "<!-- /seconds -->"
SUMMED, OTHERS = "H100", ("A100", "4090", "3090")
"""The card whose seconds are shown as a sum, and others."""

STATES: dict[str, dict[str, Any]] = {
    "nothing recomputed": {"checkpointing": "none"},
    "stock block": {"checkpointing": "full"},
    "lean": {"checkpointing": "full", "block": "lean"},
    "lean, attention kept": {"checkpointing": "selective", "block": "lean"},
}

CASES = {
    f"{model} {method}, {name}": (model, method, state)
    for model in ("2b", "5b", "5b-i2v", "1.5-5b")
    for method in ("lora", "full")
    for name, state in STATES.items()
}

STOCK = {f"{model} lora, stock recipe": model for model in ("2b", "5b", "5b-i2v", "1.5-5b")}

ORDER = sorted(
    [*STOCK, *CASES], key=lambda name: (("2b", "5b", "5b-i2v", "1.5-5b").index(name.split()[0]), "full" in name)
)


def run_config(model: str, method: str, state: Mapping[str, Any]) -> tuple[RunConfig, ModelSpec]:
    """A run at the model's own size, one clip a step."""
    folder = known_model(model)
    spec = read_spec(str(folder))
    kind = {"kind": "lora", "rank": 128, "alpha": 64} if method == "lora" else {"kind": "full"}
    values = {
        "model": {"pretrained": str(folder), "dtype": "bf16"},
        "data": {"sources": [{"path": "clips"}], "buckets": [str(spec.training_bucket)]},
        "method": kind,
        "optimizer": {"kind": "adamw8bit"},
        "train": {"steps": 1},
        "memory": dict(state),
        "output_dir": "run",
    }
    return RunConfig.from_dict(values, base=ROOT), spec


def step_works(config: RunConfig, spec: ModelSpec, layers: int) -> dict[str, Work]:
    """One step of this package's own code with so many blocks, by pass."""
    folder = Path(config.model.pretrained)
    with fake_world() as tracker:
        transformer = empty_transformer(folder, dtype=torch.bfloat16, layers=layers)
        training = TrackedTraining(tracker, spec, config, transformer, torch.bfloat16)
        batches = fake_batches(spec, config, spec.training_bucket, torch.bfloat16)
        with WorkCounter(lambda: PASSES.get(tracker.where.partition(",")[0], "update")) as counter:
            training.step(batches)
        return {name: counter.works.get(name, Work()) for name in ("forward", "backward", "update")}


def stock_work(model: str, layers: int) -> Work:
    """One step of the stock recipe with so many blocks."""
    from peft import LoraConfig

    config, spec = run_config(model, "lora", {})
    with fake_world():
        transformer = empty_transformer(Path(config.model.pretrained), dtype=torch.bfloat16, layers=layers)
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=128, lora_alpha=64, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        transformer.enable_gradient_checkpointing()
        transformer.train()
        alpha_bar = torch.linspace(0.999, 0.0, spec.num_train_timesteps)
        (batch,) = fake_batches(spec, config, spec.training_bucket, torch.bfloat16)
        optimizer = torch.optim.AdamW(trained, fused=False, foreach=False)
        with WorkCounter() as counter, _autocast_as_on_cuda():
            velocity_losses(transformer, spec, alpha_bar, batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return counter.work


@contextmanager
def _autocast_as_on_cuda() -> Iterator[None]:
    layer_norm = functional.layer_norm

    def in_float32(input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        wide = [None if tensor is None else tensor.float() for tensor in (input, weight, bias)]
        with torch.autocast("cpu", enabled=False):
            return layer_norm(wide[0], shape, wide[1], wide[2], eps)

    functional.layer_norm = in_float32
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        functional.layer_norm = layer_norm


PASSES = {"forward": "forward", "backward": "backward"}
"""What the tracker calls the passes of a step; all else is the update's."""


def per_block(one: Work, two: Work, layers: int) -> tuple[Work, Work]:
    """Work of a block, and of a step of the whole model."""
    block = two - one
    return block, one + block * (layers - 1)


def stream_bytes(spec: ModelSpec) -> int:
    """``u``: both token streams of one clip, in bf16."""
    tokens = spec.max_text_seq_length + spec.tokens(spec.training_bucket)
    return tokens * spec.num_attention_heads * spec.attention_head_dim * 2


def row(spec: ModelSpec, block: Work, step: Work) -> dict[str, Any]:
    """What is written down of a case."""
    u = stream_bytes(spec)
    top = sorted(block.names.items(), key=lambda item: -item[1])[:12]
    return {
        "u_mib": round(u / 2**20, 1),
        "block": {
            "tflop": {dtype: round(flops / 1e12, 3) for dtype, flops in sorted(block.flops.items()) if flops},
            "attention_tflop": round(block.attention_flops / 1e12, 3),
            "elementwise_u": round(block.elementwise_bytes / u, 1),
            "product_u": round(block.product_bytes / u, 1),
            "kernels": round(block.kernels),
            "most_often": {name: round(count) for name, count in top if count},
        },
        "step": {
            "tflop": {dtype: round(flops / 1e12, 1) for dtype, flops in sorted(step.flops.items()) if flops},
            "attention_tflop": round(step.attention_flops / 1e12, 1),
            "elementwise_gib": round(step.elementwise_bytes / 2**30, 1),
            "kernels": round(step.kernels),
            "waits": round(step.waits),
        },
    }


def count(name: str) -> dict[str, Any]:
    """One case."""
    if name in STOCK:
        spec = read_spec(str(known_model(STOCK[name])))
        works = [stock_work(STOCK[name], layers) for layers in (1, 2)]
        return row(spec, *per_block(works[0], works[1], spec.num_layers))
    model, method, state = CASES[name]
    config, spec = run_config(model, method, state)
    one, two = (step_works(config, spec, layers) for layers in (1, 2))
    both = [per_block(one[each], two[each], spec.num_layers) for each in one]
    block, step = (sum(works, Work()) for works in zip(*both, strict=True))
    passes = {each: in_units(config, spec, work) for each, (work, _) in zip(one, both, strict=True)}
    return row(spec, block, step) | {"passes": passes}


def in_units(config: RunConfig, spec: ModelSpec, block: Work) -> dict[str, float]:
    """A block's work in one pass of a step, in the units of ``planner.cost_model``: so it holds for other sizes."""
    unit = BlockUnits.of(config, spec)
    forward = block.attention_flops - block.attention_backward_flops
    values = {
        "linear": (sum(block.flops.values()) - block.thin_flops) / unit.linear,
        "thin": block.thin_flops / unit.adapters if unit.adapters else 0.0,
        "thin_u": block.thin_bytes / unit.adapter_bytes if unit.adapter_bytes else 0.0,
        "attention": forward / unit.attention,
        "attention_backward": block.attention_backward_flops / (BACKWARD_ATTENTION * unit.attention),
        "elementwise_u": block.elementwise_bytes / unit.token_bytes,
        "kernels": block.kernels,
        "tokens": unit.tokens,
    }
    return {name: round(value, 3) for name, value in values.items()}


def write_units(rows: Mapping[str, Any]) -> None:
    """Put what the planner's seconds are made of into the package."""
    kept = {name: rows[name]["passes"] for name in rows if "passes" in rows[name] and name.split()[0] in REFERENCES}
    table = {name: passes for name, passes in kept.items() if "attention kept" not in name}
    BLOCK_WORK.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def table(rows: Mapping[str, Any]) -> str:
    """The table of the page."""
    head = (
        "| case | TFLOP a step | of it fp32 products | elementwise, u a block | products, u a block"
        " | kernels a block | kernels a step | waits a step |\n|---|---|---|---|---|---|---|---|"
    )
    lines = [head]
    for name, case in rows.items():
        block, step = case["block"], case["step"]
        total = sum(step["tflop"].values()) + step["attention_tflop"]
        lines.append(
            f"| {name} | {total:,.0f} | {step['tflop'].get('float32', 0):.1f} | {block['elementwise_u']:.0f}"
            f" | {block['product_u']:.0f} | {block['kernels']:,} | {step['kernels']:,} | {step['waits']} |"
        )
    return "\n".join(lines)


def seconds_table() -> str:
    """What the planner makes of it: every case in seconds, as a sum on an H100, and in all on other cards."""
    lines = [
        f"| case | {SUMMED}, s | products | attention | traffic | launches | {' | '.join(OTHERS)} |",
        f"|---|---|---|---|---|---|{'---|' * len(OTHERS)}",
    ]
    for name, (model, method, state) in CASES.items():
        config, spec = run_config(model, method, state)
        steps = {card: step_cost(config, spec, config.memory, DEFAULTS[card]) for card in (SUMMED, *OTHERS)}
        parts = [
            sum(getattr(each, part) for each in steps[SUMMED].passes)
            for part in ("products_s", "attention_s", "traffic_s", "launches_s")
        ]
        cells = [steps[SUMMED].step_s, *parts, *(steps[card].step_s for card in OTHERS)]
        lines.append(f"| {name} | {' | '.join(f'{seconds:.2f}' for seconds in cells)} |")
    return "\n".join(lines)


def write_page(rows: Mapping[str, Any]) -> None:
    """Put the tables into the page, and draw the picture."""
    text = PAGE.read_text(encoding="utf-8")
    for (begin, end), content in ((WORK, table(rows)), (SECONDS, seconds_table())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text, encoding="utf-8")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in rows if name.startswith("5b lora")]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    labels = [name.removeprefix("5b lora, ") for name in shown]
    for axis, key, title in zip(
        axes, ("elementwise_u", "kernels"), ("elementwise traffic of a block, u", "kernels of a block"), strict=True
    ):
        values = [rows[name]["block"][key] for name in shown]
        axis.barh(labels, values, color=["#9aa5b5"] + ["#2f6fdb"] * (len(shown) - 1))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:,.0f}", va="center", fontsize=9)
        axis.set_xlim(0, 1.2 * max(values))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=ORDER)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--page", action="store_true", help="write docs/performance.md, and the planner's table, from the kept results"
    )
    arguments = parser.parse_args()
    if arguments.page:
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
        write_units(rows)
        write_page(rows)
        return
    rows = {}
    if arguments.output is not None and arguments.output.is_file():  # what is not counted now stays
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))["cases"]
    for name in arguments.only:
        rows[name] = count(name)
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
        if arguments.output is not None:
            kept = {name: rows[name] for name in ORDER if name in rows}
            arguments.output.write_text(json.dumps({"torch": torch.__version__, "cases": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
