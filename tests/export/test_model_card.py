"""What the model card says of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.export.gguf_models import adaptive_folder
from tests.reporting.comparison import recovery_record

from saap.core.manifest import RunManifest
from saap.export.huggingface import write_records

HALF = tuple(range(0, 80, 2))


def test_the_card_says_the_manifest_as_plain_text(tmp_path: Path) -> None:
    evil = '"><img src=q onerror=alert(1)>\n# A heading\n[a](javascript:b)'
    folder = adaptive_folder(tmp_path, "llama", ffn={0: HALF}, attention={})
    manifest = json.loads((folder / "saap" / "manifest.json").read_text())
    manifest |= {"dtype": evil, "versions": {evil: evil}}
    manifest["base"] |= {"source": evil, "licence": evil}
    manifest["perplexity"]["text"] = evil
    manifest["recovery"] = {
        **recovery_record(), "settings": {"bits": evil}, "packed_bytes": 1, "data": [evil], "perplexity": {evil: 20.0},
    }  # fmt: skip
    write_records(folder, RunManifest.model_validate(manifest))
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == evil
    assert "<" not in card
    assert "\n# A heading" not in card
    assert "[a](" not in card


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ("lora", "with plain LoRA on full-precision weights."),
        ("full", "with all weights of the blocks trained in full precision."),
        ("router", "with only the routers of the experts trained, in full precision."),
        ("another", "with weights in full precision."),
    ],
)
def test_the_card_says_which_weights_were_tuned(tmp_path: Path, tuning: str, said: str) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: HALF}, attention={})
    manifest = json.loads((folder / "saap" / "manifest.json").read_text())
    manifest["recovery"] = {**recovery_record(), "settings": {"tuning": tuning, "bits": 4}}
    write_records(folder, RunManifest.model_validate(manifest))
    assert f"Tuned on 20 tokens of text.txt {said}" in (folder / "README.md").read_text()
