"""The token sets of a run, and the rules by which its settings choose what they are used for."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from saap.core.errors import CalibrationError
from saap.core.records import CalibrationSet, IntArray, ModelGraph
from saap.data.pairs import draw_pairs, pairs_file
from saap.data.placement import SampleRequest
from saap.data.samples import Calibration, check_vocabulary, draw_sets, leading_ids, token_stream
from saap.data.texts import evaluation_text
from saap.evaluation.perplexity import default_window
from saap.models.loading.images import image_token_ids, with_images
from saap.models.loading.pretrained import load_processor
from saap.models.walk.probe import read_at_once
from saap.pipeline.shared.inputs import LoadedModel
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.registry import Importance, Method, Strategy
from saap.structure_search.costs import gram_bytes
from saap.surgery.reconstruct import require_sequences

EVALUATION_TOKENS = 8192
# Of a model whose weights are read from its files: such a model is large, and every token takes long.
OFFLOADED_EVALUATION_TOKENS = 1024
HELD_WRITTEN = 4
"""Sequences of the model's own text that only evaluate structures."""
COST_TOKENS = 32_768
"""The most that second-order costs are taken from."""
COST_TOKENS_AT_ONCE = 512
"""Of one micro-batch of that walk, which keeps the memory of its way back small."""


def costs_at_once(costs: CalibrationSet) -> int:
    """Sequences of such a micro-batch."""
    return max(1, COST_TOKENS_AT_ONCE // int(costs.tokens.shape[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSets:
    """Token ids for each use.

    scored: importance. held: evaluating structures. refit: reconstruction. costs: token-level sensitivities.
    evaluation: (tokens,) of a text that nothing was calibrated on, named `evaluation_name`. leading: ids that each
    window of a text begins with.
    """

    scored: CalibrationSet
    held: CalibrationSet
    refit: CalibrationSet
    costs: CalibrationSet
    evaluation: IntArray
    evaluation_name: str
    leading: tuple[int, ...] = ()

    def images(self, model: nn.Module) -> AbstractContextManager[None]:
        """While it lasts, the model is given the images that belong to rows of these sets."""
        return with_images(model, (self.scored, self.held, self.refit))

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """The set of that name as (sequences, length) ids on a device."""
        chosen: CalibrationSet = getattr(self, name)
        return torch.from_numpy(chosen.tokens).to(device)

    def longest(self, model: nn.Module) -> torch.Tensor:
        """One sequence (1, length) as long as any that the model is to read, on its device."""
        window = self.evaluation[None, : default_window(model)]
        rows = [*(one.tokens[:1] for one in (self.scored, self.held, self.refit)), window]
        return torch.from_numpy(max(rows, key=lambda row: row.shape[1])).to(next(model.parameters()).device)

    def with_written(self, written: IntArray, seed: int) -> TokenSets:
        """Half of what is scored and held, and a part of the reconstruction's, replaced by text of the model's own.

        written: (sequences, length); the last HELD_WRITTEN of a random order only evaluate structures.
        """
        order = torch.randperm(len(written), generator=torch.Generator().manual_seed(seed)).numpy()
        used, held = np.split(written[order], [-HELD_WRITTEN])
        sets = {
            "scored": self._mixed(self.scored.tokens, used),
            "held": self._mixed(self.held.tokens, held),
            "refit": np.concatenate([self.refit.tokens, used]),
        }
        found = {name: dataclasses.replace(getattr(self, name), tokens=tokens) for name, tokens in sets.items()}
        return dataclasses.replace(self, **found)

    def _mixed(self, tokens: IntArray, written: IntArray) -> IntArray:
        """The second half of some samples, and pieces of the written sequences in place of the first."""
        leading = written[:1, : len(self.leading)]
        size = tokens.shape[1] - leading.shape[1]
        body = written[:, leading.shape[1] :]
        pieces = body[:, : body.shape[1] // size * size].reshape(-1, size)
        half = min(len(tokens) // 2, len(pieces))
        chosen = pieces[torch.linspace(0, len(pieces) - 1, half).long().numpy()]
        return np.concatenate([tokens[half:], np.concatenate([leading.repeat(half, axis=0), chosen], axis=1)])


def needs_measuring(config: PruneConfig) -> bool:
    """Whether the search will evaluate structures on held-out samples."""
    if config.method is not Method.SAAP:
        return False
    by_search = config.strategy is Strategy.ADAPTIVE and config.effort_settings.search_evaluations > 0
    return by_search or PrunableRole.BLOCK in config.roles


def chooses_units(config: PruneConfig) -> bool:
    """Whether the units are saap's to choose: a method, strategy, importance or plan that is named is kept to."""
    ours = config.method is Method.SAAP and config.strategy is Strategy.ADAPTIVE
    return ours and config.importance is Importance.FUSED and config.plan is None


def finds_costs(config: PruneConfig, model: nn.Module, graph: ModelGraph) -> bool:
    """Whether second-order costs join the search; not where their Gram matrices would be larger than the weights."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trusted = config.restore and config.trusts_calibration  # they count on the compensation
    return chooses_units(config) and trusted and gram_bytes(graph) <= weights


def weighs_tokens(config: PruneConfig) -> bool:
    """Whether the choice of units weighs in their token-level sensitivity, on text of the reconstruction.

    Only for the default calibration, whose search goes without second-order costs, which are token-level too.
    """
    chosen = chooses_units(config) and config.effort_settings.second_order
    return chosen and config.restore and not config.trusts_calibration


def generated_sequences(loaded: LoadedModel, config: PruneConfig) -> int:
    """How many sequences of the refit text the model writes itself: only for the default calibration.

    None for a baseline without reconstruction, which refits nothing.
    """
    if config.method is not Method.SAAP and not config.restore:
        return 0
    able = loaded.tokenizer is not None and hasattr(loaded.model, "generate") and loaded.fresh is None
    settings = config.effort_settings
    wanted = min(settings.generated_sequences, settings.refit_sequences // 2)
    return 0 if config.trusts_calibration or not able else wanted


def draw_tokens(loaded: LoadedModel, config: PruneConfig, calibration: Calibration) -> TokenSets:
    """All token sets of a run; no token lies in two of them where the text suffices. Raises CalibrationError."""
    settings = config.effort_settings
    refit_length, held_length = (read_at_once(loaded.model, n) for n in (settings.refit_length, settings.held_length))
    refit_sequences = (settings.refit_sequences - generated_sequences(loaded, config)) * settings.refit_length
    requests = [
        SampleRequest("scored", config.samples, config.sample_length),
        SampleRequest("held", settings.held_sequences, held_length, held_out=True, at_least=1),
        SampleRequest("refit", refit_sequences // refit_length, refit_length, at_least=4),
    ]
    embedding = getattr(loaded.model, "get_input_embeddings", lambda: None)()
    rows = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None
    file = pairs_file(calibration)
    if file is not None:
        processor = _processor(loaded, config, file)
        image_ids = image_token_ids(getattr(loaded.model, "config", None))
        sets = draw_pairs(file, processor, requests, image_ids=image_ids, seed=config.seed)
        check_vocabulary({name: one.tokens for name, one in sets.items()}, rows, loaded.tokenizer)
    else:
        sets = draw_sets(calibration, loaded.tokenizer, requests, seed=config.seed, vocabulary=rows, bos=config.bos)
    if config.restore:
        require_sequences(len(sets["refit"].tokens))
    if loaded.tokenizer is None:
        evaluation, name = sets["held"].tokens.reshape(-1), "held-out calibration samples"
    else:
        most = EVALUATION_TOKENS if loaded.fresh is None else OFFLOADED_EVALUATION_TOKENS
        evaluation = token_stream([evaluation_text()], loaded.tokenizer)[:most]
        name = "bundled text that is never calibrated on"
    return TokenSets(
        scored=sets["scored"], held=sets["held"], refit=sets["refit"],
        costs=_text_of_costs(sets["scored"], sets["refit"]), evaluation=evaluation,
        evaluation_name=name, leading=leading_ids(loaded.tokenizer, bos=config.bos),
    )  # fmt: skip


def _text_of_costs(scored: CalibrationSet, refit: CalibrationSet) -> CalibrationSet:
    """A part of the reconstruction's text, or the scored samples where there are more of them.

    It is longer than these in tokens, without which a Gram matrix makes units look cheap, and in context, without
    which heads do.
    """
    if refit.tokens.size < scored.tokens.size:
        return scored
    return dataclasses.replace(refit, tokens=refit.tokens[: max(1, COST_TOKENS // refit.tokens.shape[1])])


def _processor(loaded: LoadedModel, config: PruneConfig, file: Path) -> Any:
    """What makes inputs of images and text for the model. Raises CalibrationError if it has none."""
    if config.method is not Method.SAAP:
        raise CalibrationError(f"--method {config.method} is not made for image-text pairs", "Give a text file")
    processor = None if loaded.folder is None else load_processor(loaded.folder)
    if processor is None or not image_token_ids(getattr(loaded.model, "config", None)):
        raise CalibrationError(
            f"{file} holds image-text pairs, but the model has no processor for images",
            "Give a text file, or the folder of a model that reads images with its processor's files",
        )
    return processor
