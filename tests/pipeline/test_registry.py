"""Every registered name stands for code that is there."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest

from saap.baselines.baseline import Baseline
from saap.core.errors import ConfigurationError
from saap.estimation.importance import Scoring
from saap.export.consumers import Loading
from saap.settings.registry import Consumer, Importance, Method, Registered, Strategy


@pytest.mark.parametrize("name", [*Importance, *Strategy, *Method])
def test_a_name_has_code_and_a_summary(name: Registered) -> None:
    kind = {Importance: Scoring, Method: Baseline}.get(type(name))
    code = name.load()
    assert callable(code) if kind is None or name is Method.SAAP else isinstance(code, kind)
    assert name.summary
    assert type(name)(str(name)) is name


@pytest.mark.parametrize("name", Consumer)
def test_a_consumer_has_code_that_can_run(name: Consumer) -> None:
    module, _, attribute = name.code.rpartition(".")
    lines = ('model = Opener.from_pretrained("PATH")', 'tokenizer = Opener.from_pretrained("PATH")')
    code = getattr(importlib.import_module(module), attribute)(Loading(lines=lines, needs_code=True))
    assert "PATH" in code
    assert code.startswith("saap ") or compile(code, str(name), "exec")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (Consumer.VLLM, "Run saap where vllm is installed."),  # it pins other versions of what saap needs
        (Consumer.LLAMA_CPP, "Run pip install 'saap[gguf]'."),
    ],
)
def test_a_missing_package_is_named_with_its_installation(
    name: Consumer, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigurationError, match=re.escape(remedy)):
        name.check()
