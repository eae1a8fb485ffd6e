"""Verbs on clips and captions: a first configuration, footage, captions, checks, the doctor, the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import finetune
from finetune.cli.app import (
    OK,
    PREEMPTED,
    USER_ERROR,
    WARNED,
    Config,
    Device,
    Overrides,
    config_words,
    flag,
    option,
    print_next,
    print_notes,
    verb,
)
from finetune.core.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from finetune.datasets.cache import Cache


_PANEL = "Clips and captions"


@verb(
    _PANEL,
    "finetune init --model 5b --method lora --card 24GB --data clips",
    "finetune init --model ./my-cogvideox --data clips/metadata.jsonl",
    "finetune init --from train_ddp_t2v.sh",
)
def init(
    model: Annotated[
        str | None,
        option(
            "2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v; a hub id; or the folder of a CogVideoX in diffusers format.", "MODEL"
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="In place of all else: a script or file of CogVideo, CogKit, cogvideox-factory or finetrainers.",
            metavar="FILE",
        ),
    ] = None,
    method: Annotated[
        Literal["lora", "full"] | None, option("Train an adapter (lora, if left out), or every weight.")
    ] = None,
    card: Annotated[
        str | None,
        option("Memory of the GPU, such as 24GB, to say whether the run should fit.", "SIZE"),
    ] = None,
    data: Annotated[Path | None, option("Clips and captions: a folder, or a metadata file.", "PATH")] = None,
    output: Annotated[Path, option("The file to write.", "FILE")] = Path("run.yaml"),
    force: Annotated[bool, flag("--force", "Replace the file if it exists.")] = False,
) -> None:
    """Write a commented configuration for a model, a method and a card, or from another trainer's own."""
    from finetune.cli.init import write_starter, write_translated
    from finetune.core.gpu import card_size
    from finetune.core.types import GIB

    card_bytes = card_size(card)
    card_gib = None if card_bytes is None else card_bytes / GIB
    if (model is None) == (source is None):
        raise typer.BadParameter("give one of --model and --from")
    if source is not None:
        beside = {"--method": method, "--card": card, "--data": data}
        if given := [name for name, value in beside.items() if value is not None]:
            raise typer.BadParameter(f"{', '.join(given)}: --from takes all of it from the file; change what it writes")
        notes = write_translated(source, output, force=force)
    elif model is not None:
        notes = write_starter(
            model=model, method=method or "lora", card_gib=card_gib, clips=data, output=output, force=force
        )
    print(f"wrote {output}")
    print_notes(notes)
    print_next("doctor", "--config", str(output))


