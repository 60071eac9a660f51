"""The dense model that belongs to a pruned one: which it is, and what it may do when it is opened."""

from __future__ import annotations

from dataclasses import dataclass

from saap.core.errors import ModelError
from saap.core.manifest import RunManifest, read_manifest
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.settings.evaluate import EvalRequest
from saap.settings.recover import RecoverConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseChoice:
    """What a user says about the dense model, none of which holds for the pruned one.

    source: None for the model that the pruned one's manifest names. revision: None for that of the manifest, if it
    names the same model. trust_remote_code: whether code that it ships may be run.
    """

    source: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, settings: EvalRequest | RecoverConfig, source: str | None) -> DenseChoice:
        """What the settings of a step say of its dense model, which they call by `source`."""
        return cls(source=source, revision=settings.dense_revision, trust_remote_code=settings.dense_trust_remote_code)


def manifest_of(resolved: ResolvedModel) -> RunManifest | None:
    """The manifest of a model that saap has written, None for any other. Raises ModelError for a damaged one."""
    return None if resolved.gguf_file is not None else read_manifest(resolved.folder)


def resolve_dense(choice: DenseChoice, manifest: RunManifest | None) -> ResolvedModel | None:
    """The dense model on this machine; None where nobody names one. manifest: of the pruned model, if it has one.

    Only a model that the user names is downloaded; one that a manifest names has to be here. Raises ModelError.
    """
    base = None if manifest is None else manifest.base
    source = choice.source if choice.source is not None or base is None else base.source
    if source is None:
        return None
    recorded = base.revision if base is not None and base.source == source else None
    revision = recorded if choice.revision is None else choice.revision
    try:
        return resolve_model(source, revision, choice.trust_remote_code, fetch=choice.source is not None)
    except ModelError as error:
        raise ModelError(error.offender, error.remedy.replace("--trust-", "--dense-trust-")) from None
