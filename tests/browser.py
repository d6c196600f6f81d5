"""Pages in a real browser: Chromium without a window, all pages at all widths in one start of it.

A page of frames shows each page in a frame of each width; its script, not the pages', measures them. The pages' own
Content-Security-Policy stays as it is. What a page's console says comes from the log.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape, unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (400, 1200)  # CSS pixels: a phone, a laptop
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=20000",
)  # fmt: skip

MEASURE = """
function measured(frame) {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth, wide = [];
  const scrolls = e => { for (; e && e !== page.body; e = e.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; return false; };
  let small = 99, text = '';
  for (const e of page.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(e.parentElement)) wide.push(e.tagName + ': ' +
      e.textContent.trim().slice(0, 40));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (own && box.height && !e.closest('details:not([open]) pre')) {
      const matrix = e.ownerSVGElement ? e.getScreenCTM() : { a: 1, b: 0 };
      const scale = Math.hypot(matrix.a, matrix.b);
      const size = parseFloat(getComputedStyle(e).fontSize) * scale;
      if (size < small) { small = size; text = e.textContent.trim().slice(0, 40); }
    }
  }
  const images = [...page.images].filter(image => image.naturalWidth).length, broken = page.images.length - images;
  return { width, scroll_width: Math.max(root.scrollWidth, page.body.scrollWidth), wide, small, small_text: text,
    height: root.scrollHeight, images, broken };
}
window.onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) found[frame.name] = measured(frame);
  document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
};
"""


@dataclass(frozen=True)
class Seen:
    """A page as a browser shows it; lengths in CSS pixels. wide: what sticks out; small: the smallest letters."""

    width: int
    scroll_width: int
    height: int
    wide: list[str]
    small: float
    small_text: str
    images: int
    broken: int
    errors: list[str] = field(default_factory=list)


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(browser: str, pages: Mapping[str, str], folder: Path, widths: Sequence[int] = WIDTHS) -> dict[str, Seen]:
    """HTML by name -> what was seen of it, by "NAME WIDTH". errors: all that the console says, of any page."""
    frames = "".join(
        f'<iframe name="{name} {width}" style="width:{width}px;height:900px;border:0" srcdoc="{escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in widths
    )
    path = folder / "frames.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><script>{MEASURE}</script><body>{frames}</body>')
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    found = re.search("FOUND({.*})END", unescape(done.stdout), re.DOTALL)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert found, f"{browser} did not come to the end (exit code {done.returncode}): {errors or done.stderr[-1500:]}"
    results: dict[str, Any] = json.loads(found[1])
    return {name: Seen(**values, errors=errors) for name, values in results.items()}
