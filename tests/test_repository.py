"""What holds for the package as a whole: folders are layers, no option is dead, signatures are short.

Every check is a function of its input, so that a canary can feed it something wrong and watch it fail.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import finetune
from finetune.config.messages import bare, is_section, is_union
from finetune.config.schema import RunConfig
from finetune.core.types import Strict

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


# ------------------------------------------------------------------------------------------------ folders are layers

LAYERS = (
    *("core", "cogvideox", "datasets", "memory", "optim", "methods", "checkpoint", "parallel", "config", "caching"),
    *(
        "inference",
        "conversion",
        "planner",
        "diagnosis",
        "captioning",
        "footage",
        "reports",
        "trainers",
        "web",
        "",
        "testing",
        "cli",
    ),
)
"""From the bottom up; the empty name stands for the files beside the folders: the library's verbs."""


def imports_from_above(modules: Mapping[str, str]) -> list[str]:
    """Every import of a folder that is not below the importer's, wherever it stands in ``modules`` (name -> text)."""
    faults = []
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):  # a relative import must be written out, too
                names = [f"{'.' * node.level or node.module}.{name}" for name in names]
            for target in (name for name in names if name.split(".")[0] in ("finetune", "")):
                folders = (f"{name}.".split(".")[1] for name in (module, target))
                own, other = (LAYERS.index(folder if folder in LAYERS else "") for folder in folders)
                if target[0] == "." or other > own:
                    faults.append(f"{module}:{node.lineno} imports {target}")
    return faults


def test_a_folder_imports_only_from_folders_below_it():
    folders = {path.name for path in (ROOT / "finetune").iterdir() if (path / "__init__.py").exists()}
    assert folders | {""} == set(LAYERS)
    assert not imports_from_above({name: text for name, text in sources().items() if name != "finetune.__main__"})


@pytest.mark.parametrize(
    ("module", "text", "fault"),
    [
        ("finetune.core.types", "def f():\n    from finetune.config.schema import RunConfig", "core.types:2 imports"),
        ("finetune.memory.config", "if 1:\n    import finetune.methods.lora", "imports finetune.methods.lora"),
        ("finetune.planner.search", "from finetune import train", "imports finetune.train"),
        ("finetune.conversion.export", "from finetune.cli import main", "imports finetune.cli.main"),
        ("finetune.core.files", "from . import types", "imports ..types"),
        ("finetune.trainers.loop", "from finetune.planner.search import x", None),
        ("finetune.cli.main", "from finetune import train", None),
    ],
)
def test_an_import_from_above_is_seen(module, text, fault):
    faults = imports_from_above({module: text})
    assert (fault in faults[0] and len(faults) == 1) if fault else faults == []


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


# ------------------------------------------------------------------------------------------- functions and docstrings

VERBS = ("data", "precompute", "runs", "sampling", "sharing")
"""Files of the package and of ``cli`` where the options of a command are the parameters of a function."""

MOST_PARAMETERS = 6

EXCEPTIONS = {
    "finetune.memory.runner.forward": "autograd calls it with what its block takes",
    "finetune.cogvideox.objective.sample_noise": "to be mended",
}
"""Functions with more parameters -> why. A row that no longer applies is deleted; none is added."""


def _holds_verbs(module: str) -> bool:
    return module.removeprefix("finetune.").removeprefix("cli.") in VERBS


def long_signatures(modules: Mapping[str, str]) -> set[str]:
    """Functions outside ``VERBS`` with more than ``MOST_PARAMETERS``, by module and name; ``self`` is not counted.

    Triton kernels are left out: they take pointers, sizes and strides one by one.
    """
    found = set()
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)) if not _holds_verbs(module) else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                    continue
                parts = node.args
                every = [*parts.posonlyargs, *parts.args, *parts.kwonlyargs, parts.vararg, parts.kwarg]
                names = [each.arg for each in every if each and each.arg not in ("self", "cls", "ctx")]
                if len(names) > MOST_PARAMETERS:
                    found.add(f"{module}.{node.name}")
    return found


def empty_docstrings(modules: Mapping[str, str]) -> list[str]:
    """What has a docstring that only sends its reader elsewhere."""
    return [
        f"{module}.{getattr(node, 'name', '')}: {text:.60}"
        for module, source in modules.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node) or "").startswith("See ")
    ]


def test_functions_take_few_arguments_and_docstrings_say_something():
    modules = sources()
    assert long_signatures(modules) == set(EXCEPTIONS)
    assert empty_docstrings(modules) == []


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("finetune.core.x", "class A:\n    def f(self, a, b, /, c, *d, e, **g): ...", False),
        ("finetune.core.x", "class A:\n    def f(self, a, b, /, c, *d, e, f, **g): ...", True),
        ("finetune.core.x", "if 1:\n    async def f(a, b, c, d, e, f, g): ...", True),
        ("finetune.cli.runs", "def f(a, b, c, d, e, f, g): ...", False),
    ],
)
def test_a_long_signature_is_seen(module, text, found):
    assert long_signatures({module: text}) == ({f"{module}.f"} if found else set())


def test_a_docstring_that_says_nothing_is_seen():
    text = '"""A module."""\nclass A:\n    def f(self):\n        """See ``g``."""\n'
    assert empty_docstrings({"finetune.core.x": text}) == ["finetune.core.x.f: See ``g``."]


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


# --------------------------------------------------------------------------------------------------------- the suite


def test_what_tests_share_is_made_by_one_worker(request):
    """A pytest that pytest-xdist does not know may lose the groups without a word; each worker then makes all of it."""
    if not request.config.getoption("loadgroup", False):  # which pytest-xdist sets in its workers
        pytest.skip("tests are not grouped")
    grouped = [item for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert [item.nodeid for item in grouped if "@" not in item.nodeid] == []
