"""The verbs of the ``finetune`` command: a function each, whose signature is its parser.

Nothing heavy is imported before a verb runs, so ``--help`` is instant.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

import finetune
from finetune.core.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from finetune.datasets.cache import Cache

F = TypeVar("F", bound=Callable[..., Any])

OK, BUG, USER_ERROR, WARNED, INTERRUPTED = 0, 1, 2, 3, 130

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: a failure that goes away by trying again."""

_OVERVIEW = """\
Fine-tune CogVideoX: LoRA or full, from clips and captions to an export that diffusers loads.

From one's own clips to a video, in five commands:

\b
  finetune init --model 5b --method lora --card 24GB --data clips
  finetune check --config run.yaml
  finetune train --config run.yaml
  finetune export runs/run
  finetune generate --adapter runs/run/export --prompt "a red kite at sea"
"""

_EXITS = """\
Exit codes: 0 done, 2 something to mend (the message says where), 3 the doctor has warnings and found nothing that stops
training, 1 a bug, 130 interrupted, 75 training was stopped by a
signal and saved, or a collection or packing met a job that uses the cache (the same command continues).
"""

app = typer.Typer(
    help=_OVERVIEW,
    epilog=_EXITS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},  # verbs inherit it
)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_next(*words: str) -> None:
    """End with the command that follows, to be typed in this folder."""
    print(f"next: {shlex.join(['finetune', *words])}")


def _print_notes(notes: Sequence[str], kind: str = "note") -> None:
    for note in notes if _is_main() else ():
        print(f"{kind}: {note}", file=sys.stderr)


def _config_words(config: Path, overrides: Sequence[str]) -> list[str]:
    """How a call was told its configuration."""
    return ["--config", str(config), *(["--set", *overrides] if overrides else [])]


# ---------------------------------------------------------------------------------------------------------- the verbs


def _option(help: str, metavar: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar)


def _flag(name: str, help: str) -> Any:
    return typer.Option(name, help=help)  # named, so that there is no --no-...


_CONFIG_HELP = "The run's YAML file."

_SET_HELP = r"Override fields, such as optimizer.lr=2e-4 data.buckets=\[49x480x720]; values are YAML."

Config = Annotated[Path, typer.Option(metavar="FILE", help=_CONFIG_HELP)]

Overrides = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE ...", help=_SET_HELP)]

Model = Annotated[str | None, _option("Where the base model is now, if not where the run had it.", "MODEL")]

Device = Annotated[str | None, _option("Such as cuda:1 or cpu; left out: a GPU where there is one.", "NAME")]


def _verb(*examples: str) -> Callable[[F], F]:
    """Make a function a verb; its examples stand below its options, and are parsed by a test."""
    return app.command(epilog="Examples:\n\n\b\n" + "\n".join(f"  {example}" for example in examples))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"finetune {finetune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None: ...


@_verb(
    "finetune quickstart",
)
def quickstart(
    output: Annotated[Path, _option("Where everything goes.", "DIR")] = Path("quickstart"),
) -> int:
    """Teach a tiny CogVideoX a new shape: everything the package does, in minutes, without a GPU or a download."""
    from finetune.testing.quickstart import main

    return PREEMPTED if getattr(main(output), "stopped_by", "") else OK


@_verb(
    "finetune init --model 5b --method lora --card 24GB --data clips",
    "finetune init --model ./my-cogvideox --data clips/metadata.jsonl",
)
def init(
    model: Annotated[
        str,
        _option(
            "2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v; a hub id; or the folder of a CogVideoX in diffusers format.", "MODEL"
        ),
    ],
    method: Annotated[Literal["lora", "full"], _option("Train an adapter, or every weight.")] = "lora",
    card: Annotated[
        str | None,
        _option("Memory of the GPU, such as 24GB, to say whether the run should fit.", "SIZE"),
    ] = None,
    data: Annotated[Path | None, _option("Clips and captions: a folder, or a metadata file.", "PATH")] = None,
    output: Annotated[Path, _option("The file to write.", "FILE")] = Path("run.yaml"),
    force: Annotated[bool, _flag("--force", "Replace the file if it exists.")] = False,
) -> None:
    """Write a commented configuration for a model, a method and a card."""
    from finetune.cli.init import write_starter
    from finetune.core.gpu import amount
    from finetune.core.types import GIB

    card_bytes = amount("--card", card)
    card_gib = None if card_bytes is None else card_bytes / GIB
    notes = write_starter(model=model, method=method, card_gib=card_gib, clips=data, output=output, force=force)
    print(f"wrote {output}")
    _print_notes(notes)
    _print_next("doctor", "--config", str(output))


