"""Files with arbitrary content: read, or refused by name, and never anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.pipeline import tiny

import saap
from saap.core.errors import SaapError
from saap.core.storage import read_plan
from saap.data.samples import token_stream
from saap.data.texts import read_conversations, read_documents
from saap.data.training import training_data
from saap.models.checkpoint.safetensor_files import weight_files
from saap.models.loading.pretrained import load_model, load_tokenizer, model_without_weights
from saap.models.loading.references import resolve_model

SMALL = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4)
JSON = st.recursive(
    SMALL, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=2)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


FIELDS = [
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "num_key_value_heads", "vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters", "rope_theta", "auto_map",
    "architectures", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "attention_bias",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "pruned_structure", "base_model_type",
]  # fmt: skip
KINDS = st.sampled_from(["llama", "saap_pruned", "mistral", "gpt2", "qwen3", "gemma2"])


@QUICK
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON | KINDS, min_size=1, max_size=3))
def test_config(source: Path, folder: Path, changes: dict[str, Any]) -> None:
    fields = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    with suppress(SaapError):
        resolved = resolve_model(folder)
        model_without_weights(resolved)
        load_tokenizer(resolved)
        load_model(resolved, device=torch.device("cpu"))


@QUICK
@given(content=JSON | st.dictionaries(st.just("weight_map"), st.dictionaries(st.text(max_size=3), JSON)) | st.binary())
def test_index(folder: Path, content: Any) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "model.safetensors.index.json").write_bytes(raw)
    (folder / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(SaapError):
        weight_files(folder)


@QUICK
@given(header=JSON | st.dictionaries(st.text(max_size=2), st.fixed_dictionaries(
    {"dtype": JSON, "shape": JSON, "data_offsets": JSON})), cut=st.integers(0, 40))  # fmt: skip
def test_header(folder: Path, header: Any, cut: int) -> None:
    raw = json.dumps(header).encode()
    content = len(raw).to_bytes(8, "little") + raw + b"0000"
    (folder / "model.safetensors").write_bytes(content[: len(content) - cut])
    with suppress(SaapError):
        assert resolve_model(folder).folder == folder


@pytest.fixture(scope="module")
def graph() -> saap.ModelGraph:
    return saap.discover(tiny.model(layers=2))


ENTRY = st.fixed_dictionaries({}, optional={"kept": SMALL, "of": SMALL, "units": st.text("0123456789-, ", max_size=6)})
NAMES = st.sampled_from(["layers.0.ffn", "layers.1.attention", "hidden", "layers.9.ffn"])


@QUICK
@given(
    plan=st.fixed_dictionaries(
        {"format_version": st.just(1) | SMALL, "groups": st.dictionaries(NAMES, ENTRY, max_size=3) | JSON},
        optional={"dropped_blocks": JSON, "layout": JSON, "align": SMALL, "trail": JSON, "strategy": JSON},
    )
    | JSON
)
def test_plan(tmp_path: Path, graph: saap.ModelGraph, plan: Any) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    with suppress(SaapError):
        read = read_plan(file, graph)
        assert all(kept is not None for kept in read.keep(graph).values())


READERS: list[Callable[[Path], object]] = [
    read_documents,
    read_conversations,
    lambda file: token_stream(read_documents(file, tokenizer=tiny_tokenizer()), tiny_tokenizer()),
    lambda file: training_data([file], tiny_tokenizer(), length=16, held_out=1, seed=0),
]
TOKENIZERS: list[Any] = []


def tiny_tokenizer() -> Any:
    if not TOKENIZERS:
        TOKENIZERS.append(tiny.tokenizer())
    return TOKENIZERS[0]


ROWS = st.lists(
    JSON
    | st.fixed_dictionaries({}, optional={"text": JSON, "messages": JSON, "instruction": JSON, "output": JSON})
    | st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=2)}),
    max_size=3,
)


@QUICK
@given(content=st.binary(max_size=60) | ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
       ending=st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.gz"]))  # fmt: skip
def test_texts(tmp_path: Path, content: bytes, ending: str) -> None:
    file = tmp_path / f"text{ending}"
    file.write_bytes(content)
    for read in READERS:
        with suppress(SaapError):
            read(file)


class _Run:
    """Pickled, it leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.mark,))


def test_pickle_beside_the_weights_and_code_are_never_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save(_Run(mark), folder / "pytorch_model.bin")
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (folder / "evil.py").write_text(code)
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(fields))
    saap.load(folder)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


def test_an_adapter_that_names_another_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(SaapError, match="adapter"):
        resolve_model(folder)
