"""An example is production code: every configuration, command and YAML fragment shown is run or parsed.

Every check is a function of its input, so that a canary can feed it something wrong and watch it fail.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import finetune
from finetune.cli.init import EXAMPLES, RECIPES
from finetune.cli.main import app, one_value_each
from finetune.cogvideox.model_files import HUB_IDS, known_model
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against
from finetune.config.schema import RunConfig, json_schema, load_config
from finetune.core.errors import ConfigError

ROOT = Path(finetune.__file__).parent.parent


def test_configs_are_what_the_generator_writes():
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("cogvideox-*.yaml")}
    assert len(files) == len(EXAMPLES) + len(RECIPES) == 27
    assert files == _script("make_configs").generate(), "run `make docs`"


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_loads_and_fits_its_model(path):
    config = load_config(path)
    variants = [variant for variant, hub_id in HUB_IDS.items() if hub_id == config.model.pretrained]
    assert variants, f"{path.name} is for a model that no shipped JSON describes"
    findings = check_against(config, read_spec(str(known_model(variants[0]))))
    assert findings == ((), ())


def test_there_is_an_example_for_every_model_and_method():
    made_for = {(config.model.pretrained, config.method.kind) for config in map(load_config, CONFIGS)}
    assert {(hub_id, kind) for hub_id in HUB_IDS.values() for kind in ("lora", "full")} <= made_for


def test_the_example_check_can_fail(tmp_path):
    text = CONFIGS[0].read_text(encoding="utf-8")
    (tmp_path / "a.yaml").write_text(text.replace("caption_dropout", "caption_droput"), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'caption_dropout'"):
        load_config(tmp_path / "a.yaml")


def generated_docs() -> dict[str, str]:
    texts: dict[str, str] = _script("make_config_docs").generate()
    return texts


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_up_to_date():
    for name, text in generated_docs().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name} is stale: run `make docs`"


@pytest.mark.parametrize("name", ["make_config_docs", "make_configs"])
def test_the_generators_say_what_is_stale(name, tmp_path, monkeypatch, capsys):
    module = _script(name)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", [name, "--check"])
    assert module.main() == 1 and not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", [name])
    assert module.main() == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr("sys.argv", [name, "--check"])
    assert module.main() == 0
    written[0].write_text("edited by hand")
    assert module.main() == 1 and written[0].name in capsys.readouterr().out.splitlines()[-1]


def test_the_configuration_reference_names_every_field():
    page = generated_docs()["config.md"]
    names = {field for part in json_schema()["$defs"].values() for field in part["properties"]} - {"kind"}
    assert len(names) >= 60
    assert not [name for name in names if f"| `{name}` |" not in page]
    for kind in ("lora", "full", "adamw8bit", "custom", "cosine", "metadata"):
        assert f"kind: {kind}\n" in page


# ------------------------------------------------------------------------------------------------- documented commands

DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
DOCS += sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FENCE = re.compile(r"^ *```(\S*)[ ]*([^\n]*)\n(.*?)^ *```", re.M | re.S)
WORDS = re.compile(r"`finetune ([a-z]+)((?:[ \n][^`\n]*){0,2})`")
CHECKED = ("finetune", "accelerate", "make", "python", "python3", "torchrun")
OTHERS = {"source .venv/bin/activate", "tensorboard --logdir runs", "tensorboard --logdir quickstart"}
"""Commands in ``bash`` blocks that are not ours."""
EMBEDDED = re.compile(r"(?<![\w-])(?:finetune [a-z]+|accelerate launch) [^;|&'\n]*")


def commands(text: str) -> Iterator[str]:
    """Every line of a page's ``bash`` blocks, and what is ours within a line of its ``sh`` and ``text`` blocks.

    Those are scripts for other machines and what programs print. Continued lines are joined.
    """
    for language, _more, body in FENCE.findall(text):
        body = body.replace("\\\n", " ")
        if language == "bash":
            yield from (line.strip().removeprefix("$ ") for line in body.splitlines() if line.strip())
        elif language in ("sh", "text"):
            yield from EMBEDDED.findall(body.replace('bash -c "', ""))


def command_fault(command: str) -> str | None:
    """What is wrong with a documented command; None where nothing is."""
    if command in OTHERS:
        return None
    words = shlex.split(command.replace("$((SLURM_NNODES * 8))", "16"), comments=True)
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    program = words[0].removeprefix(".venv/bin/")
    if words[:2] == ["pip", "install"]:  # which extras there are: tests/test_packaging.py
        return None
    if program not in CHECKED:
        return f"{program} is not known to this test"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"make has no target {unknown}" if unknown else None
    if program == "finetune":
        return _parse_fault(words[1:])
    return _launch_fault(program, words[1:])


def _launch_fault(program: str, words: list[str]) -> str | None:
    for index, word in enumerate(words):
        previous = words[index - 1] if index else ""
        if previous == "--config_file" and not (ROOT / word).is_file():
            return f"there is no file {word}"
        if word == "train.py":
            return _parse_fault(words[index + 1 :], verb="train")
        if previous == "-m":
            if word == "finetune":
                return _parse_fault(words[index + 1 :])
            return None if importlib.util.find_spec(word) else f"there is no module {word}"
        if word.endswith(".py"):
            return None if (ROOT / word).is_file() else f"there is no file {word}"
    return None if program.startswith("python") else f"{program} starts nothing of ours"


COMMAND = typer.main.get_command(app)
"""The whole command line; typer shows the parsers of its verbs as ``commands``."""


def _parse_fault(words: list[str], verb: str | None = None) -> str | None:
    words = [*([verb] if verb else []), *one_value_each(words)]
    try:
        with redirect_stdout(StringIO()):
            context = COMMAND.make_context("finetune", words)
            name, parser, rest = COMMAND.resolve_command(context, [*context._protected_args, *context.args])
            parser.make_context(name, rest, parent=context)
    except typer.Exit:
        return None
    except typer.TyperException as error:
        return error.format_message()
    return None


def mention_fault(verb: str, rest: str) -> str | None:
    """What is wrong with a command named in passing, such as `finetune cache gc`: its verb and options must exist."""
    if verb not in COMMAND.commands:
        return f"there is no verb {verb}"
    known = {name for parameter in COMMAND.commands[verb].params for name in parameter.opts}
    unknown = [word for word in re.findall(r"(?<=\s)--[\w-]+", rest) if word not in known]
    return f"{verb} has no option {unknown}" if unknown else None


def test_every_documented_command_can_be_typed():
    faults, counted = [], 0
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        words = [words for _language, words, _body in FENCE.findall(text) if words]
        faults += [f"{path.name}: {one!r} after a block's language: the site takes it for no block" for one in words]
        for command in commands(text):
            counted += 1
            if fault := command_fault(command):
                faults.append(f"{path.relative_to(ROOT)}: {command}: {fault}")
    assert counted >= 130
    assert not faults, "\n".join(faults)


def test_every_command_named_in_passing_exists():
    """In prose, and in the fixes that error messages propose."""
    texts = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in [*DOCS, *(ROOT / "finetune").rglob("*.py")]
    }
    found = [(name, *match) for name, text in texts.items() for match in WORDS.findall(text)]
    assert len(found) >= 15
    faults = [
        f"{name}: finetune {verb}{rest}: {fault}" for name, verb, rest in found if (fault := mention_fault(verb, rest))
    ]
    assert not faults, "\n".join(faults)


def test_what_the_guides_from_other_trainers_name_as_ours_exists():
    """Commands and options in the column "here"."""
    options = {name for command in COMMAND.commands.values() for option in command.params for name in option.opts}
    faults, counted = [], 0
    for path in sorted((ROOT / "docs").glob("coming-from-*.md")):
        rows = re.findall(r"^\|[^|]*\|([^|]*)\|", path.read_text(encoding="utf-8"), re.M)
        for words in re.findall(r"`([^`]*)`", "\n".join(rows)):
            counted += words.startswith(("finetune ", "accelerate ", "--"))
            program = words.split()[0]
            unknown = program not in options if words.startswith("--") else program in CHECKED and command_fault(words)
            if unknown:
                faults.append(f"{path.name}: {words}: {unknown}")
    assert counted >= 25
    assert not faults, "\n".join(faults)


def test_the_options_that_errors_name_exist():
    """``where="--adapter ..."`` and ``fix="... with --output"`` in the modules behind a verb."""
    modules = (
        ("export", "conversion/export", 3),
        ("export", "conversion/source", 1),
        ("inspect", "conversion/stored", 1),
        ("convert", "conversion/convert", 3),
        ("convert", "conversion/pipelines", 2),
        ("convert", "conversion/structure", 1),
        ("generate invert vae story", "inference/*", 8),
    )
    for verbs, names, least in modules:
        texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "finetune").glob(f"{names}.py"))]
        own = [re.sub(rf"finetune (?!(?:{verbs.replace(' ', '|')})\b)\w+ [^\"`]*", "", text) for text in texts]
        named = {option for text in own for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
        assert len(named) >= least
        nowhere = [name for name in named if all(mention_fault(verb, f" {name}") for verb in verbs.split())]
        assert not nowhere, f"no option of {verbs}: {nowhere}"


def test_the_examples_of_the_command_line_can_be_typed():
    texts = [COMMAND.help, *(command.epilog for command in COMMAND.commands.values())]
    examples = [line for text in texts for line in re.findall(r"^  ((?:finetune|accelerate) .*)", text, re.M)]
    assert len(examples) >= 18
    faults = [f"{line}: {fault}" for line in examples if (fault := command_fault(line))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("finetune trian --config run.yaml", "No such command 'trian'"),
        ("finetune train", "--config"),
        ("finetune export runs/run --too diffusers", "No such option: --too"),
        ("make quickstrat", "no target"),
        ("accelerate launch train.py --confg run.yaml", "--confg"),
        ("accelerate launch --config_file accelerate_configs/none.yaml train.py --config a", "no file"),
        ("accelerate launch", "starts nothing"),
        ("python scripts/none.py", "no file"),
        (".venv/bin/python -m finetune check", "--config"),
        ("HF_HUB_OFFLINE=1 torchrun --nproc_per_node 2 train.py", "--config"),
        ("python -m no_such_module", "no module"),
    ],
)
def test_the_command_check_can_fail(command, said):
    assert said in (command_fault(command) or "")


def test_the_command_check_reads_blocks_and_mentions():
    page = "text\n```bash\nfinetune train \\\n  --config a.yaml  # go\n\nls\n```\n```yaml\nfinetune x\n```\n"
    page += '```sh\nsrun bash -c "finetune train --config a.yaml; exec finetune cache gc"\n```\n'
    assert list(commands(page)) == [
        "finetune train    --config a.yaml  # go",
        "ls",
        "finetune train --config a.yaml",
        'finetune cache gc"',
    ]
    assert "not known" in (command_fault("ls") or "")
    assert command_fault("finetune train    --config a.yaml  # go") is None
    assert "no verb" in (mention_fault("trian", "") or "")
    assert "no option" in (mention_fault("cache", " verify --delet") or "")
    assert mention_fault("cache", " verify --delete") is None


def test_yaml_in_the_docs_is_valid_configuration():
    base = {
        "model": {"pretrained": "x"},
        "data": {"sources": [{"path": "a"}], "buckets": ["49x480x720"]},
        "train": {"steps": 1},
        "output_dir": "out",
    }
    counted = 0
    for path in DOCS:
        for language, _mark, body in FENCE.findall(path.read_text(encoding="utf-8")):
            if language == "yaml":
                counted += 1
                fragment = yaml.safe_load(body)
                merged = {
                    key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
                    for key, value in fragment.items()
                }
                RunConfig.from_dict({**base, **merged})
    assert counted >= 4


def program_fault(code: str) -> str | None:
    """What is wrong with a Python block that no test runs: it does not compile, or imports what is not ours."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return str(error)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "finetune":
            module = importlib.import_module(node.module or "")
            if absent := [name.name for name in node.names if not hasattr(module, name.name)]:
                return f"{node.module} has no {absent}"
    return None


