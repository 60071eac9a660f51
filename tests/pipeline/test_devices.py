"""Models that were dispatched over devices before they are given to saap."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from tests.pipeline import tiny
from torch import nn
from transformers import AutoModelForCausalLM

import saap
from saap.errors import ModelError
from saap.models.devices import require_one_device

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


def test_several_devices_are_refused() -> None:
    parameters = [("first", SimpleNamespace(device=torch.device("cuda", 0))), ("second", torch.zeros(1))]
    model = SimpleNamespace(named_parameters=lambda: parameters, named_buffers=list)
    with pytest.raises(ModelError, match=r"lies on 2 devices \(cpu, cuda:0\)"):
        require_one_device(model)  # type: ignore[arg-type]
    require_one_device(nn.Linear(2, 2))
