"""llama.cpp as a runtime: a file in a temporary folder, with as many threads as torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import nn

from saap.evaluation.speed import Source
from saap.export.gguf.plan import GgufPlan
from saap.export.gguf.quantize import quantize, unquantized
from saap.export.gguf.write import write_gguf
from saap.export.placing import check_place
from saap.export.source import open_source
from saap.models.checkpoint.gguf_files import bytes_per_token
from saap.models.checkpoint.safetensor_files import StoredTensors
from saap.models.loading.llama_cpp import LlamaCpp
from saap.settings.evaluate import SpeedSettings


class LlamaCppRuntime:
    """See `saap.evaluation.speed.Runtime`. The model's context must be long enough for prompt and answer."""

    package = "llama-cpp-py-sync"
    in_memory = False

    def __init__(self, model: LlamaCpp, bytes_per_token: int = 0) -> None:
        self._model, self._length = model, 0
        self.vocabulary, self.bytes_per_token = model.vocabulary, bytes_per_token

    @staticmethod
    def weights(source: Source, settings: SpeedSettings) -> str:
        """Type of the weights in the runtime."""
        return str(settings.gguf_type)

    @classmethod
    @contextmanager
    def opened(cls, source: Source, settings: SpeedSettings) -> Iterator[Self]:
        """Write and open the file. Raises ModelError, ExportError for a model that llama.cpp does not support."""
        if isinstance(source, nn.Module):
            config, tensors = source.config, StoredTensors.of_model(source)
        else:
            found = open_source(source)
            config, tensors = found.config, found.tensors
        plan = GgufPlan(config, tensors.shapes, settings.gguf_type)
        with tempfile.TemporaryDirectory(prefix="saap-speed-") as folder:
            file = Path(folder) / "model.gguf"
            check_place(file, plan.needed_bytes, "TMPDIR")
            # placeholder tokens are sufficient for speed
            with unquantized(file, settings.gguf_type) as first:
                write_gguf(first, plan, tensors, [*plan.fields, ("tokenizer_model", "no_vocab")])
                if settings.gguf_type.made_by_llama_cpp:
                    quantize(first, file, settings.gguf_type, {})
            context = settings.prompt_tokens + settings.new_tokens + 1
            with LlamaCpp(file, context=context, threads=torch.get_num_threads()) as model:
                yield cls(model, bytes_per_token(file))

    def read(self, ids: Sequence[int]) -> int:
        """Read a prompt into an empty cache."""
        self._length = len(ids)
        return int(self._model.feed(ids)[-1].argmax())

    def step(self, token: int) -> int:
        """Read one more token."""
        self._length += 1
        return int(self._model.feed([token], start=self._length - 1)[-1].argmax())
