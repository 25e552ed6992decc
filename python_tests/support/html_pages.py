"""Check an HTML page as a reader and as a browser would."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

#: Elements without an end tag.
VOID = {"meta", "link", "br", "img", "hr", "input", "use"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Of Chromium: print a page after some seconds of its own time, without a network beyond it.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --window-size=1400,1000
    --virtual-time-budget=5000 --dump-dom"""
#: Opens a page in a frame of some width and writes down how wide its body is.
PROBE = """<!DOCTYPE html><title>-</title><iframe id="f" style="border:0;width:{width}px;height:900px"
srcdoc="{page}"></iframe><script>
document.getElementById("f").onload = event => {{
  const root = event.target.contentDocument.documentElement
  const charts = root.querySelectorAll("svg, figure img").length
  document.title = `overflow ${{root.scrollWidth}} in ${{root.clientWidth}}, ${{charts}} charts`
}}</script>"""


class Page(HTMLParser):
    """The elements and the text of a page; `problems` lists tags that do not match and ids that occur twice."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self._open]
        ids = [values["id"] for _, values in self.elements if "id" in values]
        self.problems += sorted({f"id {name} occurs twice" for name in ids if ids.count(name) > 1})

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:]} at {self.getpos()}")
        else:
            self._open.pop()

    def handle_data(self, data):
        if data.strip():
            self.texts.append((tuple(self._open), data))

    @property
    def loaded(self) -> list[str]:
        """Addresses that a browser would load or follow, without those within the page."""
        addresses = ("src", "href", "srcset", "action")
        named = [value for _, values in self.elements for name, value in values.items() if name in addresses]
        styles = [text for tags, text in self.texts if tags[-1] == "style"]
        styles += [values.get("style", "") + values.get("clip-path", "") for _, values in self.elements]
        named += [url.strip("'\"") for url in re.findall(r"(?:url\(|@import\s+)([^);]*)", " ".join(styles))]
        return [address for address in named if not address.startswith(("#", "data:"))]


def overflow(source: str, width: int, folder: Path) -> tuple[int, int, int, str]:
    """Open a page in headless Chromium at some width.

    Returns:
        width of its contents, width of the window, number of charts, and what was logged on the console.
    """
    probe = folder / f"probe-{width}.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(source)), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), *FLAGS.split(), f"--user-data-dir={folder / f'profile-{width}'}", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>overflow (\d+) in (\d+), (\d+) charts</title>", done.stdout)
    assert found is not None, done.stdout[:300]
    logged = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return int(found[1]), int(found[2]), int(found[3]), logged
