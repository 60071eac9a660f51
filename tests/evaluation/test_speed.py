from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tests.export.gguf_models import family_folder

from saap.evaluation.speed import measure_speeds
from saap.models.loading.llama_cpp import LlamaCpp
from saap.models.loading.pretrained import load
from saap.pipeline.export.run import export_gguf
from saap.pipeline.runtimes.llama_cpp import LlamaCppRuntime
from saap.pipeline.runtimes.transformers import TransformersRuntime

PROMPT = [5, 9, 14, 3, 22, 31]


class Clock:
    """Time that passes only when a runtime says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    def __init__(self, clock: Clock, log: list[str], name: str, read: list[float], step: float) -> None:
        self.clock, self.log, self.name, self.times, self.seconds = clock, log, name, read, step

    def read(self, ids: Sequence[int]) -> int:
        self.log.append(self.name)
        self.clock.now += self.times.pop(0)
        return 1

    def step(self, token: int) -> int:
        self.clock.now += self.seconds
        return token


def test_speeds_are_medians_of_rounds_in_turn_without_the_first() -> None:
    clock, log = Clock(), []
    runtimes = [
        Slow(clock, log, "dense", [100.0, 3.0, 1.0, 2.0], 0.5), Slow(clock, log, "pruned", [100.0, 1.0, 1.0, 1.0], 0.25)
    ]  # fmt: skip
    dense, pruned = measure_speeds(runtimes, PROMPT, new_tokens=4, rounds=3, clock=clock)
    assert (dense.prefill, dense.decode) == (6 / 2.0, 2.0)
    assert (pruned.prefill, pruned.decode) == (6.0, 4.0)
    assert log == ["dense", "pruned", "pruned", "dense"] * 2


def test_both_runtimes_write_the_same_text(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    file = export_gguf(folder, tmp_path / "out.gguf", quantization="f32", verify=False).path

    def written(runtime: TransformersRuntime | LlamaCppRuntime) -> list[int]:
        tokens = [runtime.read(PROMPT)]
        for _ in range(8):
            tokens.append(runtime.step(tokens[-1]))
        return tokens

    model = load(folder, device="cpu")
    with LlamaCpp(file, context=64, exact=True) as opened:
        ours, theirs = TransformersRuntime(model), LlamaCppRuntime(opened)
        assert written(ours) == written(theirs) == written(ours)
        made = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=9, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert made[0, len(PROMPT) :].tolist() == written(theirs)
        speeds = measure_speeds([ours, theirs], PROMPT, new_tokens=2, rounds=1)
    assert all(speed.prefill > 0 and speed.decode > 0 for speed in speeds)
