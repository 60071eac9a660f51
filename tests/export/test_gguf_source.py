"""A GGUF file as the dense model: what the exported file keeps of it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Kind
from tests.export.gguf_models import family_folder
from tests.pipeline import tiny

import saap
from saap.export.gguf.metadata import metadata_fields
from saap.export.gguf.plan import GgufPlan
from saap.export.gguf.tokenizer import fields_from_huggingface
from saap.export.gguf.write import write_gguf
from saap.export.source import open_source
from saap.models.checkpoint.gguf_files import GgufField, read_header
from saap.pipeline.export.run import export_gguf
from saap.settings.export import GgufType

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
GENERAL = {
    "general.author": ("A Person", Kind.STRING, None), "general.license": ("apache-2.0", Kind.STRING, None),
    "general.languages": (["en", "de"], Kind.ARRAY, Kind.STRING), "general.base_model.count": (1, Kind.UINT32, None),
}  # fmt: skip
TOKENIZER = {
    "tokenizer.chat_template": (TEMPLATE, Kind.STRING, None),
    "tokenizer.chat_template.tools": ("{{ tools }}", Kind.STRING, None),
    "tokenizer.ggml.add_sep_token": (False, Kind.BOOL, None),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with metadata and tokenizer fields that no folder of transformers has."""
    at = tmp_path_factory.mktemp("dense")
    source = open_source(family_folder(at / "model", "llama"))
    plan = GgufPlan(source.config, source.tensors.shapes, GgufType.F32)
    tokenizer = fields_from_huggingface(tiny.tokenizer(), dict(plan.fields)["vocab_size"])
    own: list[tuple[Any, ...]] = [("type", "model"), ("name", "The Model"), ("size_label", "1B")]
    more = [("key_value", key, *field) for key, field in (GENERAL | TOKENIZER).items()]
    write_gguf(at / "dense.gguf", plan, source.tensors, [*own, *plan.fields, *tokenizer, *more])
    return at / "dense.gguf"


def check(found: Mapping[str, GgufField], dense: Path, name: str) -> None:
    before = read_header(dense).fields
    kept = {key for key in before if key.startswith("tokenizer.")} | GENERAL.keys()
    assert TOKENIZER.keys() <= kept
    assert {key: found.get(key) for key in kept} == {key: before[key] for key in kept}
    assert {key for key in found if key.startswith("tokenizer.")} <= kept
    assert found["general.name"].value == name
    assert "general.size_label" not in found


def test_it_keeps_tokenizer_template_and_metadata(dense: Path, tmp_path: Path) -> None:
    done = export_gguf(dense, tmp_path / "again.gguf", quantization="f16")
    check(read_header(done.path).fields, dense, "The Model")
    assert done.tokenizer == "dense.gguf"
    assert done.same_tokens


def test_empty_arrays_are_left_out(dense: Path, tmp_path: Path) -> None:
    """Other programs write them; these three take 128 bytes, so that the tensors stay aligned."""
    empty = {"general.tags": Kind.STRING, "general.datasets": Kind.STRING, "tokenizer.ggml.eog_token_ids": Kind.INT32}
    added = [
        struct.pack(f"<Q{len(key)}sIIQ", len(key), key.encode(), Kind.ARRAY, kind, 0) for key, kind in empty.items()
    ]
    whole, before = dense.read_bytes(), read_header(dense)
    count = struct.pack("<Q", len(before.fields) + len(empty))
    file = tmp_path / "dense.gguf"
    file.write_bytes(b"".join([whole[:16], count, whole[24 : before.fields_end], *added, whole[before.fields_end :]]))
    assert read_header(file).fields.keys() == before.fields.keys() | empty.keys()
    done = export_gguf(file, tmp_path / "again.gguf", quantization="f16", verify=False)
    check(read_header(done.path).fields, dense, "The Model")


def test_so_does_a_pruned_folder_made_from_it(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 4, "sample_length": 32, "align": 8, "preset": "fast", "roles": ("ffn",)}
    saap.prune(dense, out=tmp_path / "small", pruning_ratio=0.2, refit_tokens=1024, **options)
    done = export_gguf(tmp_path / "small", tmp_path / "small.gguf", verify=False)
    check(read_header(done.path).fields, dense, "The Model, pruned")


def test_without_the_file_the_folder_itself_is_used(dense: Path, tmp_path: Path) -> None:
    fields = metadata_fields(open_source(family_folder(tmp_path / "model", "llama")))
    assert fields == [("type", "model"), ("name", "model")]