@_verb(
    "finetune caption clips",
    "finetune caption clips --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct --variants 3",
    "finetune caption clips --review captions.html",
    "finetune caption --print-instruction",
)
def caption(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Clips, with a metadata.jsonl or a .txt beside each, or neither."),
    ] = None,
    model: Annotated[
        str, _option("Any image-text-to-text model of transformers; with --endpoint its name there.", "MODEL")
    ] = "Qwen/Qwen3-VL-8B-Instruct",
    revision: Annotated[str | None, _option("Branch, tag or commit of a hub id.", "REV")] = None,
    endpoint: Annotated[str | None, _option("Ask an OpenAI-compatible server instead.", "URL")] = None,
    key_variable: Annotated[
        str, _option("Environment variable that holds the server's key.", "NAME")
    ] = "OPENAI_API_KEY",
    send: Annotated[
        Literal["auto", "video", "images"], _option("To a server: the clip itself, pictures of it, or what it takes.")
    ] = "auto",
    timeout: Annotated[float, _option("Seconds for one request to a server.", "S")] = 120.0,
    target: Annotated[
        str,
        typer.Option(
            "--for", help="The CogVideoX that will read them: 2b, 5b ..., a folder or hub id.", metavar="MODEL"
        ),
    ] = "5b",
    instruction: Annotated[Path | None, _option("A file with what the model is asked.", "FILE")] = None,
    print_instruction: Annotated[
        bool, _flag("--print-instruction", "Print what the model is asked, to be edited; nothing else.")
    ] = False,
    variants: Annotated[int, _option("Captions per clip; training takes one at a time.", "N")] = 1,
    frames: Annotated[int, _option("Shown of a clip, at most.", "N")] = 16,
    side: Annotated[int, _option("Longest side of a shown frame, in pixels.", "N")] = 448,
    batch: Annotated[int, _option("Clips that are asked about side by side.", "N")] = 4,
    replace: Annotated[
        bool, _flag("--replace", "Write anew what another model or instruction wrote; people's captions stay.")
    ] = False,
    review: Annotated[
        Path | None, _option("Write a page to read, change and save the captions in a browser.", "HTML")
    ] = None,
    device: Device = None,
) -> int:
    """Write the captions that a folder of clips lacks, as long and dense as CogVideoX was trained on.

    What a person wrote or changed is kept. Exits with 2 where clips are left without a caption.
    """
    if print_instruction:
        from finetune.captioning.caption import read_instruction

        print(read_instruction(instruction), end="")
        return OK
    if folder is None:
        raise ConfigError("no folder is named", fix="finetune caption DIR")
    report = finetune.caption(
        folder,
        model=model,
        revision=revision,
        endpoint=endpoint,
        key_variable=key_variable,
        send=send,
        timeout_s=timeout,
        target=target,
        instruction=instruction,
        variants=variants,
        frames=frames,
        side=side,
        batch=batch,
        replace=replace,
        review=review,
        device=device,
    )
    print(report)
    if review is not None:
        print(f"page: {review}")
    if report.errors:
        return USER_ERROR
    _print_next("init", "--model", target, "--data", str(folder))
    return OK


