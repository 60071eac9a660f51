"""The dense and the pruned model, opened to continue text token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from saap.core.errors import EvaluationError, ModelError
from saap.evaluation.generation import NOT_FINITE
from saap.evaluation.speed import CachedModel
from saap.models.loading.pretrained import end_tokens
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.probe import check_reads
from saap.pipeline.shared.dense_model import manifest_of, resolve_dense
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.evaluate import DenseSettings, GenerationSettings


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model with its tokenizer and display name."""

    label: str
    model: Any
    tokenizer: Any

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


def open_speakers(
    source: str, comparison: DenseSettings, options: RunOptions, without: Callable[[ModelError], None] | None = None
) -> tuple[Speaker, ...]:
    """Load the models: first the dense one (that of the manifest, or the specified one), then `source`.

    A model that was never pruned has no dense model unless specified. without: receives the error if the dense model of
    the manifest is not on this machine; None raises it. Raises ModelError.
    """
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    try:
        found = None if comparison.no_dense else resolve_dense(comparison, manifest_of(resolved))
        others = () if found is None else (_speaker("dense", found, options),)
    except ModelError as error:
        remedy = error.remedy if "--dense" in error.remedy else "Use --dense MODEL or --no-dense"
        told = ModelError(f"The dense model: {error.offender}", remedy)
        if without is None or comparison.dense is not None:
            raise told from None
        without(told)
        others = ()
    return (*others, _speaker("pruned" if others else "answer", resolved, options))


def _speaker(label: str, resolved: ResolvedModel, options: RunOptions) -> Speaker:
    loaded = open_model(resolved, options, computes_in_dtype=True)
    if loaded.tokenizer is None:
        raise ModelError(f"{resolved.source} has no tokenizer", "Put its tokenizer files into the same folder")
    return Speaker(label, loaded.model, loaded.tokenizer)


@torch.no_grad()
def continued(speaker: Speaker, ids: list[int], settings: GenerationSettings) -> Iterator[str]:
    """The continuation of tokens by one model so far, after each token, until it ends or has `max_tokens`.

    Raises UnsupportedModelError if the model cannot process so many.
    """
    model, tokenizer = speaker.model, speaker.tokenizer
    generator = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same random numbers for every device
    ends = end_tokens(model, tokenizer)
    check_reads(model, len(ids) + settings.max_tokens - 1, "Use fewer --max-new-tokens or a shorter prompt")
    cached = CachedModel(model)
    written: list[int] = []
    while len(written) < settings.max_tokens:
        token = choose(cached.feed(ids), settings.temperature, generator)
        if token in ends:
            return
        written.append(token)
        ids = [token]
        yield tokenizer.decode(written, skip_special_tokens=True)


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token. logits: (vocabulary,). temperature 0 takes the most likely one."""
    if not bool(logits.max().isfinite()):  # a token that is never written may have -inf
        raise EvaluationError(*NOT_FINITE)
    if temperature == 0:
        return int(logits.argmax())
    below = logits.cpu().double()
    below -= below.max()  # divided by a tiny temperature, only others than the most likely one may become infinite
    return int(torch.multinomial(torch.softmax(below / temperature, -1), 1, generator=generator))
