"""How much there is to read: code lines per folder, and the files that four walks through the package lead through.

    python scripts/sizes.py [--no-walks] [--write]

With ``--write`` the folders' lines and files go into the table of ``docs/architecture.md`` instead.

Code lines are lines that hold code: no blanks, comments or docstrings. A walk is measured, not listed: a tiny model is
cached, trained, saved, continued and exported, and a file counts if one of its functions runs between the walk's first
and last. ``core`` is left out: errors, types and files are the words that every walk is told in.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tempfile
import threading
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER),
}
LIMITS = {"finetune": (13_000, 90), "tests": (14_000, None)}
WALKS = {
    "one clip, from its row to its loss": (16, ("caching", "datasets", "cogvideox", "memory", "trainers")),
    "a value of the configuration": (5, ("", "config", "optim", "trainers")),
    "save and resume": (6, ("checkpoint",)),
    "an export": (6, ("", "conversion", "methods")),
}
"""Walk -> how many files it may lead through, and the folders whose files count: an export also reads a configuration,
a checkpoint and a base model, but each of these is a walk of its own."""
BASE_MODEL = {f"cogvideox/{name}.py" for name in ("components", "config", "load", "model_files", "spec")}
"""Reading the base model, which a clip's walk passes by as well: a walk of its own, too."""
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- sizes: written by scripts/sizes.py --write -->", "<!-- /sizes -->"
HEAD = "| folder | what is in it | lines | files |\n|---|---|---|---|"
CONFIG = """\
model: {{pretrained: {model}, dtype: fp32}}
data: {{sources: [{{path: {clips}}}], buckets: [9x64x64], fps: 8}}
cache: {{dir: {cache}, decode_workers: 0}}
method: {{kind: lora, rank: 4, alpha: 8}}
optimizer: {{kind: adamw, lr: 1.0e-3}}
train: {{steps: {steps}}}
checkpoint: {{every: 1}}
output_dir: {output}
"""


def code_lines(source: str) -> int:
    """Lines of ``source`` that hold code."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            for statement in node.body:
                value = getattr(statement, "value", None)
                if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    documentation.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def folder_sizes(root: Path) -> dict[str, list[int]]:
    """Folder below the repository -> code lines of each of its files."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        sizes[path.parent.relative_to(ROOT).as_posix()].append(code_lines(path.read_text(encoding="utf-8")))
    return dict(sorted(sizes.items()))


@contextmanager
def files_run(under: set[CodeType]) -> Iterator[set[str]]:
    """The package's files in which a function runs while one of ``under`` does, in any thread."""
    files: set[str] = set()
    depths = threading.local()
    package = f"{ROOT / 'finetune'}/"

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "return") and frame.f_code in under:
            depths.count = getattr(depths, "count", 0) + (1 if event == "call" else -1)
        if event == "call" and (getattr(depths, "count", 0) or frame.f_code in under):
            name = frame.f_code.co_filename
            is_import = frame.f_code.co_name == "<module>"
            if name.startswith(package) and not name.startswith(f"{package}core/") and not is_import:
                files.add(name.removeprefix(package))

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def walks(folder: Path) -> dict[str, set[str]]:
    """Run the four walks in ``folder``: name -> files."""
    from finetune import export, load_config, precompute, train
    from finetune.caching.encode import encode_clips
    from finetune.checkpoint.load import checkpoint_to_continue, load_checkpoint
    from finetune.checkpoint.save import save_checkpoint
    from finetune.cogvideox.objective import velocity_losses
    from finetune.datasets.dataloader import BatchMaker
    from finetune.datasets.samples import read_samples
    from finetune.optim.optimizers import AdamW, set_lr
    from finetune.testing.demo import Scene, write_clips
    from finetune.testing.tiny import build_tiny

    model = build_tiny(folder / "model", "2b")
    write_clips(folder / "clips", [Scene("circle", "red", "left"), Scene("square", "blue", "up")])

    def config(steps: int) -> Path:
        path = folder / "run.yaml"
        names = {name: folder / name for name in ("clips", "cache", "output")}
        path.write_text(CONFIG.format(model=model, steps=steps, **names), encoding="utf-8")
        return path

    def code(*functions: Callable[..., Any]) -> set[CodeType]:
        return {function.__code__ for function in functions}

    found: dict[str, set[str]] = {}
    clip = code(read_samples, encode_clips, BatchMaker.training, velocity_losses)
    with files_run(clip) as found["one clip, from its row to its loss"]:
        precompute(load_config(config(1)), progress=False)
        report = train(load_config(config(1)))
    with files_run(code(load_config, AdamW.build, set_lr)) as found["a value of the configuration"]:
        train(load_config(config(2)))
    with files_run(code(save_checkpoint, checkpoint_to_continue, load_checkpoint)) as found["save and resume"]:
        train(load_config(config(3)))
    with files_run(code(export)) as found["an export"]:
        export(report.run_dir)
    return found


def write_table() -> None:
    """Put a row per folder, its docstring and its sizes, into ``docs/architecture.md``, highest first."""
    from draw_layers import VERBS, folder_imports, rows_of

    rows, sizes = [], folder_sizes(ROOT / "finetune")
    height = {f"finetune/{name}": row for name, row in rows_of(folder_imports(ROOT / "finetune")).items()}
    height["finetune"] = height.pop(f"finetune/{VERBS}")
    for folder, files in sorted(sizes.items(), key=lambda item: -height[item[0]]):
        text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        name, what = folder.partition("/")[2] or VERBS, " ".join(text.partition("\n\n")[0].replace("``", "`").split())
        rows.append(f"| `{name}` | {what} | {sum(files):,} | {len(files)} |")
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(
        before + begin + "\n".join(["", "", HEAD, *rows, "", ""]) + END + rest.partition(END)[2], encoding="utf-8"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-walks", action="store_true", help="only count lines")
    parser.add_argument("--write", action="store_true", help="write the table of docs/architecture.md instead")
    arguments = parser.parse_args()
    if arguments.write:
        return write_table()
    for name, (most_lines, most_files) in LIMITS.items():
        sizes = folder_sizes(ROOT / name)
        for folder, files in sizes.items():
            print(f"{sum(files):7,} code lines in {len(files):3} files, largest {max(files):4}  {folder}")
        lines, count = sum(map(sum, sizes.values())), sum(map(len, sizes.values()))
        goal = f"at most {most_lines:,}" + (f" in {most_files}" if most_files else "")
        print(f"{lines:7,} code lines in {count:3} files; goal {goal}\n")
    if not arguments.no_walks:
        with tempfile.TemporaryDirectory() as folder:
            for walk, files in walks(Path(folder)).items():
                most, folders = WALKS[walk]
                counted = (name for name in files - BASE_MODEL if not name.endswith("__init__.py"))
                own = sorted(name for name in counted if name.rpartition("/")[0] in folders)
                print(f"{walk}: {len(own)} files; goal at most {most}\n    {', '.join(own)}")


if __name__ == "__main__":
    main()
