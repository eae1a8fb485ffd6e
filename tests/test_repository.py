"""What holds for the package as a whole: imports point down, no option is dead, files stay readable.

Every check is a function of its input, so that a canary can feed it something wrong and watch it fail.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import finetune
from finetune.config import RunConfig
from finetune.config.messages import bare, is_section, is_union
from finetune.section import Strict

ROOT = Path(finetune.__file__).parent.parent


def sources(folder: str = "finetune") -> dict[str, str]:
    """Dotted module name -> source text."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
            encoding="utf-8"
        )
        for path in paths
    }


# ------------------------------------------------------------------------------------------------ imports point down

_SOURCES = ("sources", "layouts", "folders", "columns", "rows", "tables", "parquet", "parquet_child", "lines")
LAYERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("types",),
        ("errors", "text"),
        ("progress",),
        ("section",),
        ("files", "space", "tensorfiles", "seals"),
        ("leases",),
        ("streams",),
        ("version",),
    ),
    (
        ("facts",),
        ("diffusion",),
        ("schedule",),
        ("holdout",),
        ("geometry",),
        ("bands",),
        ("videos",),
        ("ranks",),
        ("cards",),
    ),
    (
        ("cogvideox",),
        (
            "datasets.cache",
            "datasets.entries",
            "datasets.garbage",
            "datasets.jobs",
            "datasets.manifest",
            "datasets.reading",
            "datasets.sealed",
            "datasets.stamps",
            "datasets.upkeep",
        ),
        tuple(f"datasets.{name}" for name in _SOURCES),
        ("datasets.video", "datasets.media"),
        ("trainers.method",),
        ("trainers.optim",),
        ("trainers.checkpoint",),
        ("trainers.validation",),
        ("trainers.tracking",),
        ("trainers.meter",),
        ("trainers.ema",),
        ("trainers.determinism",),
        ("trainers.audit",),
        ("trainers.stopping",),
        ("memory",),
        ("demo",),
        ("tiny",),
        ("starter_text",),
        ("recipes",),
    ),
    (
        ("config",),
        ("datasets.loader",),
        ("caching.encode",),
        ("generate_inputs", "adapter_source"),
        ("sampling",),
        ("trainers.engine",),
        ("trainers.objective",),
        ("trainers.run_folder",),
    ),
    (
        ("precompute", "caching"),
        ("export", "exporting"),
        ("generate",),
        ("starter",),
        ("planning",),
    ),
    (
        (
            "trainers.loop",
            "trainers.assemble",
            "trainers.fault_report",
            "trainers.ladder",
            "trainers.sampler",
            "trainers.supply",
            "replay",
            "replay_report",
            "trainers.spread",
            "trainers.run",
            "trainers.validator",
        ),
    ),
    (("", "__main__", "cli", "arguments", "console", "quickstart"),),
)
"""From the bottom up: layers of rooms. A room is one or a few modules or packages that belong together; they may import
each other, and any lower room. The empty name is ``finetune/__init__.py``."""
EMPTY_PACKAGES = ("finetune.datasets", "finetune.trainers", "finetune.assets")
API = {"load_config": "config", "precompute": "precompute", "train": "trainers.loop", "export": "export"}


def place_of(module: str) -> tuple[int, int] | None:
    """(layer, room) of ``finetune.<...>``, by the longest name that matches; None where the table does not know it."""
    name = module.removeprefix("finetune").removeprefix(".")
    found = [
        (len(member), (layer, room))
        for layer, rooms in enumerate(LAYERS)
        for room, members in enumerate(rooms)
        for member in members
        if name == member or (member and name.startswith(member + "."))
    ]
    return max(found)[1] if found else None


