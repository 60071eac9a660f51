"""Vocabulary pruning in a run: before anything else, so that all stages see the smaller vocabulary.

The dense model is measured first, since it reads the evaluation texts in its own tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.errors import CalibrationError, ConfigurationError, ModelError, TargetError
from saap.core.manifest import Change, TextTokens, VocabularyRecord
from saap.core.records import IntArray
from saap.core.vocabulary import VocabularyMap
from saap.data.pairs import pairs_file
from saap.data.samples import (
    GIVEN_IDS,
    Calibration,
    check_vocabulary,
    given_ids,
    leading_ids,
    token_sources,
    token_stream,
)
from saap.data.texts import (
    GENERAL,
    KINDS,
    MIXED,
    Purpose,
    bundled_conversations,
    bundled_text,
    kind_weights,
    template_text,
)
from saap.evaluation.perplexity import bits_per_byte, model_logits, perplexities
from saap.models.loading.devices import copied
from saap.models.walk.processes import Processes
from saap.pipeline.shared.context import VocabularyCut
from saap.pipeline.shared.inputs import LoadedModel
from saap.pipeline.shared.outcome import Behaviour, behaviour, greedy_answer
from saap.pipeline.shared.tokens import DenseReading, TokenSets, draw_tokens, evaluation_sets
from saap.settings.prune import PruneConfig
from saap.settings.vocabulary import Language
from saap.vocabulary.choice import keep_tokens, likeness, order_by_use, size_for_coverage
from saap.vocabulary.cut_model import cut_rows, embedding_of, ids_in_settings
from saap.vocabulary.cut_tokenizer import cut_tokenizer
from saap.vocabulary.scripts import by_script
from saap.vocabulary.tokens import TokenTable, described, token_table

STEP = 64
"""Rows are a multiple of this where the dense model's are: kernels want whole tiles."""
FEW_SAMPLES = {"samples": 2, "sample_length": 64}
KINDS_IN: Mapping[Language, tuple[str, ...]] = {
    Language.ENGLISH: tuple(GENERAL), Language.CODE: ("code",), Language.MATHEMATICS: ("mathematics",),
    Language.FRENCH: ("french",), Language.GERMAN: ("german",), Language.SPANISH: ("spanish",),
    Language.CHINESE: ("chinese",),
}  # fmt: skip
"""The bundled kinds of text in each language."""
Counts = dict[str, IntArray]
"""How often a text in each language uses each token."""


def prune_vocabulary(
    loaded: LoadedModel, config: PruneConfig, calibration: Calibration, processes: Processes
) -> tuple[LoadedModel, TokenSets, VocabularyCut]:
    """The model with fewer tokens, the token sets of the run in these, and what was done. Raises SaapError."""
    table = checked_tokens(loaded, calibration)
    size, step = _requested(config, table)
    if size is not None:  # refused before the dense model reads anything
        required = _required(loaded, table, _own_counts(calibration, loaded.tokenizer, table))
        keep_tokens((), required, table.needs, size, step)
    reading, dense = processes.broadcast_result(lambda: _read_by_dense(loaded, config))
    languages = config.languages or tuple(
        language for language, kinds in KINDS_IN.items() if any(reading.weights[kind] for kind in kinds)
    )
    kept = tokens_to_keep(loaded, config, table, languages, calibration)
    before = sum(parameter.numel() for parameter in loaded.model.parameters())
    cut = cut_to(loaded, kept)
    ids = given_ids(calibration)
    if config.vocabulary_only:  # the samples only check what is written, so a word list is text enough
        config, calibration = config.model_copy(update=FEW_SAMPLES), next(iter(GENERAL))
    elif ids is not None:
        calibration = np.searchsorted(np.asarray(kept), ids)
    record = VocabularyRecord(
        languages=tuple(map(str, languages)),
        tokens=Change(before=table.tokens, after=sum(table.contents[token] is not None for token in kept)),
        rows=Change(before=len(table.contents), after=len(kept)),
        scripts=_scripts(table, kept), texts=_text_tokens(reading, cut.tokenizer),
    )  # fmt: skip
    done = VocabularyCut(
        map=VocabularyMap(rows=len(table.contents), old_ids=kept), record=record, dense=dense, dense_parameters=before,
        kinds=tuple(kind for language in languages for kind in KINDS_IN[language]),
    )  # fmt: skip
    return cut, draw_tokens(cut, config, calibration, processes, reading), done


