"""Draw ``docs/layers.svg``: the folders of the package as the imports put them, lowest at the bottom.

    python scripts/draw_layers.py

A line from one folder down to another is an import; one that also leads there through a third folder is left out.
``tests/test_docs.py`` compares the drawing with the imports.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "layers.svg"
WIDTH, HEIGHT, ROW, COLUMN = 132, 38, 86, 156
"""Size of a box, and how far rows and columns stand apart, in SVG units."""
VERBS = "finetune/*.py"


def folder_imports(package: Path) -> dict[str, set[str]]:
    """Folder -> folders it imports from, anywhere in its files; the files beside the folders count as one folder."""
    imports: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        folder = path.parent.name if path.parent != package else VERBS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name != "__main__.py" and isinstance(node, ast.ImportFrom) and node.module:
                parts = node.module.split(".")
                if parts[0] == "finetune":
                    target = parts[1] if len(parts) > 1 and (package / parts[1]).is_dir() else VERBS
                    imports[folder] |= {target} - {folder}
        imports[folder] |= set()
    return imports


def rows_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """Row of each folder, 0 at the bottom: one above the highest that it imports from."""
    rows: dict[str, int] = {}

    def row(folder: str) -> int:
        if folder not in rows:
            rows[folder] = 1 + max((row(other) for other in imports[folder]), default=-1)
        return rows[folder]

    for folder in imports:
        row(folder)
    return rows


def without_detours(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """``imports`` less those that a path through a third folder says as well (transitive reduction)."""

    def reach(folder: str) -> set[str]:
        return imports[folder].union(*(reach(other) for other in imports[folder]))

    return {
        folder: {other for other in others if not any(other in reach(third) for third in others - {other})}
        for folder, others in imports.items()
    }


def draw(imports: dict[str, set[str]]) -> str:
    """The SVG."""
    rows = rows_of(imports)
    members: dict[int, list[str]] = defaultdict(list)
    for folder in sorted(rows):
        members[rows[folder]].append(folder)
    most, top = max(map(len, members.values())), max(rows.values())
    width, height = most * COLUMN + 24, top * ROW + HEIGHT + 24
    centre = {
        folder: (width / 2 + (column - (len(folders) - 1) / 2) * COLUMN, (top - row) * ROW + 12 + HEIGHT / 2)
        for row, folders in members.items()
        for column, folder in enumerate(folders)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for folder, others in sorted(without_detours(imports).items()):
        x1, bottom = centre[folder][0], centre[folder][1] + HEIGHT / 2
        for x2, y2 in (centre[other] for other in sorted(others)):
            end = y2 - HEIGHT / 2
            bend = (end - bottom) / 2
            curve = f"M{x1:.0f},{bottom:.0f} C{x1:.0f},{bottom + bend:.0f} {x2:.0f},{end - bend:.0f} {x2:.0f},{end:.0f}"
            parts.append(f'<path d="{curve}" fill="none" stroke="#8a94a6" stroke-width="1.3"/>')
    for folder, (x, y) in sorted(centre.items()):
        box = f'x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(f'<rect {box} rx="6" fill="#eef2f8" stroke="#51607a"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="#1b2430">{escape(folder)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(draw(folder_imports(ROOT / "finetune")), encoding="utf-8")
