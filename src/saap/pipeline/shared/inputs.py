"""What a run starts from: the model, its tokenizer and the token sets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import CalibrationError
from saap.core.records import CalibrationSet, IntArray, ModelGraph, ModelRef
from saap.data.generated import random_starts, sample_from_model
from saap.data.pairs import draw_pairs, pairs_file
from saap.data.placement import SampleRequest
from saap.data.samples import Calibration, check_vocabulary, draw_sets, leading_ids, token_stream
from saap.data.texts import evaluation_text
from saap.evaluation.perplexity import default_window
from saap.models.loading.devices import computable, pick_device, pick_dtype, require_values
from saap.models.loading.images import image_token_ids, with_images
from saap.models.loading.pretrained import load_model, load_processor, load_tokenizer, model_ref
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.probe import read_at_once
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.registry import Importance, Method, Strategy
from saap.settings.run import RunOptions as RunOptions
from saap.structure_search.costs import gram_bytes
from saap.surgery.refit import require_sequences

EVALUATION_TOKENS = 8192
# Of a model whose weights are read from its files: such a model is large, and every token takes long.
OFFLOADED_EVALUATION_TOKENS = 1024
GENERATION_BATCH = 32
COST_TOKENS = 32_768
"""The most that second-order costs are taken from."""
COST_TOKENS_AT_ONCE = 512
"""Of one micro-batch of that walk, which keeps the memory of its way back small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A dense model, ready. dtype: of the weights to write. owned: the run loaded it and may change it in place.

    folder: where it came from, for the licence files. fresh, skeleton: where the weights stay in their files, a
    function that opens it again, and the model without weights, for discovery. spills: whether the activations of the
    restoration would not fit beside the weights.
    """

    model: nn.Module
    tokenizer: Any | None
    ref: ModelRef
    dtype: torch.dtype
    owned: bool
    folder: Path | None = None
    fresh: Callable[[], nn.Module] | None = None
    skeleton: nn.Module | None = None
    spills: bool = False

    def read_at_once(self, length: int) -> int:
        """`length`, or fewer tokens where the model has no more positions."""
        return read_at_once(self.model, length)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSets:
    """Token ids for each use.

    scored: importance. held: evaluating structures. refit: restoration. evaluation: (tokens,) of a text that nothing
    was calibrated on, named `evaluation_name`. leading: ids that each window of a text begins with.
    """

    scored: CalibrationSet
    held: CalibrationSet
    refit: CalibrationSet
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


def text_of_costs(tokens: TokenSets, device: torch.device) -> tuple[torch.Tensor, int]:
    """The calibration text (sequences, length) for token-level sensitivities, and the rows of a micro-batch.

    A part of the restoration's: longer than the scored samples, in tokens, without which a Gram matrix makes units look
    cheap, and in context, without which heads do. Where there is less of it, the scored samples have to do.
    """
    scored, refit = (tokens.tensor(name, device) for name in ("scored", "refit"))
    chosen = scored if refit.numel() < scored.numel() else refit[: max(1, COST_TOKENS // refit.shape[1])]
    return chosen, max(1, COST_TOKENS_AT_ONCE // chosen.shape[1])


def place_of(source: str | Path | nn.Module, options: RunOptions) -> torch.device:
    """Where the run computes: where a given model lies, or the chosen device. Raises ConfigurationError."""
    return next(source.parameters()).device if isinstance(source, nn.Module) else pick_device(options.device)


def resolve_with_tokenizer(
    source: str | Path | nn.Module, options: RunOptions, tokenizer: Any | None
) -> tuple[nn.Module | ResolvedModel, Any | None]:
    """The model without its weights read, and its tokenizer unless one is given. Raises ModelError."""
    if isinstance(source, nn.Module):
        return source, tokenizer
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    return resolved, tokenizer if tokenizer is not None else load_tokenizer(resolved)


def open_model(
    source: str | Path | nn.Module | ResolvedModel,
    options: RunOptions,
    tokenizer: Any | None = None,
    *,
    computes_in_dtype: bool = False,
) -> LoadedModel:
    """Load what `source` names, or take a loaded model as it is (it is never changed).

    computes_in_dtype: `options.dtype` is that to compute in, where nothing is written.

    A model that was resolved before keeps its own revision and permission to run code, whatever `options` say.
    Raises ModelError for everything that is wrong with it, before weights are read where that can be seen.
    """
    if isinstance(source, nn.Module):
        require_values(source)
        ref = model_ref(source, type(source).__name__, None)
        written = pick_dtype(options.dtype, source=next(source.parameters()).dtype)
        return LoadedModel(model=computable(source), tokenizer=tokenizer, ref=ref, dtype=written, owned=False)
    resolved = source
    if not isinstance(resolved, ResolvedModel):
        resolved = resolve_model(resolved, revision=options.revision, trust_remote_code=options.trust_remote_code)
    device = pick_device(options.device)
    written = pick_dtype(options.dtype, source=resolved.dtype)
    dtype = written if computes_in_dtype and options.dtype != "auto" else None
    model = load_model(resolved, device=device, dtype=dtype, device_map=options.device_map)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(resolved),
        ref=model_ref(model, resolved.source, resolved.revision),
        dtype=written,
        owned=True,
        folder=resolved.folder,
    )


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
    """Whether the choice of units weighs in their token-level sensitivity, on text of the restoration.

    Only for the default calibration, whose search goes without second-order costs, which are token-level too.
    """
    chosen = chooses_units(config) and config.effort_settings.second_order
    return chosen and config.restore and not config.trusts_calibration


def generated_sequences(loaded: LoadedModel, config: PruneConfig) -> int:
    """How many sequences of the refit text the model writes itself: only for the default calibration.

    None for a baseline without restoration, which refits nothing.
    """
    if config.method is not Method.SAAP and not config.restore:
        return 0
    able = loaded.tokenizer is not None and hasattr(loaded.model, "generate") and loaded.fresh is None
    settings = config.effort_settings
    wanted = min(settings.generated_sequences, settings.refit_sequences // 2)
    return 0 if config.trusts_calibration or not able else wanted


def write_refit_text(loaded: LoadedModel, config: PruneConfig, progress: Callable[[int, int], None] | None) -> IntArray:
    """Sequences (sequences, length) of ids, written by the dense model from random first tokens.

    What the model writes covers what it knows; the bundled texts are a part of that.
    """
    wanted, leading = generated_sequences(loaded, config), leading_ids(loaded.tokenizer, bos=config.bos)
    return sample_from_model(
        loaded.model,
        sequences=wanted,
        length=loaded.read_at_once(config.effort_settings.refit_length),
        batch=GENERATION_BATCH,
        seed=config.seed,
        starts=random_starts(loaded.tokenizer, sequences=wanted, seed=config.seed, leading=leading),
        progress=progress,
    )


def draw_tokens(loaded: LoadedModel, config: PruneConfig, calibration: Calibration) -> TokenSets:
    """All token sets of a run; no token lies in two of them where the text suffices. Raises CalibrationError."""
    settings = config.effort_settings
    refit_length, held_length = map(loaded.read_at_once, (settings.refit_length, settings.held_length))
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
        scored=sets["scored"], held=sets["held"], refit=sets["refit"], evaluation=evaluation, evaluation_name=name,
        leading=leading_ids(loaded.tokenizer, bos=config.bos),
    )  # fmt: skip


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