@_verb(
    "finetune prepare footage --out clips",
    "finetune prepare footage --out clips --model 1.5-5b --min-frames 49 --detector content",
    "finetune prepare footage --out clips --limit min_motion=1 max_text=off --scorer my_scorers:nice>=5",
)
def prepare(
    raw: Annotated[Path, typer.Argument(metavar="RAW_DIR", help="Footage, in any number of sub-folders; only read.")],
    out: Annotated[Path, _option("The dataset's folder: new, empty, or an earlier call's.", "DIR")],
    model: Annotated[str | None, _option("Whose frames and fps clips have; left out: 49 at 8 fps.", "MODEL")] = None,
    frames: Annotated[int | None, _option("Of a clip, in place of the model's.", "N")] = None,
    fps: Annotated[float | None, _option("Of a clip, in place of the model's.")] = None,
    min_frames: Annotated[int | None, _option("Shorter clips too, of at least N, where a scene ends.", "N")] = None,
    keep_fps: Annotated[
        bool, _flag("--keep-fps", "Keep the source's own frames: exact cuts are copied, not encoded again.")
    ] = False,
    short_side: Annotated[int, _option("Scale larger pictures down to N pixels; 0 for never.", "N")] = 1080,
    keep_bars: Annotated[bool, _flag("--keep-bars", "Do not cut away black bars.")] = False,
    detector: Annotated[
        Literal["adaptive", "content", "threshold", "transnet"],
        _option("Of scenes; threshold finds fades only, transnet is a network (the extra transnet)."),
    ] = "adaptive",
    threshold: Annotated[float | None, _option("Of the detector, in its own unit; left out: its default.")] = None,
    limit: Annotated[
        list[str],
        _option(
            "A limit other than its default, or off: min_short_side, black, frozen_s, flash, min_motion, max_motion,"
            " min_sharpness, max_text, duplicate_bits.",
            "NAME=VALUE ...",
        ),
    ] = [],
    scorer: Annotated[
        list[str],
        _option("A scorer of yours by import path, such as my_scorers:nice, with >=5 or <=5 to drop by it.", "PATH"),
    ] = [],
    report: Annotated[
        bool, _flag("--report", "Write the ledger as a page with pictures, too: DIR/ledger.html.")
    ] = False,
    workers: Annotated[int, _option("Processes that read the footage.", "N")] = 2,
) -> None:
    """Make a dataset from raw footage: scenes, filters, clips without captions, and a ledger of every second.

    Killed at any moment, the same command goes on and ends with the same files. Originals are never modified.
    """
    limits: dict[str, float | None] = {}
    for text in limit:
        name, _, value = text.partition("=")
        try:
            limits[name.strip()] = None if value.strip() == "off" else float(value)
        except ValueError:
            raise typer.BadParameter(f"'{text}' is no NAME=NUMBER or NAME=off", param_hint="'--limit'") from None
    prepared = finetune.prepare(
        raw,
        out,
        model=model,
        frames=frames,
        fps=fps,
        min_frames=min_frames,
        keep_fps=keep_fps,
        short_side=short_side or None,
        crop_bars=not keep_bars,
        detector=detector,
        threshold=threshold,
        limits=limits,
        scorers=scorer,
        report=report,
        workers=workers,
    )
    print(prepared)
    if report:
        print(f"page: {out / 'ledger.html'}")
    _print_notes(prepared.notes)
    _print_notes(prepared.unreadable, "unreadable")
    _print_next("caption", str(out), *([] if model is None else ["--for", model]))


@_verb(
    "finetune check --config run.yaml",
)
def check(config: Config, overrides: Overrides = []) -> None:
    """Check a configuration, the model's JSON and every clip's header, without loading a weight."""
    report = finetune.check(finetune.load_config(config, overrides))
    print(report)
    _print_notes(report.warnings, "warning")
    _print_next("train", *_config_words(config, overrides))


@_verb(
    "finetune doctor --config run.yaml",
    "finetune doctor --config run.yaml --card 24GB --device 4090 --predict",
    "finetune doctor --config run.yaml --json",
)
def doctor(
    config: Config,
    overrides: Overrides = [],
    output: Annotated[Path, _option("The page to write.", "FILE")] = Path("doctor.html"),
    card: Annotated[str | None, _option("Memory of the GPU, such as 24GB; left out: of the one here.", "SIZE")] = None,
    device: Annotated[
        str | None,
        _option("The GPU to reckon seconds for: H200, H100, A100, 4090, or a calibrated one.", "NAME"),
    ] = None,
    predict: Annotated[
        bool,
        _flag("--predict", "Wait for the prediction of memory: half a minute the first time, remembered afterwards."),
    ] = False,
    vae: Annotated[
        bool,
        _flag("--vae", "Load the VAE, put every clip through it, and show the frames that suffer most."),
    ] = False,
    json: Annotated[bool, _flag("--json", "Print a JSON document.")] = False,
) -> int:
    """Look at the clips that training would see: a table here, and a page of frames, captions and faults.

    Exits with 2 where something stops training, and with 3 where there are warnings.
    """
    report = finetune.doctor(
        finetune.load_config(config, overrides), page=output, card=card, device=device, predict=predict, vae=vae
    )
    print(report.to_json() if json else report)
    if report.level != "error" and not json:
        _print_next("precompute", *_config_words(config, overrides))
    return {"error": USER_ERROR, "warning": WARNED}.get(report.level or "", OK)


