"""Verbs of a training run: the quickstart, predictions, precompute, train, replay."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import typer

import finetune
from finetune.cli.app import (
    OK,
    PREEMPTED,
    USER_ERROR,
    Config,
    Device,
    Model,
    Overrides,
    config_words,
    flag,
    is_main,
    option,
    print_next,
    verb,
)
from finetune.core.errors import ConfigError, FinetuneError

_PANEL = "Training"


@verb(
    _PANEL,
    "finetune quickstart",
)
def quickstart(
    output: Annotated[Path, option("Where everything goes.", "DIR")] = Path("quickstart"),
) -> int:
    """Teach a tiny CogVideoX a new shape: everything the package does, in minutes, without a GPU or a download."""
    from finetune.testing.quickstart import main

    return PREEMPTED if getattr(main(output), "stopped_by", "") else OK


@verb(
    _PANEL,
    "finetune plan --config run.yaml --card 24GB",
    "finetune plan --config run.yaml --plot memory.png",
    "finetune plan --config run.yaml --budget 12GB --ram 32GB --device 4090",
)
def plan(
    config: Config,
    overrides: Overrides = [],
    card: Annotated[str | None, option("Memory of the GPU, such as 24GB; left out: of the one here.", "SIZE")] = None,
    ram: Annotated[str | None, option("Host memory that the run may take, such as 32GB.", "SIZE")] = None,
    budget: Annotated[str | None, option("Find the fastest memory section for a GPU of this size.", "SIZE")] = None,
    processes: Annotated[int, option("Plan one of N processes with a whole model each (DDP).", "N")] = 1,
    allow_quantized: Annotated[
        bool,
        flag(
            "--allow-quantized",
            "With --budget: a base in 8 or 4 bits also where something else fits; it changes the model a little.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        option("The GPU to reckon seconds for: H200, H100, A100, 4090, or a calibrated one.", "NAME"),
    ] = None,
    plot: Annotated[Path | None, option("Draw the training step's memory curve.", "PNG")] = None,
    exact: Annotated[bool, flag("--exact", "Run every block, where two short models would do.")] = False,
    json: Annotated[bool, flag("--json", "Print a JSON document, in bytes.")] = False,
) -> int:
    """Predict a run's peak memory, phase by phase, from the model's JSON alone; or find the memory section that fits.

    Exits with 2 where the run does not fit the --card or --budget.
    """
    print(f"planning {config}: its model in fake tensors, a minute or so", file=sys.stderr, flush=True)
    planned = finetune.plan(
        finetune.load_config(config, overrides),
        card=card,
        ram=ram,
        budget=budget,
        device=device,
        processes=processes,
        quantize=allow_quantized,
        plot=plot,
        exact=exact,
        as_json=json,
    )
    print(planned)
    too_large = planned.fits is False
    if too_large and not json:
        more = ["--ram", ram] if ram is not None else []
        print_next("plan", *config_words(config, overrides), "--budget", budget or card or "24GB", *more)
    elif not json:
        if planned.chosen:
            print(f"write that memory section into {config} first, or set memory.kind: auto there")
        print_next("train", *config_words(config, overrides))
    return USER_ERROR if too_large and (card is not None or budget is not None) else OK


@verb(
    _PANEL,
    "finetune calibrate",
)
def calibrate(seconds: Annotated[float, option("How long to measure.")] = 20.0) -> None:
    """Measure this machine's GPU for the planner: matrix products, attention, copies. Kept per device name."""
    from finetune.planner.plan import run_calibration

    print(run_calibration(seconds))
    print("next: `finetune plan` reckons with these rates from now on")


@verb(
    _PANEL,
    "finetune precompute --config run.yaml",
    "accelerate launch --num_processes 4 -m finetune precompute --config run.yaml",
    "finetune precompute --config run.yaml --shard 3/16",
    "finetune precompute --config run.yaml --merge",
)
def precompute(
    config: Config,
    overrides: Overrides = [],
    shard: Annotated[
        str | None, option("Only this part of the clips; the others by commands of their own, anywhere.", "K/N")
    ] = None,
    merge: Annotated[
        bool, flag("--merge", "Encode nothing; prove that the shards made all of it, and say so.")
    ] = False,
) -> None:
    """Encode clips and captions into the cache: what is there already is kept. Training does the same where needed."""
    report = finetune.precompute(finetune.load_config(config, overrides), shard=shard, merge=merge)
    if is_main():
        print(report)
        if report.part is not None:
            print("when all parts are made:")
        following = ["train"] if report.part is None else ["precompute", "--merge"]
        print_next(*following, *config_words(config, overrides))


@verb(
    _PANEL,
    "finetune train --config run.yaml",
    "finetune train --config run.yaml --set optimizer.lr=2e-4 train.steps=500",
    "accelerate launch --num_processes 2 -m finetune train --config run.yaml",
)
def train(config: Config, overrides: Overrides = []) -> int:
    """Train as a configuration says: fill the cache, continue or begin the run, validate, save.

    SIGTERM, SIGUSR1, SIGINT or SIGHUP finishes the step, saves a checkpoint and exits with 75; the same command
    continues.
    """
    report = finetune.train(finetune.load_config(config, overrides))
    if is_main():
        print(report)
        if not report.stopped_by:
            with suppress(
                FinetuneError, OSError
            ):  # a run whose folder is gone, or whose page cannot be written, is trained
                print(f"report: {finetune.report(report.run_dir)}")
            if report.export_command:
                print(f"next: {report.export_command}")
    return PREEMPTED if report.stopped_by else OK


