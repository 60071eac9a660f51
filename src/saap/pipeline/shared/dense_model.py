"""Resolution of the dense model of a pruned one, with its revision and trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from saap.core.errors import ModelError
from saap.core.manifest import RunManifest, read_manifest
from saap.core.vocabulary import VocabularyMap, read_vocabulary
from saap.evaluation.perplexity import model_logits
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.settings.evaluate import DenseSettings, EvalRequest
from saap.settings.recover import RecoverConfig
from saap.vocabulary.cut_model import cut_rows, embedding_of
from saap.vocabulary.cut_tokenizer import cut_tokenizer


def manifest_of(resolved: ResolvedModel) -> RunManifest | None:
    """The manifest of a model written by saap, None for any other model. Raises ModelError if it is damaged."""
    return None if resolved.gguf_file is not None else read_manifest(resolved.folder)


def resolve_dense(
    settings: EvalRequest | RecoverConfig | DenseSettings, manifest: RunManifest | None
) -> ResolvedModel | None:
    """The dense model on this machine; None if none is specified. manifest: of the pruned model, if it has one.

    Without a dense model in the settings it is that of the manifest, and a model's revision is the recorded one unless
    they have another. Only a model specified by the user is downloaded; one from a manifest must be on this machine.
    Raises ModelError.
    """
    given = settings.teacher if isinstance(settings, RecoverConfig) else settings.dense
    base = None if manifest is None else manifest.base
    source = given if given is not None or base is None else base.source
    if source is None:
        return None
    recorded = base.revision if base is not None and base.source == source and not Path(source).exists() else None
    revision = recorded if settings.dense_revision is None else settings.dense_revision
    try:
        return resolve_model(source, revision, settings.dense_trust_remote_code, fetch=given is not None)
    except ModelError as error:
        raise ModelError(error.offender, error.remedy.replace("--trust-", "--dense-trust-")) from None


def tokens_of(resolved: ResolvedModel) -> VocabularyMap | None:
    """Which tokens of its dense model a model has; None for all of them. Raises ModelError if the file is damaged."""
    return None if resolved.gguf_file is not None else read_vocabulary(resolved.folder)


def tokenizer_with(dense: ResolvedModel, vocabulary: VocabularyMap | None) -> Any | None:
    """The dense model's tokenizer with the tokens of its pruned one. Raises ModelError."""
    tokenizer = load_tokenizer(dense)
    return tokenizer if tokenizer is None or vocabulary is None else cut_tokenizer(tokenizer, vocabulary.old_ids)


def check_same_tokens(tokenizer: Any, dense_tokenizer: Any, source: str) -> None:
    """Raise ModelError if ids that both tokenizers have mean different tokens. source: of the dense model.

    Then the models cannot read each other's text. One of them may have further tokens.
    """
    ours, theirs = ({index: token for token, index in one.get_vocab().items()} for one in (tokenizer, dense_tokenizer))
    if any(ours[index] != theirs[index] for index in ours.keys() & theirs.keys()):
        raise ModelError(
            f"{source} has another vocabulary than the evaluated model, so it cannot evaluate its generated text",
            "Specify a --dense with the same tokenizer, or leave out --generation and --prompts",
        )


def keep_tokens_of(dense: nn.Module, vocabulary: VocabularyMap | None) -> None:
    """Cut the dense model, in place, to the tokens of its pruned one, so that the same ids mean the same.

    Raises ModelError if it has another number of rows than the model that was pruned.
    """
    if vocabulary is not None:
        check_rows(dense, vocabulary)
        cut_rows(dense, vocabulary.old_ids, model_logits)


def check_rows(dense: nn.Module, vocabulary: VocabularyMap) -> None:
    """Raise ModelError if the dense model, possibly without weights, is not the one whose tokens were removed."""
    rows = embedding_of(dense).num_embeddings
    if rows != vocabulary.rows:
        raise ModelError(
            f"The dense model has {rows:,} rows, but the vocabulary was pruned from {vocabulary.rows:,}",
            "Specify the model that it was pruned from with --dense",
        )
