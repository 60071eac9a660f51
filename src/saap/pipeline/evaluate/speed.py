"""How fast models are compared with each other, in transformers or in llama.cpp."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saap.core.errors import ExportError, ModelError
from saap.evaluation.speed import LlamaCppRuntime, Runtime, Speed, TransformersRuntime, measure_speeds, speed_up
from saap.models.checkpoint.safetensor_files import ModelTensors, StoredTensors
from saap.models.loading.llama_cpp import LlamaCpp, llama_cpp_is_installed
from saap.models.walk.probe import check_reads
from saap.pipeline.export.run import INSTALL, open_source
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.measure import SpeedSettings
from saap.settings.prune import GgufType, RuntimeName

if TYPE_CHECKING:
    from saap.export.gguf.plan import GgufPlan

Source = str | Path | nn.Module


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """Tokens per second of reading a prompt and of writing; bytes of the weights that each written token reads."""

    model: str
    prefill: float
    decode: float
    bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedReport:
    """Speed of a model, and how many times that of another one it is; None where there is no other.

    weights: type of the weights that are computed with. speedups: medians of the rounds' ratios. bytes_ratio: bytes per
    token of the other model over those of this one: the decoding speed-up of a runtime that does nothing but read.
    """

    runtime: str
    weights: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    model: ModelSpeed
    against: ModelSpeed | None = None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    bytes_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return dataclasses.asdict(self)


def check_settings(settings: SpeedSettings) -> None:
    """Refuse what needs no model to be refused. Raises ConfigurationError, ExportError for a missing package."""
    if settings.runtime is RuntimeName.LLAMA_CPP:
        if importlib.util.find_spec("gguf") is None:
            raise ExportError("Writing files for llama.cpp needs the package gguf", INSTALL)
        if not llama_cpp_is_installed():
            raise ExportError("Running llama.cpp needs the package llama-cpp-py-sync", INSTALL)


def measure_beside(models: Sequence[tuple[str, Source]], settings: SpeedSettings) -> SpeedReport:
    """Speed of the first model, compared with the second if there is one.

    models: (name, a model or what `saap prune` takes). A model in memory is measured as it is; llama.cpp gets a file in
    a temporary folder, and as many threads as torch. Raises ModelError, ExportError for what llama.cpp cannot compute.
    """
    check_settings(settings)
    with ExitStack() as stack:
        opened = [stack.enter_context(opened_in(model, settings)) for _, model in models]
        speeds = timed(opened, settings)
    found = [
        ModelSpeed(model=name, prefill=speed.prefill, decode=speed.decode, bytes_per_token=one.bytes_per_token)
        for (name, _), speed, one in zip(models, speeds, opened, strict=True)
    ]
    report = SpeedReport(
        runtime=str(settings.runtime), weights=weights_name(models[0][1], settings),
        threads=torch.get_num_threads(), prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens, rounds=settings.rounds, model=found[0],
    )  # fmt: skip
    if len(found) == 1:
        return report
    ratio = speed_up(speeds[0], speeds[1])
    return dataclasses.replace(
        report, against=found[1], prefill_speedup=ratio.prefill, decode_speedup=ratio.decode,
        bytes_ratio=found[1].bytes_per_token / found[0].bytes_per_token,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opened:
    """A model in its runtime. bytes_per_token: of the weights that a token reads. vocabulary: tokens that it knows."""

    runtime: Runtime
    bytes_per_token: int
    vocabulary: int


def timed(models: Sequence[Opened], settings: SpeedSettings) -> list[Speed]:
    """Speed of each model, measured in turns, with torch's own default precision of products."""
    vocabulary = min(one.vocabulary for one in models)
    prompt = [index * 7 % vocabulary for index in range(1, settings.prompt_tokens + 1)]  # any ids are as fast
    named = {str(index): one.runtime for index, one in enumerate(models)}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        found = measure_speeds(named, prompt, new_tokens=settings.new_tokens, rounds=settings.rounds)
    finally:
        torch.set_float32_matmul_precision(precision)
    return [found[name] for name in named]


def pair_of_speeds(first: Source, second: Source, settings: SpeedSettings) -> tuple[Speed, Speed]:
    """Speeds of two models in turns."""
    with opened_in(first, settings) as one, opened_in(second, settings) as other:
        fast, slow = timed([one, other], settings)
    return fast, slow


def weights_name(source: Source, settings: SpeedSettings) -> str:
    """The type of the weights that are computed with."""
    if settings.runtime is RuntimeName.LLAMA_CPP:
        return str(settings.gguf_type)
    dtype = next(source.parameters()).dtype if isinstance(source, nn.Module) else torch.float32
    return str(dtype).removeprefix("torch.")


@contextmanager
def opened_in(source: Source, settings: SpeedSettings) -> Iterator[Opened]:
    """The model in the runtime of the settings. Raises ModelError, ExportError."""
    if settings.runtime is RuntimeName.TRANSFORMERS:
        model = source if isinstance(source, nn.Module) else open_model(source, RunOptions(device="cpu")).model
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(embedding, nn.Embedding) or not hasattr(model, "generate"):
            raise ModelError(
                f"The speed of {type(model).__name__} cannot be measured, since it is no model of transformers that "
                "generates", "Leave the speed out",
            )  # fmt: skip
        check_reads(
            model, settings.prompt_tokens + settings.new_tokens, "Measure speed with fewer tokens, or leave it out"
        )
        yield Opened(TransformersRuntime(model), _bytes_of_model(model), embedding.num_embeddings)
        return
    with tempfile.TemporaryDirectory(prefix="saap-speed-") as folder:
        file = Path(folder) / "model.gguf"
        plan = write_without_tokenizer(source, file, settings.gguf_type)
        context = settings.prompt_tokens + settings.new_tokens + 1
        with LlamaCpp(file, context=context, threads=torch.get_num_threads()) as opened:
            yield Opened(LlamaCppRuntime(opened), plan.bytes_per_token, opened.vocabulary)


def write_without_tokenizer(source: Source, file: Path, gguf_type: GgufType) -> GgufPlan:
    """Write the weights as GGUF with numbers for tokens, which is enough to measure. Raises ExportError."""
    from saap.export.gguf.plan import plan_gguf
    from saap.export.gguf.tokenizer import no_tokenizer
    from saap.export.gguf.write import check_file, write_gguf

    tensors: StoredTensors
    if isinstance(source, nn.Module):
        config, tensors = source.config, ModelTensors(source)
    else:
        opened = open_source(source, None)
        config, tensors = opened.config, opened.tensors
    plan = plan_gguf(config, tensors.shapes, gguf_type)
    check_file(file, plan.weight_bytes, overwrite=True)
    write_gguf(file, plan, tensors, no_tokenizer())
    return plan


def _bytes_of_model(model: Any) -> int:
    """Bytes of the weights that one token reads: all but the embedding, unless that is the output's weight too."""
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = embedding.weight if output is None or output.weight is not embedding.weight else None
    return sum(p.numel() * p.element_size() for p in parameters.values() if p is not looked_up)