@_verb(
    "finetune plan --config run.yaml --card 24GB",
    "finetune plan --config run.yaml --plot memory.png",
    "finetune plan --config run.yaml --budget 12GB --ram 32GB --device 4090",
)
def plan(
    config: Config,
    overrides: Overrides = [],
    card: Annotated[str | None, _option("Memory of the GPU, such as 24GB; left out: of the one here.", "SIZE")] = None,
    ram: Annotated[str | None, _option("Host memory that the run may take, such as 32GB.", "SIZE")] = None,
    budget: Annotated[str | None, _option("Find the fastest memory section for a GPU of this size.", "SIZE")] = None,
    processes: Annotated[int, _option("Plan one of N processes with a whole model each (DDP).", "N")] = 1,
    allow_quantized: Annotated[
        bool,
        _flag(
            "--allow-quantized",
            "With --budget: a base in 8 or 4 bits also where something else fits; it changes the model a little.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        _option("The GPU to reckon seconds for: H200, H100, A100, 4090, or a calibrated one.", "NAME"),
    ] = None,
    plot: Annotated[Path | None, _option("Draw the training step's memory curve.", "PNG")] = None,
    exact: Annotated[bool, _flag("--exact", "Run every block, where two short models would do.")] = False,
    json: Annotated[bool, _flag("--json", "Print a JSON document, in bytes.")] = False,
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
        _print_next("plan", *_config_words(config, overrides), "--budget", budget or card or "24GB")
    elif not json:
        if planned.chosen:
            print(f"write that memory section into {config} first, or set memory.kind: auto there")
        _print_next("train", *_config_words(config, overrides))
    return USER_ERROR if too_large and (card is not None or budget is not None) else OK


@_verb(
    "finetune calibrate",
)
def calibrate(seconds: Annotated[float, _option("How long to measure.")] = 20.0) -> None:
    """Measure this machine's GPU for the planner: matrix products, attention, copies. Kept per device name."""
    from finetune.planner.plan import run_calibration

    print(run_calibration(seconds))
    print("next: `finetune plan` reckons with these rates from now on")


@_verb(
    "finetune precompute --config run.yaml",
    "accelerate launch --num_processes 4 -m finetune precompute --config run.yaml",
    "finetune precompute --config run.yaml --shard 3/16",
    "finetune precompute --config run.yaml --merge",
)
def precompute(
    config: Config,
    overrides: Overrides = [],
    shard: Annotated[
        str | None, _option("Only this part of the clips; the others by commands of their own, anywhere.", "K/N")
    ] = None,
    merge: Annotated[
        bool, _flag("--merge", "Encode nothing; prove that the shards made all of it, and say so.")
    ] = False,
) -> None:
    """Encode clips and captions into the cache: what is there already is kept. Training does the same where needed."""
    report = finetune.precompute(finetune.load_config(config, overrides), shard=shard, merge=merge)
    if _is_main():
        print(report)
        following = ["train"] if report.part is None else ["precompute", "--merge"]
        _print_next(*following, *_config_words(config, overrides))


@_verb(
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
    if _is_main():
        print(report)
        if not report.stopped_by:
            print(f"next: {report.export_command}")
    return PREEMPTED if report.stopped_by else OK


@_verb(
    "finetune replay runs/run/reports/nonfinite-step-00000123",
    "finetune replay runs/run/reports/nonfinite-step-00000123 --dtype fp32 --device cpu",
)
def replay(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A folder reports/nonfinite-step-... of a run.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, _option("What to compute in; left out: as the step was.")
    ] = None,
    device: Device = None,
    model: Model = None,
    cache: Annotated[Path | None, _option("Where the cache is now, if not where the run had it.", "DIR")] = None,
) -> None:
    """Run the samples of a step that was not finite one at a time, and say what went wrong.

    A clip, an overflow, or the weights. Training writes the report and names it.
    """
    from finetune.trainers.replay import replay

    print(replay(report, dtype=dtype, device=device, pretrained=model, cache=cache))


@_verb(
    "finetune export runs/run",
    "finetune export runs/run --checkpoint best --output my-lora",
    "finetune export runs/run --merged --strength 0.8",
)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder, or one checkpoint's.")],
    to: Annotated[Literal["diffusers"], _option("Layout of the export.")] = "diffusers",
    output: Annotated[Path | None, _option("Where to; left out: RUN/export, or RUN/merged.", "DIR")] = None,
    checkpoint: Annotated[Literal["latest", "best"], _option("Of a run's folder; best by held-out loss.")] = "latest",
    merged: Annotated[
        bool,
        _flag(
            "--merged",
            "Put the adapter into the base's weights: a whole transformer, in RUN/merged where --output is left out.",
        ),
    ] = False,
    strength: Annotated[float, _option("With --merged: how much of the adapter; 1 as trained, 0 none.")] = 1.0,
    full_pipeline: Annotated[
        bool,
        _flag(
            "--full-pipeline",
            "After full fine-tuning, or with --merged: VAE, text encoder and scheduler beside the transformer.",
        ),
    ] = False,
    model: Model = None,
    weights: Annotated[Literal["auto", "ema", "raw"], _option("auto takes the average where one was kept.")] = "auto",
) -> None:
    """Write what was trained in diffusers' format: reloaded through the stock pipeline, compared, kept if equal."""
    print(
        finetune.export(
            source,
            output,
            checkpoint=checkpoint,
            full_pipeline=full_pipeline,
            weights=weights,
            pretrained=model,
            merged=merged,
            strength=strength,
        )
    )


@_verb(
    'finetune generate --adapter runs/run/export --prompt "a red kite at sea"',
    "finetune generate --adapter a:0.8 --adapter b:0.5 --prompts prompts.txt",
    'finetune generate --model 5b-i2v --image boat.png --prompt "it sails away"',
)
def generate(
    model: Annotated[
        str | None,
        _option("The base model: a folder, a hub id or 5b...; left out: the adapter's own.", "MODEL"),
    ] = None,
    revision: Annotated[str | None, _option("Branch, tag or commit of a hub id.", "REV")] = None,
    transformer: Annotated[Path | None, _option("A fully fine-tuned transformer, from an export.", "DIR")] = None,
    adapter: Annotated[
        list[str],
        _option("A LoRA: a file, an export, a checkpoint, or a run (its newest checkpoint).", "PATH:STRENGTH"),
    ] = [],
    prompt: Annotated[list[str], _option("Give it again for more videos.", "TEXT")] = [],
    prompts: Annotated[
        Path | None,
        _option("Text file with a prompt per line, or .jsonl with prompt, image, seed.", "FILE"),
    ] = None,
    image: Annotated[
        list[Path],
        _option("First frame (image-to-video): one for all --prompt, or one for each.", "FILE"),
    ] = [],
    seed: Annotated[int, _option("Of the first video; each further one has the next.")] = 0,
    bucket: Annotated[
        str | None,
        _option("Frames x height x width; left out: as the adapter was trained.", "FxHxW"),
    ] = None,
    fps: Annotated[float | None, _option("Of the written files; left out: as the adapter was trained.")] = None,
    negative_prompt: Annotated[str, _option("What to steer away from.", "TEXT")] = "",
    steps: Annotated[int, _option("Denoising steps.")] = 50,
    guidance: Annotated[float, _option("Classifier-free guidance; 1 for none.")] = 6.0,
    dynamic_cfg: Annotated[bool, _flag("--dynamic-cfg", "Let the guidance grow with the steps.")] = False,
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], _option("What to compute in.")] = "auto",
    offload: Annotated[bool, _flag("--offload", "Keep on the GPU only what is in use; slower.")] = False,
    device: Device = None,
    output: Annotated[Path, _option("Folder for the videos.", "DIR")] = Path("videos"),
) -> None:
    """Sample videos from a base model with any number of adapters."""
    from finetune.inference.request import prompts_with_seeds, read_prompts

    listed = () if prompts is None else read_prompts(prompts, seed=seed)
    print(
        finetune.generate(
            [*listed, *prompts_with_seeds(prompt, image, seed=seed + len(listed))],
            output,
            model=model,
            revision=revision,
            transformer=transformer,
            adapters=adapter,
            bucket=bucket,
            fps=fps,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            dynamic_cfg=dynamic_cfg,
            dtype=dtype,
            offload=offload,
            device=device,
        )
    )


