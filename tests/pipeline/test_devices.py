"""Models that were dispatched over devices before they are given to saap."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from tests import families
from tests.pipeline import tiny
from tests.pretend import FIRST, SECOND, pretended_devices, spread
from torch import nn
from transformers import AutoModelForCausalLM

import saap
from saap.core.errors import ConfigurationError, ModelError
from saap.core.records import Layout
from saap.discovery import discover
from saap.models.loading.devices import copied, require_values, require_whole_blocks
from saap.models.walk.backend import Backend
from saap.models.walk.processes import Processes
from saap.pipeline.shared.inputs import RunOptions, check_devices
from saap.structure_search.plan import make_plan
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

SETTINGS = {"pruning_ratio": 0.3, "samples": 4, "sample_length": 16, "refit_tokens": 1024, "effort": "fast", "align": 8}
TEXT = np.random.default_rng(0).integers(2, tiny.VOCABULARY, (64, 128))


def test_a_model_with_hooks_on_one_device_gives_the_same() -> None:
    plain = saap.prune(tiny.model(), calibration=TEXT, **SETTINGS)
    dispatched = dispatch_model(tiny.model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(dispatched.model.layers[0], "_hf_hook")
    hooked = saap.prune(dispatched, calibration=TEXT, **SETTINGS)
    assert hooked.plan.keep == plain.plan.keep
    for (name, found), (_, expected) in zip(
        hooked.model.state_dict().items(), plain.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "dense")
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", **{f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(4)}}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "away")
    with pytest.raises(ModelError, match=r"27 tensors .* have no values in memory .*model\.layers\.1\.self_attn"):
        saap.prune(model, calibration=TEXT, **SETTINGS)


def test_several_devices_without_a_map_are_refused() -> None:
    parameters = [("first", SimpleNamespace(device=torch.device("cuda", 0))), ("second", torch.zeros(1))]
    model = SimpleNamespace(named_parameters=lambda: parameters, named_buffers=list)
    with pytest.raises(ModelError, match=r"is on 2 devices \(cpu, cuda:0\) without a device map"):
        require_values(model)  # type: ignore[arg-type]
    require_values(nn.Linear(2, 2))


def same_weight(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Matrices are the same bit for bit; of trained vectors the gradients differ in their last bit over devices."""
    if found.dim() == 1:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=name)
    else:
        assert torch.equal(found, expected), name