def tokens_to_keep(
    loaded: LoadedModel, config: PruneConfig, table: TokenTable, languages: Sequence[Language], calibration: Calibration
) -> tuple[int, ...]:
    """Ids of the tokens that stay, ascending. Raises TargetError for a size that is too small or too large."""
    own = _own_counts(calibration, loaded.tokenizer, table)
    required = _required(loaded, table, own)
    first, second = _bundled_halves(loaded.tokenizer, languages, len(table.contents))
    rows = embedding_of(loaded.model).weight

    def order(of: Mapping[str, IntArray]) -> IntArray:
        found = order_by_use(of, likeness(rows, of))
        return found[[table.contents[token] is not None for token in found]]

    size, step = _requested(config, table)
    if size is None:
        covered = size_for_coverage(order(first | own), required, table.needs, second, config.keep_coverage or 1.0)
        size = min(covered + step - 1, len(table.contents))
    counts = {name: first[name] + second[name] for name in first} | own
    return keep_tokens(order(counts), required, table.needs, size, step)


def cut_to(loaded: LoadedModel, kept: Sequence[int]) -> LoadedModel:
    """The model and its tokenizer with only these tokens; a model that the run does not own is copied."""
    model = loaded.model if loaded.owned else copied(loaded.model)
    cut_rows(model, kept, model_logits)
    return dataclasses.replace(loaded, model=model, tokenizer=cut_tokenizer(loaded.tokenizer, kept), owned=True)


def checked_tokens(loaded: LoadedModel, calibration: Calibration) -> TokenTable:
    """The tokens of the model. Raises SaapError for a model or text that this is not possible with."""
    if loaded.fresh is not None:
        raise ConfigurationError(
            "The vocabulary is pruned with all weights in memory, which is too small for them",
            "Use a larger --max-memory, or leave the vocabulary out",
        )
    if pairs_file(calibration) is not None:
        raise CalibrationError(
            "Image-text pairs are written out by the model's processor, which keeps the whole vocabulary",
            "Give a text file, or leave the vocabulary out",
        )
    if loaded.tokenizer is None:
        raise ModelError("The model has no tokenizer, so nothing tells its tokens apart", "Put its files next to it")
    return token_table(described(loaded.tokenizer), embedding_of(loaded.model).num_embeddings)


def _read_by_dense(loaded: LoadedModel, config: PruneConfig) -> tuple[DenseReading, Behaviour]:
    """What the dense model does with the evaluation texts, in its own tokens."""
    tokenizer: Any = loaded.tokenizer
    model, texts = loaded.model, {}
    for kind, part in evaluation_sets(tokenizer).items():
        text = bundled_text(kind, Purpose.EVALUATION)
        end = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets[len(part) - 1][1]
        texts[kind] = text[:end]
    ids = {kind: token_stream([text], tokenizer) for kind, text in texts.items()}
    found = perplexities(model, ids, leading=leading_ids(tokenizer, bos=config.bos))
    bits = {kind: bits_per_byte(one.value, ids[kind], tokenizer) for kind, one in found.items()}
    reading = DenseReading(
        texts=texts, sizes={kind: one.size for kind, one in ids.items()}, perplexities=found,
        weights=kind_weights(bits),
    )  # fmt: skip
    return reading, behaviour(found, *greedy_answer(model, tokenizer))


def _counts(ids: IntArray, rows: int) -> IntArray:
    return np.bincount(ids[ids < rows], minlength=rows).astype(np.int64)


