"""What config.json of an adaptive folder states of single layers, and the class without a head that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.cases import write
from tests.export.gguf_models import EMPTY, adaptive_folder, family_folder
from tests.export.llama import plan_of
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import saap.auto  # noqa: F401
from saap.core.records import Role
from saap.discovery import discover
from saap.models.loading.pretrained import load
from saap.surgery.cut import cut

IDS = torch.arange(3, 19).reshape(2, 8)
FFN = {0: tuple(range(0, 80, 2)), 1: tuple(range(16))}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def pruned(folder: Path, out: Path, keep: dict[int, dict[Role, int]], dropped: tuple[int, ...] = ()) -> Path:
    """The folder with the first so many units of each role kept in these layers."""
    model = load(folder, device="cpu")
    graph = discover(model, finer_heads=True)
    groups = [group for group in graph.groups if group.role in keep.get(group.layer, {})]
    plan = plan_of(
        graph, {group.name: tuple(range(keep[group.layer][group.role])) for group in groups}, dropped=dropped
    )
    return write(model, graph, plan, cut(model, graph, plan), out)


def test_the_configuration_has_the_sizes_of_every_layer_that_differs(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={**FFN, 2: EMPTY}, attention={1: (0, 2), 2: EMPTY})
    config = config_of(folder)
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 40},
        "1": {"intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
        "2": {"intermediate_size": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (6, 3, 80)


def test_a_second_pruning_continues_from_the_first(tmp_path: Path) -> None:
    dense = family_folder(tmp_path / "dense", "llama")
    once = pruned(dense, tmp_path / "once", {1: {Role.ATTENTION: 2, Role.FFN: 16}, 2: {Role.ATTENTION: 2}})
    twice = pruned(once, tmp_path / "twice", {2: {Role.ATTENTION: 1, Role.FFN: 60}}, dropped=(0,))
    assert config_of(twice)["per_layer_config"] == {
        "0": {"intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
        "1": {"intermediate_size": 60, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    thrice = pruned(twice, tmp_path / "thrice", {0: {Role.QUERY: 1}})
    assert config_of(thrice)["per_layer_config"]["0"] == {
        "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip


def test_a_family_with_settings_of_single_layers_keeps_only_its_own(tmp_path: Path) -> None:
    dense = config_of(adaptive_folder(tmp_path / "all", "gemma4", ffn={}, attention={}))
    fewer = config_of(adaptive_folder(tmp_path / "fewer", "gemma4", ffn={}, attention={1: (0, 2)}))
    assert fewer["per_layer_config"] == dense["per_layer_config"]
    assert fewer["pruned_structure"]["unstated_roles"] == ["attention"]


def test_fields_that_the_family_lacks_are_not_invented(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "gpt2", ffn=FFN, attention={1: (0, 2)})
    config = config_of(folder)
    assert config["per_layer_config"] == {"0": {"n_inner": 40}, "1": {"n_inner": 16}}
    assert config["pruned_structure"]["layer_fields"] == {"ffn": ["n_inner"]}
    assert config["pruned_structure"]["unstated_roles"] == ["attention"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "bloom", "falcon", "mixtral", "gemma4"])
def test_the_class_without_a_head_gives_the_last_hidden_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ffn = {} if name == "mixtral" else {**FFN, 1: EMPTY}
    folder = adaptive_folder(tmp_path, name, ffn=ffn, attention={0: (0, 2)})
    capfd.readouterr()
    for options in ({"trust_remote_code": True}, {}):
        whole = AutoModelForCausalLM.from_pretrained(folder, **options)
        base = AutoModel.from_pretrained(folder, **options)
        assert type(base).__name__ == "SaapPrunedModel"
        assert not hasattr(base, "lm_head")
        with torch.no_grad():
            expected = whole(IDS, use_cache=False, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(base(IDS, use_cache=False).last_hidden_state, expected)
    assert "heterogeneous" not in capfd.readouterr().err


VLLM_REFUSES = {
    "gpt2": "vLLM cannot run this folder: its Transformers backend does not load the weights of gpt2",
    "opt": "vLLM cannot run this folder: the configuration of opt has no field for fewer attention units",
    "bloom": "vLLM cannot run this folder: the class of bloom in transformers has only its own attention",
    "mixtral": "vLLM cannot run this folder: it reads one size for the experts of all layers",
}


@pytest.mark.parametrize("name", [*VLLM_REFUSES, "llama"])
def test_vllm_is_refused_what_it_would_compute_wrongly(tmp_path: Path, name: str) -> None:
    """vLLM builds the class without a head with its own attention, which stock transformers does not know."""
    ffn = {0: tuple(range(40))} if name == "mixtral" else FFN
    folder = adaptive_folder(tmp_path, name, ffn=ffn, attention={1: (0, 2)})
    said = VLLM_REFUSES.get(name, "vllm serve PATH --model-impl transformers --trust-remote-code")
    assert said in (folder / "README.md").read_text().replace("\\", "")
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=VLLM_REFUSES.get(name, "attn_implementation|vllm")) as caught:
        AutoModel.from_config(config)
    assert ("cannot run" in str(caught.value)) == (name in VLLM_REFUSES)