@_verb(
    "finetune cache stats --config run.yaml",
    "finetune cache verify --dir cache",
    "finetune cache gc --dir cache --unused-days 30 --delete",
    "finetune cache pack --dir cache",
    "finetune cache export cache.tar --config run.yaml",
    "finetune cache import cache.tar --dir cache",
)
def cache(
    action: Annotated[
        Literal["verify", "gc", "stats", "pack", "export", "import"],
        typer.Argument(help="Read all; collect garbage; count; lay into shards; copy to or from another machine."),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR_OR_TAR]", help="export, import: a cache's folder, or an archive that ends with .tar."
        ),
    ] = None,
    dir: Annotated[Path | None, _option("The cache's folder.", "DIR")] = None,
    config: Annotated[Path | None, _option("A run's YAML file, for its cache.dir.", "FILE")] = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE ...", hidden=True)] = [],
    delete: Annotated[bool, _flag("--delete", "Delete what verify or gc finds; without it they only say.")] = False,
    unused_days: Annotated[float | None, _option("gc: also what no run has used for so long.", "DAYS")] = None,
    alone: Annotated[
        bool,
        _flag("--alone", "gc, pack: nothing else uses the cache; asked for on file systems without locks."),
    ] = False,
) -> int:
    """Look after a cache: verify its entries, collect what nothing refers to, count, pack or move what it holds."""
    from finetune.datasets import cache_admin, cache_packing, cache_transfer
    from finetune.datasets.cache import Cache

    if (dir is None) == (config is None):
        raise typer.BadParameter("give one of --dir and --config")
    if (other is None) == (action in ("export", "import")):
        raise typer.BadParameter("export and import take a folder or a .tar, the others do not")
    if config is not None:
        store, where = Cache(finetune.load_config(config, overrides).cache.dir), _config_words(config, overrides)
    elif dir is not None:
        store, where = Cache(dir.expanduser()), ["--dir", str(dir)]
    if action != "import" and not store.root.is_dir():
        raise CacheError(
            "there is no cache", where=str(store.root), fix="name another; `finetune precompute` makes one"
        )
    if action == "verify":
        verified = cache_admin.verify(store, delete=delete, progress=sys.stderr.isatty())
        print(verified)
        if verified.damaged and not delete:
            _print_next("cache", "verify", *where, "--delete")
        elif verified.missing and config is not None:
            _print_next("precompute", *where)
        return OK if verified.ok else USER_ERROR
    if action == "gc":
        collected = cache_admin.gc(store, delete=delete, unused_days=unused_days, alone=alone)
        print(collected)
        if not delete and collected.bytes:
            _print_next("cache", "gc", *where, "--delete", *(["--alone"] if alone else []))
        return PREEMPTED if collected.held_back else OK
    if action == "pack":
        packed = cache_packing.pack(store, alone=alone, progress=sys.stderr.isatty())
        print(packed)
        return PREEMPTED if packed.held_back else USER_ERROR if packed.damaged else OK
    if other is not None:
        progress = sys.stderr.isatty()
        if action == "import":
            copied = cache_transfer.import_cache(store, other, progress=progress)
        else:
            name = None if config is None else _manifest_of(config, overrides, store)
            copied = cache_transfer.export_cache(store, other, manifest=name, progress=progress)
        print(copied)
        return OK if copied.ok else USER_ERROR
    print(cache_admin.stats(store))
    _print_next("cache", "verify", *where)
    return OK


def _manifest_of(config: Path, overrides: list[str], store: Cache) -> str:
    """The name of the manifest that answers a configuration."""
    from finetune.caching.request import require_manifest
    from finetune.planner.plan import choose_memory

    chosen, _ = choose_memory(finetune.load_config(config, overrides))  # it decides how T5 is held
    return require_manifest(chosen, store).name