CUT_ONLY = {"restore": False, "refit_tokens": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "searched and restored": ("llama", {}),
    "norms after the modules": ("gemma2", {"effort": "fast"}),
    "experts": ("mixtral", {"effort": "fast"}),
    "hidden channels": ("llama", {"roles": ("ffn", "attention", "hidden"), "effort": "fast"}),
    "whole blocks": ("llama", {"roles": ("ffn", "block")}),
    "cut only": ("bloom", {**CUT_ONLY, "effort": "fast"}),
    "flap": ("llama", {**CUT_ONLY, "method": "flap"}),
    "llm-pruner": ("llama", {**CUT_ONLY, "method": "llm-pruner-element2", "effort": "fast"}),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_over_two_devices_give_the_same_model(case: str) -> None:
    family, changes = CASES[case]
    text = families.token_ids(30, 64).numpy()
    settings = {"pruning_ratio": 0.2, "samples": 6, "sample_length": 64, "refit_tokens": 1024, "align": 8, **changes}
    plain = saap.prune(families.build(family), calibration=text, **settings)
    with pretended_devices():
        dense = spread(families.build(family))
        found = saap.prune(dense, calibration=text, **settings)
        assert {str(parameter.device) for parameter in found.model.parameters()} == {FIRST, SECOND}
        assert found.plan.keep == plain.plan.keep
        for name, parameter in found.model.named_parameters():
            same_weight(parameter.detach().cpu(), plain.model.get_parameter(name).detach(), name)


def test_a_dropped_block_at_the_border_of_two_devices() -> None:
    text = torch.randint(2, 128, (24, 16), generator=torch.Generator().manual_seed(0))
    one = families.build("llama")
    graph = discover(one)
    keep = {group.name: tuple(range(0, group.units, 2)) for group in graph.groups if group.role == "ffn"}
    plan = make_plan(graph, keep, (1,), layout=Layout.ADAPTIVE, strategy="test", align=1)
    reconstruct(Backend(one, graph), plan, text, ReconstructionSettings())
    with pretended_devices():
        other = spread(families.build("llama"), first=1)
        reconstruct(Backend(other, graph), plan, text.to(FIRST), ReconstructionSettings())
        for name, parameter in other.named_parameters():
            assert torch.equal(parameter.cpu(), one.get_parameter(name)), name


def test_a_result_on_two_devices_is_written_and_opened_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = families.token_ids(160, 12).numpy()
    settings = {
        "pruning_ratio": 0.3, "roles": ("ffn", "block"), "samples": 6, "sample_length": 12, "refit_tokens": 1024,
        "align": 8, "effort": "fast", "overwrite": True,
    }  # fmt: skip
    saap.prune(families.build("llama"), calibration=text, out=tmp_path / "one", **settings)
    monkeypatch.setattr("saap.models.loading.pretrained.pick_device", torch.device)
    with pretended_devices():
        found = saap.prune(spread(families.build("llama")), calibration=text, out=tmp_path / "other", **settings)
        assert {str(parameter.device) for parameter in found.model.parameters()} == {FIRST, SECOND}
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        same_weight(tensor, other[name], name)


def test_what_is_done_to_a_result_does_not_reach_the_dense_model() -> None:
    with pretended_devices():
        dense = spread(families.build("llama"))
        assert "to" in vars(dense)
        twin = copied(dense)
        assert twin.to(torch.float32) is twin
        assert {parameter.dtype for parameter in dense.parameters()} == {torch.float64}


def test_a_block_on_two_devices_is_refused() -> None:
    with pretended_devices():
        model = spread(families.build("llama"))
        mlp = model.model.layers[0].mlp.down_proj
        mlp.weight = nn.Parameter(mlp.weight.to(SECOND), requires_grad=False)
        with pytest.raises(ModelError, match=r"block model\.layers\.0 is on 2 devices"):
            require_whole_blocks(model, ["model.layers.0"])


def test_several_processes_need_the_whole_model_each() -> None:
    two = Processes(rank=0, count=2)
    with pytest.raises(ConfigurationError, match="each of 2 processes has the whole model"):
        check_devices(RunOptions(device_map="auto"), "model", two)
    with pretended_devices(), pytest.raises(ConfigurationError, match="each of 2 processes has the whole model"):
        check_devices(RunOptions(), spread(families.build("llama")), two)


def test_the_pretended_devices_refuse_each_other() -> None:
    with pretended_devices():
        one, other = torch.ones(2, 2).to(FIRST), torch.ones(2, 2).to(SECOND)
        with pytest.raises(RuntimeError, match="lazy:0, lazy:1"):
            one @ other
        assert torch.equal((one @ other.to(FIRST)).cpu(), torch.full((2, 2), 2.0))


def test_a_model_is_opened_by_a_device_map(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "dense")
    one = saap.prune(folder, calibration=TEXT, out=tmp_path / "one", **SETTINGS)
    other = saap.prune(folder, calibration=TEXT, out=tmp_path / "other", device_map="auto", **SETTINGS)
    assert other.plan.keep == one.plan.keep
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_map": "diagonal"}, "--device-map diagonal is unknown"),
        ({"device_map": "auto", "device": "cpu"}, "--device selects one device"),
        ({"device_map": "auto", "max_memory": 10**9}, "--max-memory keeps the weights in their files"),
    ],
)
def test_maps_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        saap.prune(tmp_path / "nowhere", calibration=TEXT, out=tmp_path / "out", **SETTINGS, **changes)
    with pytest.raises(ConfigurationError, match="the model is in memory already"):
        saap.prune(tiny.model(), calibration=TEXT, device_map="auto", **SETTINGS)
    with pytest.raises(ConfigurationError, match="Packed weights cannot be on several devices"):
        saap.load(tmp_path / "nowhere", packed=True, device_map="auto")
