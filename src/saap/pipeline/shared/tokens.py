"""The token sets of a run, and the rules that derive them from its settings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import CalibrationError, ConfigurationError
from saap.core.evaluation_records import Perplexity
from saap.core.records import CalibrationSet, IntArray, ModelGraph
from saap.data.pairs import draw_pairs, pairs_file
from saap.data.samples import Calibration, check_vocabulary, draw_sets, includes_mixed, leading_ids, token_stream
from saap.data.texts import GENERAL, KINDS, Purpose, bundled_text, kind_weights
from saap.data.windows import SampleRequest
from saap.evaluation.perplexity import LogitsOf, bits_per_byte, default_window, perplexities
from saap.models.loading.images import image_token_ids, with_images
from saap.models.loading.pretrained import load_processor
from saap.models.structure.linear import embedding_of
from saap.models.walk.offload import offloaded
from saap.models.walk.probe import check_runs, read_at_once
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Keep
from saap.models.walk.walk import layerwise_logits
from saap.models.walk.walker import BlockWalker
from saap.pipeline.shared.inputs import LoadedModel
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PrunableRole, PruneConfig, unit_roles
from saap.settings.registry import Method, Strategy
from saap.structure_search.second_order import gram_bytes
from saap.surgery.held_out import require_sequences

EVALUATION_TOKENS, KIND_TOKENS = 1024, 512
"""Evaluation tokens of each kind of text in GENERAL, and of each other kind."""
EVALUATION, HELD_OUT = "bundled text that is never calibrated on", "held-out calibration samples"
"""Names of the evaluation texts, with and without a tokenizer."""
SHORT_SAMPLE = PRESETS[Preset.FAST].sample_length


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseReading:
    """The evaluation texts as the dense model reads them, where the pruned one has fewer tokens.

    texts, sizes, perplexities: by kind, sizes in tokens of the dense model. weights: of the kinds in `mixed`.
    """

    texts: Mapping[str, str]
    sizes: Mapping[str, int]
    perplexities: Mapping[str, Perplexity]
    weights: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSets:
    """Token ids for each use.

    scored: importance and second-order costs. held: held-out evaluation of structures. refit: reconstruction.
    evaluation: by kind, (tokens,) of texts not used for calibration. dense: the dense model's perplexities on them, if
    measured already. leading: ids prepended to each window of a text. dense_sizes: tokens that the dense model reads
    each kind in, if its vocabulary is another; perplexities are per such token, so that the two compare per byte.
    """

    scored: CalibrationSet
    held: CalibrationSet
    refit: CalibrationSet
    evaluation: Mapping[str, IntArray]
    dense: Mapping[str, Perplexity] = field(default_factory=dict)
    leading: tuple[int, ...] = ()
    dense_sizes: Mapping[str, int] = field(default_factory=dict)

    def size(self, kind: str) -> int:
        """Tokens that the dense model reads the evaluation text of a kind in."""
        return self.dense_sizes.get(kind, self.evaluation[kind].size)

    def per_dense_token(self, found: Mapping[str, Perplexity]) -> dict[str, Perplexity]:
        """Perplexities of a model with these token sets, per token of the dense model."""
        if not self.dense_sizes:
            return dict(found)
        return {
            kind: one.over(one.tokens * self.size(kind) / self.evaluation[kind].size) for kind, one in found.items()
        }

    def images(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which the model receives the images of rows of these sets."""
        return with_images(model, (self.scored, self.held, self.refit))

    @property
    def measured(self) -> tuple[str, int]:
        """Name and tokens of the text of the headline perplexity: the kinds of general English."""
        general = [self.size(kind) for kind in self.evaluation if kind in GENERAL]
        return (EVALUATION, sum(general)) if general else (HELD_OUT, self.evaluation[HELD_OUT].size)

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The set of that name as (sequences, length) ids on a device."""
        chosen: CalibrationSet = getattr(self, name)
        return torch.from_numpy(chosen.tokens).to(device)

    def longest(self, model: nn.Module) -> torch.Tensor:
        """One sequence (1, length) of the maximum length to be used, on the model's device."""
        window = max(self.evaluation.values(), key=len)[None, : default_window(model)]
        rows = [*(one.tokens[:1] for one in (self.scored, self.held, self.refit) if len(one.tokens)), window]
        return torch.from_numpy(max(rows, key=lambda row: row.shape[1])).to(next(model.parameters()).device)


def sample_length(model: nn.Module, config: PruneConfig) -> int:
    """Tokens of a calibration sample: as requested, or by the preset, limited by the model's positions.

    A requested length above the model's positions is not reduced but rejected later.
    """
    return config.sample_length or read_at_once(model, config.preset_settings.sample_length)


def needs_measuring(config: PruneConfig) -> bool:
    """Whether the search will evaluate structures on held-out samples."""
    if config.method is not Method.SAAP or config.plan is not None:
        return False
    by_search = config.strategy.evaluates and config.preset_settings.search_evaluations > 0
    return by_search or PrunableRole.BLOCK in config.roles


def chooses_units(config: PruneConfig) -> bool:
    """Whether the reconstruction selects the units, unless a method, strategy or plan was requested."""
    return config.method is Method.SAAP and config.strategy.evaluates and config.plan is None


def finds_costs(config: PruneConfig, model: nn.Module, graph: ModelGraph) -> bool:
    """Whether the search uses second-order costs.

    Raises ConfigurationError if their Gram matrices would be larger than the weights in memory. With weights in files,
    only those of one block exist at a time.
    """
    if not chooses_units(config) or config.strategy is not Strategy.SECOND_ORDER:
        return False
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = gram_bytes(graph, unit_roles(config.roles))
    if needed > weights and offloaded(model) is None:
        raise ConfigurationError(
            f"--strategy second-order needs {needed / 1e9:.3g} GB for its Gram matrices, more than the weights "
            f"({weights / 1e9:.3g} GB)", "Use --strategy adaptive",
        )  # fmt: skip
    return True


