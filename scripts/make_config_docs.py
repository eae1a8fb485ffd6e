#!/usr/bin/env python3
"""Write ``docs/config.md``, ``docs/config.schema.json`` and a table of ``docs/training.md`` from declarations in code.

``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.config import starting_points
from finetune.config.schema import json_schema
from finetune.core.files import atomic_write_text

INTRODUCTION = """\
<!-- Written by scripts/make_config_docs.py from the declarations in finetune/. Change those, then run `make docs`. -->

# Configuration

A run is one YAML file. It is strict: an unknown key is an error that names the nearest known one, and all errors are
reported together, each with its line. Relative paths start at the file's folder, `~` is the home folder, and `$NAME`
an environment variable, which must be set. Scalars are YAML 1.2: `1e-4` is a number, `off` and `no` are words.
`--set optimizer.lr=2e-4 data.sources.0.path=clips` overrides fields from the command line, as though the file had said
so; the value is YAML. A section whose `kind` is left out takes the default kind, where it has one.

`finetune init` writes a commented file, `configs/` holds one per model and method, and `docs/config.schema.json` is the
same reference for editors: put `# yaml-language-server: $schema=<path to it>` on the first line of a file. The resolved
configuration, every default filled in, is saved with the run as `config.yaml`, and can be run again.
"""

Schema = Mapping[str, Any]


class Docs:
    """Renders the JSON schema of a run as one Markdown page."""

    def __init__(self, schema: Schema) -> None:
        self.root = schema
        self.fields = 0

    def page(self) -> str:
        """The whole page."""
        lines = [INTRODUCTION, "## Sections", "", "| section | what it says |", "|---|---|"]
        sections: dict[str, Schema] = dict(self.root["properties"])
        required = self.root["required"]
        for name, schema in sections.items():
            link = f"[`{name}`](#{name})" if self.members(schema) else f"`{name}` ({self.type_of(schema)})"
            lines.append(
                f"| {link}{', required' if name in required else ''} | {cell(schema.get('description', ''))} |"
            )
        self.fields += sum(not self.members(schema) for schema in sections.values())
        for name, schema in sections.items():
            if self.members(schema):
                lines += ["", f"## {name}", "", *self.section(name, schema)]
        return "\n".join(lines) + "\n"

    def section(self, path: str, schema: Schema) -> Iterator[str]:
        """Text and tables of one section: one table, or one per kind, then those of sections and lists inside it."""
        members = self.members(schema)
        if len(members) == 1:
            yield paragraph(members[0].get("description", ""))
            yield from self.table(members[0], list(members[0]["properties"]))
        else:
            yield from self.kinds(path, members, schema.get("default", {}).get("kind"))
        inside = {name: field for member in members for name, field in member["properties"].items()}
        for name, field in inside.items():
            if self.members(field.get("items", field)):
                yield from ["", f"### {path}.{name}", ""]
                if "items" in field:
                    yield from [f"Each item of `{path}.{name}`:", ""]
                yield from self.section(f"{path}.{name}{'[]' if 'items' in field else ''}", field.get("items", field))

    def kinds(self, path: str, members: list[Schema], default: str | None) -> Iterator[str]:
        """A union: the fields that all kinds share, then each kind's own."""
        kinds = {str(member["properties"]["kind"]["const"]): member for member in members}
        shown = ", ".join(f"`{kind}`" + (" (the default)" if kind == default else "") for kind in kinds)
        yield f"`{path}.kind` is one of {shown}."
        first, *others = members
        shared = [
            name
            for name, field in first["properties"].items()
            if name != "kind" and all(other["properties"].get(name) == field for other in others)
        ]
        if shared:
            yield from ["", "Of every kind:"]
            yield from self.table(first, shared)
        for kind, member in kinds.items():
            yield from ["", f"#### {path}.kind: {kind}", "", paragraph(member.get("description", ""))]
            yield from self.table(member, [name for name in member["properties"] if name not in ("kind", *shared)])

    def table(self, member: Schema, names: list[str]) -> Iterator[str]:
        """One table of fields; nothing where there are none."""
        if not names:
            return
        yield from ["", "| field | type | default | meaning |", "|---|---|---|---|"]
        for name in sorted(names, key=lambda name: name != "sources"):  # the rest of a section follows from it
            field = member["properties"][name]
            self.fields += 1
            default = "required" if name in member.get("required", []) else f"`{json.dumps(field.get('default', {}))}`"
            yield f"| `{name}` | {self.type_of(field)} | {default} | {cell(field.get('description', ''))} |"

    def members(self, schema: Schema) -> list[Schema]:
        """The object schemas that a field's value can be: none for a plain value, several for a union."""
        found = [self.resolve(part) for part in schema.get("oneOf", schema.get("anyOf", [schema]))]
        return [part for part in found if part.get("type") == "object" and "properties" in part]

    def resolve(self, schema: Schema) -> Schema:
        """Follow a reference to a definition."""
        if "$ref" in schema:
            definition: Schema = self.root["$defs"][schema["$ref"].rpartition("/")[2]]
            return definition
        return schema

    def type_of(self, schema: Schema) -> str:
        """A field's type in words."""
        if "examples" in schema:  # a bucket: the pattern of its text form says nothing to a person
            return (
                "text such as "
                + " or ".join(f"`{example}`" for example in schema["examples"])
                + " or a list of numbers"
            )
        if "anyOf" in schema or "oneOf" in schema:
            return " or ".join(dict.fromkeys(self.type_of(part) for part in schema.get("anyOf", schema.get("oneOf"))))
        if "enum" in schema:
            return " or ".join(f"`{value}`" for value in schema["enum"])
        if "const" in schema:
            return f"`{schema['const']}`"
        if self.members(schema):
            return "section"
        match schema.get("type"):
            case "array" if "prefixItems" in schema:
                return "list of " + ", ".join(self.type_of(part) for part in schema["prefixItems"])
            case "array":
                items = schema["items"]
                return "list of " + ("sections, see below" if self.members(items) else self.type_of(items))
            case "integer" | "number" as number:
                return f"{number}{limits(schema)}"
            case "string":
                return "path" if schema.get("format") == "path" else "text"
            case "boolean":
                return "`true` or `false`"
            case "null":
                return "`null`"
            case "object":
                return "mapping"
        return "any value"


def limits(schema: Schema) -> str:
    """Bounds, such as `` ≥ 0, < 1``."""
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema]
    return f" {', '.join(found)}" if found else ""


def paragraph(text: str) -> str:
    """Docstring markup as Markdown, on one line."""
    return " ".join(text.replace("``", "`").split())


def cell(text: str) -> str:
    """A paragraph inside a table."""
    return paragraph(text).replace("|", "\\|")


def generate() -> dict[str, str]:
    """File name in ``docs/`` -> its text."""
    schema = json_schema()
    return {
        "config.md": Docs(schema).page(),
        "config.schema.json": json.dumps(schema, indent=1) + "\n",
        "training.md": with_starting_points(TRAINING.read_text(encoding="utf-8")),
    }


TRAINING = ROOT / "docs" / "training.md"

BEGIN, END = "<!-- starting points: written by scripts/make_config_docs.py -->", "<!-- end of starting points -->"


def with_starting_points(page: str) -> str:
    """The training guide with its table of starting points as the code has them; the rest of it is written by hand."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{starting_points.table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write or compare; 1 if something is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    check = parser.parse_args().check
    stale = []
    for name, text in generate().items():
        path = ROOT / "docs" / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            atomic_write_text(path, text)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
