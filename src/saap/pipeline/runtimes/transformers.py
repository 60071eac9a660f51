"""transformers as a runtime, with its key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from saap.core.errors import ModelError
from saap.evaluation.speed import CachedModel, Source
from saap.models.walk.probe import check_reads
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.evaluate import SpeedSettings


class TransformersRuntime:
    """See `saap.evaluation.speed.Runtime`. A model in memory is measured on its device, any other on the CPU."""

    package = "torch"
    in_memory = True

    def __init__(self, model: Any) -> None:
        self._reader = CachedModel(model.eval())
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.bytes_per_token = _bytes_per_token(model)

    @staticmethod
    def weights(source: Source, settings: SpeedSettings) -> str:
        """Type of the weights in the runtime."""
        dtype = next(source.parameters()).dtype if isinstance(source, nn.Module) else torch.float32
        return str(dtype).removeprefix("torch.")

    @classmethod
    @contextmanager
    def opened(cls, source: Source, settings: SpeedSettings) -> Iterator[Self]:
        """Open the model. Raises ModelError if it cannot generate, UnsupportedModelError."""
        model: Any = source if isinstance(source, nn.Module) else open_model(source, RunOptions(device="cpu")).model
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(embedding, nn.Embedding) or not hasattr(model, "generate"):
            raise ModelError(
                f"The speed of {type(model).__name__} cannot be measured, since it is not a transformers model that "
                "generates", "Leave the speed out",
            )  # fmt: skip
        tokens = settings.prompt_tokens + settings.new_tokens
        check_reads(model, tokens, "Measure speed with fewer tokens, or leave it out")
        yield cls(model)

    def read(self, ids: Sequence[int]) -> int:
        """Read a prompt into an empty cache."""
        self._reader.forget()
        return int(self._reader.feed(ids).argmax())  # waits for the device

    def step(self, token: int) -> int:
        """Read one more token."""
        return int(self._reader.feed([token]).argmax())


def _bytes_per_token(model: Any) -> int:
    """Bytes of all weights, except an embedding that is not tied to the output, and the experts that are not chosen."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = embedding.weight if output is None or output.weight is not embedding.weight else None
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    total = 0
    for name, weight in model.named_parameters():
        is_stack = weight.dim() == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvNd)
        if weight is not looked_up:
            total += weight.nbytes * chosen // len(weight) if chosen and is_stack else weight.nbytes
    return total
