"""Install the wheel of `dist/` in a new environment of each given Python, prune a tiny model there and open the result.

Given are the interpreters, such as python3.12. PyTorch is what `setup_environment.py` installs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import setup_environment

ROOT = Path(__file__).resolve().parent.parent
MAKE = "import sys; from pathlib import Path; from tests.pipeline import tiny; tiny.folder(Path(sys.argv[1]))"
OPEN = (
    "import sys, torch; from transformers import AutoModelForCausalLM;"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True);"
    "print(sys.version.split()[0], 'opened', model(torch.arange(2, 20)[None]).logits.shape)"
)
FLAGS = ["--pruning-ratio", "0.2", "--preset", "fast", "--num-samples", "4", "--refit-tokens", "1024", "--align", "8"]


def try_wheel(interpreter: str, wheel: Path, folder: Path) -> None:
    """Install the wheel in an environment in `folder`, prune, open. Raises CalledProcessError if a step fails."""
    subprocess.run([interpreter, "-m", "venv", folder / "environment"], check=True)
    programs = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
    python, saap, dense, small = programs / "python", programs / "saap", folder / "dense", folder / "small"
    setup_environment.install_torch(python)
    setup_environment.pip("install", "--quiet", str(wheel), python=python)
    subprocess.run([python, "-c", MAKE, dense], check=True, cwd=ROOT)  # of the tests, which are in no wheel
    subprocess.run([saap, "prune", dense, *FLAGS, "-o", small, "--quiet"], check=True, cwd=folder)
    subprocess.run([python, "-c", OPEN, small], check=True, cwd=folder)


def main() -> None:
    """Try the newest wheel with each interpreter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("interpreters", nargs="+", metavar="PYTHON")
    interpreters = parser.parse_args().interpreters
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)
    if not wheels:
        sys.exit("dist/ has no wheel. Build one with `python -m build`.")
    for interpreter in interpreters:
        with tempfile.TemporaryDirectory() as folder:
            try_wheel(interpreter, wheels[-1], Path(folder))


if __name__ == "__main__":
    main()