@verb(
    _PANEL,
    "finetune lr-find --config run.yaml",
    "finetune lr-find --config run.yaml --highest 1e-3 --steps 100 --every 5",
)
def lr_find(
    config: Config,
    overrides: Overrides = [],
    lowest: Annotated[float, option("Learning rate of the first step.", "LR")] = 1e-6,
    highest: Annotated[float, option("Learning rate of the last step.", "LR")] = 1e-2,
    steps: Annotated[int, option("Optimizer steps.", "N")] = 60,
    every: Annotated[int, option("Steps between two measurements of the held-out loss.", "N")] = 3,
) -> None:
    """Find a learning rate: a short run in which it grows, looked at by the held-out loss."""
    report = finetune.lr_find(
        finetune.load_config(config, overrides), lowest=lowest, highest=highest, steps=steps, every=every
    )
    if is_main():
        print(report)
        if report.suggested is not None:
            print_next("train", *config_words(config, [*overrides, f"optimizer.lr={report.suggested:.1e}"]))


@verb(
    _PANEL,
    "finetune report runs/run",
    "finetune report runs/first runs/second --output compared.html",
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run's folder, or several to compare.")],
    output: Annotated[Path | None, option("The page; left out: RUN/report.html, or ./report.html.", "FILE")] = None,
) -> None:
    """Show a run, or several side by side, as one page: a verdict, curves, samples, clips, settings."""
    print(f"wrote {finetune.report(runs, output)}")
    if len(runs) == 1:
        from finetune.checkpoint.folders import list_checkpoints
        from finetune.reports.report import verdict
        from finetune.reports.run_folder import read_run

        if (command := verdict(read_run(runs[0])).command) and list_checkpoints(runs[0]):
            print(f"next: {command}")


@verb(
    _PANEL,
    "finetune strength runs/run",
    "finetune strength runs/run --checkpoint best --strengths 0.25,0.75,2 --clips 32",
)
def strength(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")],
    checkpoint: Annotated[Literal["latest", "best"], option("Which of the run's checkpoints.")] = "latest",
    strengths: Annotated[str, option("Factors on the adapter; 0 and 1 are always measured.", "X,Y")] = "0.5,1.5",
    clips: Annotated[int | None, option("At most N clips; left out: validation.clips.", "N")] = None,
    json: Annotated[bool, flag("--json", "Print a JSON document.")] = False,
    device: Device = None,
    model: Model = None,
    cache: Annotated[Path | None, option("Where the cache is now, if not where the run had it.", "DIR")] = None,
) -> None:
    """Say whether a LoRA has learnt too little or too much: its held-out loss at several strengths, block by block."""
    try:
        factors = [float(factor) for factor in strengths.split(",")]
    except ValueError:
        raise ConfigError(f"{strengths!r} is no list of numbers", where="--strengths", fix="such as 0.5,1.5") from None
    report = finetune.strength(
        run, checkpoint=checkpoint, strengths=factors, clips=clips, device=device, pretrained=model, cache=cache
    )
    print(dumps(report.to_dict(), indent=1) if json else report)
    if not json:
        print_next("export", str(run))


@verb(
    _PANEL,
    "finetune replay runs/run/reports/nonfinite-step-00000123",
    "finetune replay runs/run/reports/nonfinite-step-00000123 --dtype fp32 --device cpu",
)
def replay(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A folder reports/nonfinite-step-... of a run.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, option("What to compute in; left out: as the step was.")
    ] = None,
    device: Device = None,
    model: Model = None,
    cache: Annotated[Path | None, option("Where the cache is now, if not where the run had it.", "DIR")] = None,
) -> None:
    """Run the samples of a step that was not finite one at a time, and say what went wrong.

    A clip, an overflow, or the weights. Training writes the report and names it.
    """
    from finetune.trainers.replay import replay

    print(replay(report, dtype=dtype, device=device, pretrained=model, cache=cache))


@verb(
    _PANEL,
    "finetune ui",
    "finetune ui my-project --allow /data/clips",
    "finetune ui --host 0.0.0.0 --port 8080",
)
def ui(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where configurations, clips and runs are; left out: here.")
    ] = Path(),
    host: Annotated[
        str, option("Address to listen on; beyond this machine a token is asked for.", "ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on; 0 for a free one.", "N")] = 7860,
    token: Annotated[
        bool, flag("--token", "Ask for a token on this machine, too: of FINETUNE_UI_TOKEN, or a new one.")
    ] = False,
    allow: Annotated[list[Path], option("A further folder to read and write; again for more.", "DIR")] = [],
    max_upload: Annotated[str, option("The largest upload.", "SIZE")] = "1GB",
) -> None:
    """Drive all of this from a page in a browser: clips, plan, runs, videos, exports. What it starts outlives it."""
    word = os.environ.get("FINETUNE_UI_TOKEN", "") or (secrets.token_urlsafe(24) if token else "")
    finetune.ui(folder, host=host, port=port, token=word, allow=allow, most_upload=max_upload)
