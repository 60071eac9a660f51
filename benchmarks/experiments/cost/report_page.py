"""Size of a report page, and the time that a browser takes to open it."""

import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import in_own_process, quickly_pruned, run_here

from experiments.quality.comparison import unpack

CLOCK = "<script>addEventListener('load', () => {document.title = 'opened in ' + performance.now()})</script>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROUNDS = 5
CELLS = ["page"]
SMOKE = False
DECIDED_BY = (*PRUNING, "baselines", "reporting")


def measure(request: Request, wanted: Names) -> Measured:
    """The page of a pruned model with the comparison. The browser opens a copy with a one-line script at its end."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as temporary:
        page, compared = Path(temporary) / "page.html", Path(temporary) / "compare"
        unpack(request, compared)
        pruned = quickly_pruned(request, "adaptive", "0.2")
        in_own_process(run_here, ["report", str(pruned), "--compare", str(compared), "--out", str(page)])
        size, text = page.stat().st_size, page.read_text(encoding="utf-8")
        page.write_text(text.replace("</body>", f"{CLOCK}</body>"), encoding="utf-8")
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
        times = []
        for _ in range(ROUNDS):
            shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            (milliseconds,) = re.findall(r"<title>opened in ([\d.]+)</title>", shown)
            times.append(float(milliseconds))
    yield "page", {"bytes": size, "seconds": statistics.median(times) / 1000}


def summarise(cells: Cells) -> Values:
    return {"megabytes": cells["page"]["bytes"] / 1e6, "seconds": cells["page"]["seconds"], "rounds": ROUNDS}
