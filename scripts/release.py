"""Check that what is committed can be released, build it, and print how it is published; nothing is uploaded.

    python scripts/release.py [--out dist]

The version is ``finetune.__version__``. Run the tests first: ``make lint``, ``make test``, ``make soak``, and on a GPU
``make test-gpu``.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "make lint && make test && make soak"


def version_of(root: Path) -> str:
    """``finetune.__version__`` of a checkout, read and not imported."""
    stated = re.findall(
        r'^__version__ = "(.+)"$', (root / "finetune" / "__init__.py").read_text(encoding="utf-8"), re.M
    )
    (version,) = stated
    return str(version)


def faults(root: Path) -> list[str]:
    """What keeps a checkout from being released, in words; empty where nothing does.

    Args:
        root: a git checkout with ``CHANGELOG.md`` and ``finetune/__init__.py``.
    """
    version, found = version_of(root), []
    headings = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if headings[:1] != [version]:
        newest = headings[0] if headings else "nothing"
        found.append(f"CHANGELOG.md begins with {newest}, and finetune.__version__ is {version}: one version for both")
    if changes := _git(root, "status", "--porcelain").decode().splitlines():
        some = ", ".join(line[3:] for line in changes[:5])
        found.append(f"not as committed: {some} ({len(changes)} in all): commit or remove them")
    if _git(root, "tag", "--list", f"v{version}"):
        found.append(f"v{version} is tagged already: give this its own version")
    return found


def build(root: Path, out: Path) -> list[Path]:
    """Build the source distribution, and from it the wheel, with the setuptools of this environment.

    Args:
        root: the folder of ``pyproject.toml``; setuptools leaves its ``.egg-info`` there.
        out: where the two files go.

    Raises:
        subprocess.CalledProcessError: if the build fails, which has said why.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return sorted(out.glob(f"cogvideox_finetune-{version_of(root)}[-.]*"))


def build_committed(root: Path, out: Path) -> list[Path]:
    """``build`` of what is committed: a file that git ignores does not slip into the package."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(_git(root, "archive", "HEAD"))) as committed:
            committed.extractall(folder, filter="data")
        return build(Path(folder), out)


def _git(root: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *words], check=True, stdout=subprocess.PIPE).stdout


def main() -> int:
    """Run the script; 1 if there is something to mend first."""
    parser = argparse.ArgumentParser(description="Check, build, and say how to publish; nothing is uploaded.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the files go")
    out = parser.parse_args().out.resolve()
    if found := faults(ROOT):
        print("\n".join(found), file=sys.stderr)
        return 1
    tag = f"v{version_of(ROOT)}"
    files = build_committed(ROOT, out)
    print(*files, sep="\n")
    print(f"\nIf the tests have passed on this commit ({TESTS}), publish with")
    print(f"  git tag {tag} && git push origin {tag}")
    print(f"  python -m twine upload {shlex.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
