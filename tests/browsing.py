"""Pages in a browser, for the tests that look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Tab:
    """A page in a browser, which keeps what must not happen."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.page = browser.new_page(viewport={"width": 1000, "height": 800})
        self.noise: list[str] = []
        self.page.on("console", lambda message: self.noise.append(message.text))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.noise.append(dialog.message), dialog.dismiss()))
        self.page.on("request", self._request)
        self.page.goto(path.as_uri())

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file://", "data:image/webp")):
            self.noise.append(request.url)