def imports_of(text: str, known: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of ours, wherever it stands: inside functions and under TYPE_CHECKING too."""
    known = set(known)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "finetune" and alias.name != "finetune":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif (node.module or "").split(".")[0] == "finetune":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    api = API.get(alias.name) if node.module == "finetune" else None
                    yield node.lineno, f"finetune.{api}" if api else inner if inner in known else str(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "finetune" and node.attr in API:
            yield node.lineno, f"finetune.{API[node.attr]}"  # `import finetune` is harmless, its lazy names are imports


def import_faults(modules: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """What is wrong with the imports of ``modules`` (name -> text), of which ``known`` are all there are."""
    faults = []
    for module, text in modules.items():
        if module in EMPTY_PACKAGES:
            if text.strip():
                faults.append(f"{module}/__init__.py must stay empty: importing any part of it runs it")
            continue
        own = place_of(module)
        if own is None:
            faults.append(f"{module} stands in no layer: add it to LAYERS and to docs/architecture.md")
            continue
        for line, target in imports_of(text, known):
            other = place_of(target) if not target.startswith(".") else None
            if target.startswith("."):
                faults.append(f"{module}:{line} imports {target}: write the whole name")
            elif other is None:
                faults.append(f"{module}:{line} imports {target}, which stands in no layer")
            elif other != own and other[0] >= own[0]:
                faults.append(f"{module}:{line} (layer {own[0]}) imports {target} (layer {other[0]})")
    return faults


def test_imports_point_down():
    modules = sources()
    assert len(modules) >= 25
    counted = sum(1 for text in modules.values() for _ in imports_of(text, modules))
    assert counted >= 100
    faults = import_faults(modules, modules)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        (
            "finetune.types",
            "from finetune.config import RunConfig",
            "finetune.types:1 (layer 0) imports finetune.config",
        ),
        (
            "finetune.diffusion",
            "def f():\n    import finetune.cli",
            "finetune.diffusion:2 (layer 1) imports finetune.cli",
        ),
        ("finetune.memory", "if TYPE_CHECKING:\n    from finetune.tiny import x", "imports finetune.tiny (layer 2)"),
        ("finetune.datasets.video", "from finetune.datasets.cache import Cache", "imports finetune.datasets.cache"),
        ("finetune.geometry", "from finetune import facts", "imports finetune.facts (layer 1)"),
        ("finetune.facts.read", "from finetune import train", "imports finetune.trainers.loop"),
        (
            "finetune.files",
            "import finetune\nfinetune.load_config('x')",
            "finetune.files:2 (layer 0) imports finetune.config",
        ),
        ("finetune.export", "from . import cli", "write the whole name"),
        ("finetune.novel", "import torch", "finetune.novel stands in no layer"),
        ("finetune.trainers", "import torch", "must stay empty"),
    ],
)
def test_the_import_check_can_fail(module, text, said):
    faults = import_faults({module: text}, sources())
    assert len(faults) == 1 and said in faults[0]


def test_the_import_check_allows_what_is_meant():
    fine = {
        "finetune.types": "import torch",
        "finetune.config.load": "from finetune.config.schema import RunConfig\nfrom finetune.facts import Facts",
        "finetune.datasets.upkeep": "from finetune.datasets.cache import Cache",
        "finetune.cli": "def f():\n    from finetune import train",
        "finetune.datasets.video": "import finetune\nprint(finetune.__path__)",
    }
    assert not import_faults(fine, sources())


def test_the_layers_name_only_what_is_there():
    """A module that is gone must leave the table, and one must not stand in two rooms."""
    names = [member for rooms in LAYERS for members in rooms for member in members if member]
    assert len(names) == len(set(names))
    missing = [name for name in names if f"finetune.{name}" not in sources()]
    assert not missing, missing


# --------------------------------------------------------------------------------------------------- no option is dead


def sections(kind: type[BaseModel], owner: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(name under which code holds it, class) of every section below ``kind``, members of unions and items too."""
    for name, info in kind.model_fields.items():
        stack, item = [info.annotation], False
        while stack:
            annotation = bare(stack.pop())
            if is_section(annotation):
                held = name.removesuffix("s") if item else name
                yield held, annotation
                yield from sections(annotation, held)
            elif is_union(annotation):
                stack += get_args(annotation)
            elif get_args(annotation):
                item = True
                stack += [part for part in get_args(annotation) if part is not Ellipsis]


class _Reads(ast.NodeVisitor):
    """Collects (owner, field) of attribute reads.

    The owner is the attribute before (``config.train.steps``), a name, what that name was assigned from
    (``train = config.train``), the types it is annotated with, or the class that ``self`` is of.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self._class = ""
        self._annotated: dict[str, str] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self._annotated)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self._annotated.pop(argument.arg, None)
            if argument.annotation is not None:
                self._annotated[argument.arg] = ast.unparse(argument.annotation)
        self.generic_visit(node)
        self._annotated = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, ast.Attribute):
                    self._annotated[name.id] = value.attr
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return
        if isinstance(node.value, ast.Attribute):
            self.found.add((node.value.attr, node.attr))
        elif isinstance(node.value, ast.Name):
            owner = node.value.id
            self.found.add((self._class if owner == "self" else owner, node.attr))
            for name in re.findall(r"\w+", self._annotated.get(owner, "")):
                self.found.add((name, node.attr))


def dead_options(root: type[BaseModel], texts: Iterable[str]) -> tuple[list[str], int]:
    """Fields that no code reads off something that holds their section, and how many fields were looked at."""
    reads = _Reads()
    for text in texts:
        reads.visit(ast.parse(text))
    owners: dict[tuple[str, str], set[str]] = {}  # (declaring class, field) -> names of who holds it
    for held, section in [("config", root), *sections(root, "config")]:
        for field, info in section.model_fields.items():
            if field == "kind" and len(get_args(info.annotation)) == 1:
                continue  # the tag of a union: pydantic reads it
            declared = next(base for base in reversed(section.__mro__) if field in getattr(base, "model_fields", {}))
            holders = {base.__name__ for base in section.__mro__ if issubclass(base, declared)}
            owners.setdefault((declared.__name__, field), {held}).update({held}, holders)
    dead = [
        f"{held}.{field}"
        for (held, field), names in owners.items()
        if not any((n, field) in reads.found for n in names)
    ]
    return sorted(dead), len(owners)


def test_every_option_is_read():
    dead, looked_at = dead_options(RunConfig, sources().values())
    assert looked_at >= 75
    assert not dead, f"declared, and read nowhere: {dead}"


def test_the_dead_option_check_can_fail():
    class Inner(Strict):
        """A section."""

        read: int = 1
        dead: int = 2

    class Item(Strict):
        """An item."""

        path: str = ""
        never: str = ""

    class Root(Strict):
        """A configuration."""

        inner: Inner
        things: tuple[Item, ...] = ()

    code = (
        "def f(config):\n    config.other.dead = config.inner.read\n    return [thing.path for thing in config.things]"
    )
    assert dead_options(Root, [code]) == (["Inner.dead", "Item.never"], 6)
    by_annotation = "def g(it: Inner, other: Item | None):\n    return it.dead, other.never"
    assert dead_options(Root, [code, by_annotation]) == ([], 6)
    by_assignment = "def h(run):\n    a, x = run.config, run.config.inner\n    return x.dead"
    assert dead_options(Root, [code, by_assignment]) == (["Item.never"], 6)


# ------------------------------------------------------------------------------------------------ files stay readable

MAX_LINES = 350


def oversized(texts: Mapping[str, str]) -> list[str]:
    return [f"{name}: {count} lines" for name, text in texts.items() if (count := len(text.splitlines())) > MAX_LINES]


def test_no_file_is_too_long_to_read():
    texts = sources() | sources("scripts") | {"train": (ROOT / "train.py").read_text(encoding="utf-8")}
    assert len(texts) >= 25
    assert not oversized(texts), oversized(texts)


def test_the_length_check_can_fail():
    assert oversized({"a": "x\n" * MAX_LINES, "b": "x\n" * (MAX_LINES + 1)}) == [f"b: {MAX_LINES + 1} lines"]


# ---------------------------------------------------------------------------------------------------- seeded faults


@pytest.fixture(scope="module")
def mutants():
    """``scripts/mutants.py`` as a module."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


def test_every_seeded_fault_applies(mutants):
    rows = mutants.read_table()
    assert len(rows) >= 50 and len({row.area for row in rows}) >= 12
    faults = mutants.table_faults(rows, mutants.package_texts(), mutants.test_files())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"find": "a = 3"}, "stands 0 times"),
        ({"find": "= 1"}, "stands 2 times in the package, not once (one.py, two.py)"),
        ({"find": "b"}, "stands 2 times in the package, not once (two.py)"),
        ({"put": "a = 1"}, "changes nothing"),
        ({"put": "a = ("}, "one.py is no Python with it"),
        ({"tests": ("none -k any",)}, "no test file for 'none -k any'"),
        ({"tests": ()}, "names no test"),
    ],
)
def test_the_check_of_seeded_faults_can_fail(mutants, change, said):
    texts, tests = {Path("one.py"): "a = 1\n", Path("two.py"): "b = 1\nb += 2\n"}, {"some": Path("test_some.py")}
    row = {"name": "x", "area": "y", "fault": "z", "find": "a = 1", "put": "a = 2", "tests": ("some -k any",)}
    assert not mutants.table_faults([mutants.Mutant(**row)], texts, tests)
    faulty = mutants.Mutant(**{**row, **change})
    (fault,) = mutants.table_faults([faulty], texts, tests)
    assert fault.startswith("x: ") and said in fault
    twice = mutants.table_faults([mutants.Mutant(**row)] * 2, texts, tests)
    assert twice == ["x: another row is called so"]


def test_one_version():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert finetune.__version__ == stated
