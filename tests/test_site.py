"""The documentation as a site: built strictly, whole, and without a request to anywhere else."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

import finetune

ROOT = Path(finetune.__file__).parent.parent


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "scripts" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("needs the extra `docs` (zensical)")
    return script().build(tmp_path_factory.mktemp("build"))


class Page(HTMLParser):
    """What a page links to, what it fetches, and the fragments that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.fragments: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.fragments.add(value or "")
            elif name in ("href", "src", "srcset", "data", "poster"):
                (self.links if tag == "a" else self.fetched).append(value or "")


def faults(site: Path) -> list[str]:
    """Links and requests of a site's pages that lead to no file or fragment of it; links to elsewhere are left out."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    wrong = []
    for path, page in pages.items():
        for link in [*page.fetched, *(link for link in page.links if not link.startswith("https://"))]:
            name, _, fragment = unquote(link).partition("#")
            target = (path.parent / name if name else path).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (fragment and target in pages and fragment not in pages[target].fragments):
                wrong.append(f"{path.name}: {link}")
    return wrong


def test_every_link_of_the_site_leads_somewhere_and_it_fetches_nothing_from_elsewhere(site, tmp_path):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 25 and (site / "configs" / "cogvideox-5b-lora.yaml").is_file()
    assert faults(site) == []
    (tmp_path / "index.html").write_text(
        '<p id="a"><a href="#a"><a href="#b"><a href="c.html"><a href="https://example.org"><img src="//cdn/x.js">'
    )
    assert faults(tmp_path) == ["index.html: //cdn/x.js", "index.html: #b", "index.html: c.html"]  # canary


def test_a_link_to_no_page_is_not_built(site, tmp_path, monkeypatch, capfd):
    module = script()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    (tmp_path / "README.md").write_text("# Home\n\n[absent](docs/absent.md)\n")
    with pytest.raises(subprocess.CalledProcessError):
        module.build(tmp_path / "build")
    assert "does not exist" in "".join(capfd.readouterr())


@pytest.fixture
def address(site) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_pages_are_readable_in_a_browser_and_the_search_finds_them(address, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # a busy machine takes its time
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith((address, "blob:")) else noise.append(request.url)
    )
    for name in ("index.html", "docs/data.html", "docs/reliability.html"):
        page.goto(address + name)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        red, green, blue = map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")[:3])
        assert (red + green + blue > 382) == (scheme == "light")
    field = page.get_by_role("combobox")
    while not field.count():  # a busy machine takes its time to listen; until it does, letters turn pages
        page.keyboard.press("Control+k")
        page.wait_for_timeout(500)
    field.fill("memorising")
    page.get_by_text(re.compile(r"^[1-9]\d* results$")).wait_for()
    page.close()
    assert noise == []