def test_programs_in_the_docs_compile_and_import_what_exists():
    blocks = [
        (path.name, textwrap.dedent(body))
        for path in DOCS
        for language, _more, body in FENCE.findall(path.read_text(encoding="utf-8"))
        if language == "python"
    ]
    faults = [f"{name}: {fault}\n{code}" for name, code in blocks if (fault := program_fault(code))]
    assert len(blocks) >= 15 and not faults, "\n".join(faults)
    assert program_fault("from finetune.core.files import fro_here") and program_fault("print(") is not None  # canary


# ------------------------------------------------------------------------------------------------------ links, the site

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.*)$", re.M)


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    slugs: list[str] = []
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        slugs.append(f"{words}-{slugs.count(words)}" if words in slugs else words)
    return set(slugs)


def link_faults(page: Path) -> list[str]:
    """Links of a page that lead to no file of the repository, or to no heading of a page."""
    faults = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith(("https://", "mailto:")):
            continue
        if not target.exists():
            faults.append(f"{page.name}: there is no {link}")
        elif fragment and fragment not in anchors(target.read_text(encoding="utf-8")):
            faults.append(f"{page.name}: there is no heading for {link}")
    return faults


def test_every_link_leads_somewhere(tmp_path):
    """In the repository; of the site that is made of these pages, tests/test_site.py says the same."""
    pages = [path for path in DOCS if path.suffix == ".md"]
    faults = [fault for page in pages for fault in link_faults(page)]
    assert not faults, "\n".join(faults)
    (tmp_path / "a.md").write_text("# It's `a`: b\n[x](#its-a-b) [y](b.md) [z](#c) [w](https://example.org)\n")
    assert link_faults(tmp_path / "a.md") == ["a.md: there is no b.md", "a.md: there is no heading for #c"]


