"""What a GGUF file says of itself: name, licence, authors and the like, kept from the GGUF file of the dense model."""

from __future__ import annotations

from pathlib import Path

import gguf

from saap.core.errors import ModelError
from saap.export.gguf.fields import WriterFields
from saap.export.model_card import name_of
from saap.export.source import ExportSource
from saap.models.checkpoint.gguf_files import GgufField, read_header
from saap.models.loading.references import PACKAGED_MODELS, packaged_file

_GENERAL = "general."
_KEYS = gguf.Keys.General
# Facts about the dense model's file that do not hold for the new one.
_OWN = (
    _KEYS.ARCHITECTURE, _KEYS.TYPE, _KEYS.NAME, _KEYS.FILE_TYPE, _KEYS.QUANTIZATION_VERSION, _KEYS.ALIGNMENT,
    _KEYS.SIZE_LABEL, _KEYS.QUANTIZED_BY,
)  # fmt: skip


def source_gguf(source: ExportSource) -> Path | None:
    """The GGUF file that is the source or its dense model."""
    if source.resolved.gguf_file is not None:
        return source.resolved.path
    base = "" if source.manifest is None else source.manifest.base.source
    if base in PACKAGED_MODELS:
        try:
            return packaged_file(base)
        except ModelError:
            return None
    return Path(base) if base.endswith(".gguf") and Path(base).is_file() else None


def metadata_fields(source: ExportSource) -> WriterFields:
    """The general fields of a file: those of the dense model's GGUF file if there is one, else name and licence."""
    base, file = None if source.manifest is None else source.manifest.base, source_gguf(source)
    pruned = source.manifest is not None and source.manifest.is_pruned
    kept = {} if file is None else copied_fields(file, _GENERAL)
    original = (source.resolved if base is None else base).source
    name = kept[_KEYS.NAME].value if _KEYS.NAME in kept else name_of(original)
    fields: WriterFields = [("type", "model"), ("name", f"{name}, pruned" if pruned else name)]
    if base is not None and base.licence is not None and _KEYS.LICENSE not in kept:
        fields.append(("license", base.licence))
    return [*fields, *(("key_value", key, *field) for key, field in kept.items() if key not in _OWN)]


def copied_fields(file: Path, prefix: str) -> dict[str, GgufField]:
    """The fields of another file whose keys begin with `prefix`; none if it cannot be read.

    Without empty arrays, which GGUFWriter refuses.
    """
    try:
        fields = read_header(file).fields
    except ModelError:  # of another version of the format
        return {}
    return {key: field for key, field in fields.items() if key.startswith(prefix) and field.value != []}
