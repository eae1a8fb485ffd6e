#!/usr/bin/env python3
"""Build the documentation as a site; a link that leads nowhere is an error. Needs the extra ``docs``.

    python scripts/make_site.py    # into build/site

The pages stand in several folders of the repository and link each other as they lie there. They are copied to one
folder in the same places, where ``zensical.toml`` has them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PAGES = (
    "*.md",
    "docs/*",
    "accelerate_configs/*",
    "benchmarks/*.md",
    "configs/*.yaml",
    "notebooks/*.md",
    "notebooks/*.ipynb",
)
"""What is a page, or is linked by one."""


def copy_pages(folder: Path) -> list[Path]:
    """Lay the pages out below ``folder`` as they lie in the repository; their paths there, relative to it."""
    paths = sorted(path.relative_to(ROOT) for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file())
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return paths


def build(folder: Path) -> Path:
    """Write the site to ``folder``/site, and return that.

    Raises:
        subprocess.CalledProcessError: for a link to no page or no heading; the links stand on standard error.
    """
    pages, site, config = folder / "pages", folder / "site", folder / "zensical.toml"
    for made in (pages, site):
        shutil.rmtree(made, ignore_errors=True)
    copy_pages(pages)
    shutil.copyfile(ROOT / config.name, config)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    subprocess.run(command, check=True, env=os.environ | {"NO_COLOR": "1"})
    return site


if __name__ == "__main__":
    print(build(ROOT / "build") / "index.html")