def targets(entries: list[Any]) -> Iterator[str]:
    """The pages of a navigation, in its order."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else targets(value)


def test_every_page_has_one_place_in_the_navigation(tmp_path):
    settings = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    named = list(targets(settings["project"]["nav"]))
    pages = [str(path) for path in _script("make_site").copy_pages(tmp_path) if path.suffix == ".md"]
    assert sorted(named) == sorted(pages), "nav in zensical.toml"
    assert named[:2] == ["README.md", "docs/quickstart.md"]


def test_two_commits_that_differ_are_told_apart():
    differences = _script("equality").differences
    before = {"5b lora": {"curves": {"train/loss": [0.5, 0.25]}, "weights": "ab"}, "cache": {"a": "1"}}
    assert differences(before, before) == []
    after = {"5b lora": {"curves": {"train/loss": [0.5, 0.2500001]}, "weights": "ab"}, "cache": {"b": "1"}}
    assert [line.split(":")[0] for line in differences(before, after)] == [
        "5b lora / curves / train/loss",
        "cache / a",
        "cache / b",
    ]


def test_the_picture_of_the_folders_is_that_of_the_imports():
    """``make docs`` draws it; a new arrow between two folders is seen where one reads about them."""
    layers = _script("draw_layers")
    imports = layers.folder_imports(ROOT / "finetune")
    assert layers.TARGET.read_text(encoding="utf-8") == layers.draw(imports), "make docs"
    assert layers.draw(imports | {"core": {"memory"}, "memory": set()}) != layers.draw(imports)  # canary
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in imports if f"| `{name}` |" not in table] == []