def _bundled_halves(tokenizer: Any, languages: Iterable[Language], rows: int) -> tuple[Counts, Counts]:
    """Counts in the first and the second halves of the bundled texts in these languages."""
    first, second = Counts(), Counts()
    for language in languages:
        texts = [bundled_text(kind, Purpose.CALIBRATION, tokenizer) for kind in KINDS_IN[language]]
        streams = [token_stream([text], tokenizer) for text in texts]
        first[language] = sum((_counts(ids[: len(ids) // 2], rows) for ids in streams), np.zeros(rows, np.int64))
        second[language] = sum((_counts(ids[len(ids) // 2 :], rows) for ids in streams), np.zeros(rows, np.int64))
    return first, second


def _own_counts(calibration: Calibration, tokenizer: Any, table: TokenTable) -> Counts:
    """Counts in what the user calibrates on, without the bundled texts."""
    ids, rows = given_ids(calibration), len(table.contents)
    if ids is not None:
        check_vocabulary({GIVEN_IDS: ids}, rows, None)
        return {GIVEN_IDS: _counts(ids.reshape(-1), rows)}
    given = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
    own = [item for item in given if str(item) not in (MIXED, *KINDS)]
    sources = token_sources(own, tokenizer) if own else {}
    return {name: _counts(np.concatenate([*streams.values()]), rows) for name, streams in sources.items()}


def _required(loaded: LoadedModel, table: TokenTable, own: Counts) -> set[int]:
    """Ids of the tokens that stay whatever the size: by rule, and those that the user's text uses."""
    rows, texts = len(table.contents), ((index, text.strip()) for index, text in enumerate(table.texts))
    digits = {index for index, text in texts if text.isascii() and text.isdigit()}
    used = {int(token) for counts in own.values() for token in np.flatnonzero(counts)}
    template = _of_the_template(loaded.tokenizer, rows)
    return {*table.fixed, *digits, *used, *template, *ids_in_settings(loaded.model, rows)}


def _of_the_template(tokenizer: Any, rows: int) -> set[int]:
    """Tokens of the chat template: of its own text, and of a conversation that it writes out, if it accepts one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return set()
    written, conversation = "", bundled_conversations(Purpose.CALIBRATION)[0]
    with suppress(CalibrationError):
        written = template_text("a conversation", conversation, tokenizer, error=CalibrationError)
    ids = token_stream([str(template), written], tokenizer)
    return set(ids[ids < rows].tolist())


def _requested(config: PruneConfig, table: TokenTable) -> tuple[int | None, int]:
    """The requested number of tokens, None if coverage decides, and what rows are a multiple of.

    Raises TargetError for a size that removes nothing.
    """
    step = STEP if len(table.contents) % STEP == 0 else 1
    if config.keep_coverage is not None:
        return None, step
    ratio, size = config.vocabulary_ratio, config.vocabulary_size
    size = round((1 - ratio) * table.tokens) if ratio is not None else size or 0
    if size >= table.tokens:
        raise TargetError(
            f"The vocabulary has {table.tokens:,} tokens, no more than the {size:,} to keep",
            "Keep fewer tokens, or leave the vocabulary out",
        )
    return size, step


def _scripts(table: TokenTable, kept: Sequence[int]) -> dict[str, Change]:
    """Tokens of each script before and after, the most frequent scripts first."""
    every = by_script(text for text, content in zip(table.texts, table.contents, strict=True) if content is not None)
    left = by_script(table.texts[token] for token in kept if table.contents[token] is not None)
    return {script: Change(before=count, after=left[script]) for script, count in every.most_common()}


def _text_tokens(reading: DenseReading, tokenizer: Any) -> dict[str, TextTokens]:
    """Tokens of each evaluation text before and after."""
    return {
        kind: TextTokens(
            bytes=len(text.encode()), before=reading.sizes[kind], after=len(token_stream([text], tokenizer))
        )
        for kind, text in reading.texts.items()
    }
