"""Size of a report page, and how long a browser takes to open it.

    saap report DIR --out page.html
    python benchmarks/report_page.py page.html [--rounds 5]      # needs Chromium

From the start of the navigation to the load event, in headless Chromium, by the page's own clock; the median. What is
opened is a copy with a script of one line at its end, which writes the time into the title.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

CLOCK = "<script>addEventListener('load', () => {document.title = 'opened in ' + performance.now()})</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def milliseconds(browser: str, page: Path) -> float:
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"<title>opened in ([\d.]+)</title>", shown)
    if found is None:
        raise SystemExit(f"{browser} did not come to the end of loading {page}")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(
            options.page.read_text(encoding="utf-8").replace("</body>", f"{CLOCK}</body>"), encoding="utf-8"
        )
        times = [milliseconds(browser, copy) for _ in range(options.rounds)]
    megabytes = options.page.stat().st_size / 1e6
    print(f"{megabytes:.2f} MB, opens in {statistics.median(times) / 1000:.2f} s (median of {options.rounds})")


if __name__ == "__main__":
    main()