@verb(
    _PANEL,
    "finetune prepare footage --out clips",
    "finetune prepare footage --out clips --model 1.5-5b --min-frames 49 --detector content",
    "finetune prepare footage --out clips --limit min_motion=1 max_text=off --scorer my_scorers:nice>=5",
)
def prepare(
    raw: Annotated[Path, typer.Argument(metavar="RAW_DIR", help="Footage, in any number of sub-folders; only read.")],
    out: Annotated[Path, option("The dataset's folder: new, empty, or an earlier call's.", "DIR")],
    model: Annotated[str | None, option("Whose frames and fps clips have; left out: 49 at 8 fps.", "MODEL")] = None,
    frames: Annotated[int | None, option("Of a clip, in place of the model's.", "N")] = None,
    fps: Annotated[float | None, option("Of a clip, in place of the model's.")] = None,
    min_frames: Annotated[int | None, option("Shorter clips too, of at least N, where a scene ends.", "N")] = None,
    keep_fps: Annotated[
        bool, flag("--keep-fps", "Keep the source's own frames: exact cuts are copied, not encoded again.")
    ] = False,
    short_side: Annotated[int, option("Scale larger pictures down to N pixels; 0 for never.", "N")] = 1080,
    keep_bars: Annotated[bool, flag("--keep-bars", "Do not cut away black bars.")] = False,
    detector: Annotated[
        Literal["adaptive", "content", "threshold", "transnet"],
        option("Of scenes; threshold finds fades only, transnet is a network (the extra transnet)."),
    ] = "adaptive",
    threshold: Annotated[float | None, option("Of the detector, in its own unit; left out: its default.")] = None,
    limit: Annotated[
        list[str],
        option(
            "A limit other than its default, or off: min_short_side, black, frozen_s, flash, min_motion, max_motion,"
            " min_sharpness, max_text, duplicate_bits.",
            "NAME=VALUE ...",
        ),
    ] = [],
    scorer: Annotated[
        list[str],
        option("A scorer of yours by import path, such as my_scorers:nice, with >=5 or <=5 to drop by it.", "PATH"),
    ] = [],
    report: Annotated[
        bool, flag("--report", "Write the ledger as a page with pictures, too: DIR/ledger.html.")
    ] = False,
    workers: Annotated[int, option("Processes that read the footage.", "N")] = 2,
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
    print_notes(prepared.notes)
    print_notes(prepared.unreadable, "unreadable")
    print_next("caption", str(out), *([] if model is None else ["--for", model]))


@verb(
    _PANEL,
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
        str, option("Any image-text-to-text model of transformers; with --endpoint its name there.", "MODEL")
    ] = "Qwen/Qwen3-VL-8B-Instruct",
    revision: Annotated[str | None, option("Branch, tag or commit of a hub id.", "REV")] = None,
    endpoint: Annotated[str | None, option("Ask an OpenAI-compatible server instead.", "URL")] = None,
    key_variable: Annotated[
        str, option("Environment variable that holds the server's key.", "NAME")
    ] = "OPENAI_API_KEY",
    send: Annotated[
        Literal["auto", "video", "images"], option("To a server: the clip itself, pictures of it, or what it takes.")
    ] = "auto",
    timeout: Annotated[float, option("Seconds for one request to a server.", "S")] = 120.0,
    target: Annotated[
        str,
        typer.Option(
            "--for", help="The CogVideoX that will read them: 2b, 5b ..., a folder or hub id.", metavar="MODEL"
        ),
    ] = "5b",
    instruction: Annotated[Path | None, option("A file with what the model is asked.", "FILE")] = None,
    print_instruction: Annotated[
        bool, flag("--print-instruction", "Print what the model is asked, to be edited; nothing else.")
    ] = False,
    variants: Annotated[int, option("Captions per clip; training takes one at a time.", "N")] = 1,
    frames: Annotated[int, option("Shown of a clip, at most.", "N")] = 16,
    side: Annotated[int, option("Longest side of a shown frame, in pixels.", "N")] = 448,
    batch: Annotated[int, option("Clips that are asked about side by side.", "N")] = 4,
    replace: Annotated[
        bool, flag("--replace", "Write anew what another model or instruction wrote; people's captions stay.")
    ] = False,
    review: Annotated[
        Path | None, option("Write a page to read, change and save the captions in a browser.", "HTML")
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
    print_next("init", "--model", target, "--data", str(folder))
    return OK


@verb(
    _PANEL,
    "finetune check --config run.yaml",
)
def check(config: Config, overrides: Overrides = []) -> None:
    """Check a configuration, the model's JSON, adapters and every clip's header; no weight of the model is loaded."""
    report = finetune.check(finetune.load_config(config, overrides))
    print(report)
    print_notes(report.warnings, "warning")
    print_next("train", *config_words(config, overrides))


@verb(
    _PANEL,
    "finetune doctor --config run.yaml",
    "finetune doctor --config run.yaml --card 24GB --device 4090 --predict",
    "finetune doctor --config run.yaml --json",
)
def doctor(
    config: Config,
    overrides: Overrides = [],
    output: Annotated[Path, option("The page to write.", "FILE")] = Path("doctor.html"),
    card: Annotated[str | None, option("Memory of the GPU, such as 24GB; left out: of the one here.", "SIZE")] = None,
    device: Annotated[
        str | None,
        option("The GPU to reckon seconds for: H200, H100, A100, 4090, or a calibrated one.", "NAME"),
    ] = None,
    predict: Annotated[
        bool,
        flag("--predict", "Wait for the prediction of memory: half a minute the first time, remembered afterwards."),
    ] = False,
    vae: Annotated[
        bool,
        flag("--vae", "Load the VAE, put every clip through it, and show the frames that suffer most."),
    ] = False,
    json: Annotated[bool, flag("--json", "Print a JSON document.")] = False,
) -> int:
    """Look at the clips that training would see: a table here, and a page of frames, captions and faults.

    Exits with 2 where something stops training, and with 3 where there are warnings.
    """
    report = finetune.doctor(
        finetune.load_config(config, overrides), page=output, card=card, device=device, predict=predict, vae=vae
    )
    print(report.to_json() if json else report)
    if report.level != "error" and not json:
        print_next("precompute", *config_words(config, overrides))
    return {"error": USER_ERROR, "warning": WARNED}.get(report.level or "", OK)


@verb(
    _PANEL,
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
    dir: Annotated[Path | None, option("The cache's folder.", "DIR")] = None,
    config: Annotated[Path | None, option("A run's YAML file, for its cache.dir.", "FILE")] = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE ...", hidden=True)] = [],
    delete: Annotated[bool, flag("--delete", "Delete what verify or gc finds; without it they only say.")] = False,
    unused_days: Annotated[float | None, option("gc: also what no run has used for so long.", "DAYS")] = None,
    alone: Annotated[
        bool,
        flag("--alone", "gc, pack: nothing else uses the cache; asked for on file systems without locks."),
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
        store, where = Cache(finetune.load_config(config, overrides).cache.dir), config_words(config, overrides)
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
            print_next("cache", "verify", *where, "--delete")
        elif verified.missing and config is not None:
            print_next("precompute", *where)
        return OK if verified.ok else USER_ERROR
    if action == "gc":
        collected = cache_admin.gc(store, delete=delete, unused_days=unused_days, alone=alone)
        print(collected)
        if not delete and collected.bytes:
            print_next("cache", "gc", *where, "--delete", *(["--alone"] if alone else []))
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
    print_next("cache", "verify", *where)
    return OK


def _manifest_of(config: Path, overrides: list[str], store: Cache) -> str:
    """The name of the manifest that answers a configuration."""
    from finetune.caching.request import require_manifest
    from finetune.planner.plan import choose_memory

    chosen, _ = choose_memory(finetune.load_config(config, overrides))  # it decides how T5 is held
    return require_manifest(chosen, store).name
