"""Headless Chromium, where it is installed: what a page looks like to a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

_PROBE = """
<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="width:%(width)dpx;height:900px;border:0" srcdoc="%(page)s"></iframe>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const document_ = frame.contentDocument, root = document_.documentElement;
  const found = {
    overflow: root.scrollWidth - root.clientWidth,
    charts: [...document_.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().height),
    unlabelled: [...document_.querySelectorAll("svg[role=img]")].filter(
      (svg) => !document_.getElementById(svg.getAttribute("aria-labelledby"))?.textContent).length,
    resources: frame.contentWindow.performance.getEntriesByType("resource").length,
    extra: (%(script)s)(document_),
  };
  const shown = document.createElement("pre");
  shown.id = "found";
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
});
</script>
"""


def look(page: Path, width: int, folder: Path, script: str = "() => null") -> dict:
    """What a browser window of `width` pixels makes of the page, and `console`, the lines of its error console."""
    content = html.escape(page.read_text(encoding="utf-8"), quote=True)
    probe = folder / f"probe-{width}.html"
    probe.write_text(_PROBE % {"width": width, "page": content, "script": script}, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", "--window-size=1400,1000",
        probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(shown[1])), "console": console}