def embedding_rows(model: nn.Module) -> int | None:
    """Rows of the model's input embedding, None if it has none that is known."""
    embedding = embedding_of(model, "input")
    return embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None


def evaluation_sets(tokenizer: Any, kinds: Iterable[str] = KINDS) -> dict[str, IntArray]:
    """Ids (tokens,) of the bundled evaluation text, by kind.

    A kind with only unknown characters for the tokenizer is left out.
    """
    found = {kind: token_stream([bundled_text(kind, Purpose.EVALUATION)], tokenizer) for kind in kinds}
    cut = {kind: ids[: EVALUATION_TOKENS if kind in GENERAL else KIND_TOKENS] for kind, ids in found.items()}
    return {kind: ids for kind, ids in cut.items() if len(ids) > 1}


def logits_of(model: nn.Module, keep: Keep = deque) -> LogitsOf | None:
    """Block-wise evaluation of all windows for a model with offloaded weights. None for a model in memory."""
    away = offloaded(model)
    return None if away is None else partial(layerwise_logits, BlockWalker(model, away.blocks), keep=keep)


def _of_the_dense(
    loaded: LoadedModel, evaluation: Mapping[str, IntArray], leading: Sequence[int], processes: Processes
) -> dict[str, Perplexity]:
    """The perplexities of the dense model by kind, measured in the first process."""
    model = loaded.model
    if loaded.fresh is None:
        ids = torch.from_numpy(next(iter(evaluation.values()))[None, : default_window(model)])
        check_runs(model, ids.to(next(model.parameters()).device))
    return processes.broadcast_result(lambda: perplexities(model, evaluation, leading=leading, read=logits_of(model)))


def draw_tokens(
    loaded: LoadedModel, config: PruneConfig, calibration: Calibration, processes: Processes | None = None,
    reading: DenseReading | None = None,
) -> TokenSets:  # fmt: skip
    """All token sets of a run, disjoint if the text is long enough. Raises CalibrationError.

    The kinds of `mixed` are weighted by how well the dense model predicts each, measured by the first process. reading:
    what the dense model has done, if `loaded` has fewer tokens.
    """
    if reading is not None:
        evaluation = {kind: token_stream([text], loaded.tokenizer) for kind, text in reading.texts.items()}
    else:
        evaluation = {} if loaded.tokenizer is None else evaluation_sets(loaded.tokenizer)
    leading, weights = leading_ids(loaded.tokenizer, bos=config.bos), KINDS
    dense: Mapping[str, Perplexity] = {}
    settings = config.preset_settings
    refit_length, held_length = (read_at_once(loaded.model, n) for n in (settings.refit_length, settings.held_length))
    scored_length = sample_length(loaded.model, config)
    # For a short text, the tokens of `fast` are sufficient, unless the length of samples was requested.
    enough = None if config.sample_length else -(-config.samples * SHORT_SAMPLE // scored_length)
    requests = [
        SampleRequest("scored", config.samples, scored_length, at_least=enough),
        SampleRequest("held", settings.held_sequences, held_length, held_out=True, at_least=1),
        SampleRequest(
            "refit",
            settings.refit_sequences * settings.refit_length // refit_length,
            refit_length,
            at_least=4 if config.restore else 0,
        ),
    ]
    rows = embedding_rows(loaded.model)
    file = pairs_file(calibration)
    if file is not None:
        processor = _processor(loaded, config, file)
        image_ids = image_token_ids(getattr(loaded.model, "config", None))
        sets = draw_pairs(file, processor, requests, image_ids=image_ids, seed=config.seed)
        check_vocabulary({name: one.tokens for name, one in sets.items()}, rows, loaded.tokenizer)
    else:
        if reading is not None:
            dense, weights = reading.perplexities, reading.weights
        elif evaluation and includes_mixed(calibration):
            check_vocabulary(evaluation, rows, loaded.tokenizer)
            dense = _of_the_dense(loaded, evaluation, leading, processes or Processes())
            weights = kind_weights(
                {kind: bits_per_byte(dense[kind].value, ids, loaded.tokenizer) for kind, ids in evaluation.items()}
            )
        sets = draw_sets(
            calibration, loaded.tokenizer, requests, seed=config.seed, vocabulary=rows, bos=config.bos,
            kind_weights=weights,
        )  # fmt: skip
    if config.restore:
        require_sequences(len(sets["refit"].tokens))
    if not any(kind in GENERAL for kind in evaluation):  # without a tokenizer, or one of another alphabet
        evaluation, dense = {HELD_OUT: sets["held"].tokens.reshape(-1)}, {}
    return TokenSets(
        scored=sets["scored"], held=sets["held"], refit=sets["refit"],
        evaluation=evaluation, dense=dense, leading=leading, dense_sizes={} if reading is None else reading.sizes,
    )  # fmt: skip


def _processor(loaded: LoadedModel, config: PruneConfig, file: Path) -> Any:
    """The processor of images and text for the model. Raises CalibrationError if it has none."""
    if config.method is not Method.SAAP:
        raise CalibrationError(f"--method {config.method} does not support image-text pairs", "Give a text file")
    processor = None
    if loaded.folder is not None:
        processor = load_processor(loaded.folder, trust_remote_code=loaded.trust_remote_code)
    if processor is None or not image_token_ids(getattr(loaded.model, "config", None)):
        raise CalibrationError(
            f"{file} has image-text pairs, but the model has no processor for images",
            "Give a text file, or the folder of a model that reads images with its processor's files",
        )
    return processor
