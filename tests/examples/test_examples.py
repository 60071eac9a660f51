"""Every script of `examples/` runs to its end on a tiny model, in this process."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tests.pipeline import tiny

import saap

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FAST = ["--preset", "fast"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense") / "tiny", intermediate_size=192)


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """Runs a script; what it leaves to the defaults takes little text and few steps."""

    def little(name: str, **settings: object) -> None:
        stock = getattr(saap, name)
        monkeypatch.setattr(saap, name, lambda *given, **chosen: stock(*given, **{**settings, **chosen}))

    little("prune", num_samples=4, sample_length=32, refit_tokens=1024)
    little("estimate", num_samples=4, sample_length=32)
    little("recover", max_steps=2, max_seq_length=32, validation_samples=1)

    def start(name: str, *arguments: object) -> None:
        runpy.run_path(str(EXAMPLES / name))["main"]([str(argument) for argument in arguments])

    return start


def parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in saap.load(str(folder), device="cpu").parameters())


def test_a_chat_model_for_ollama(run, dense, tmp_path):
    run("chat_model_for_ollama.py", dense, "-o", tmp_path, *FAST, "--max-minutes", 1)
    assert (tmp_path / "model.gguf").stat().st_size < 10**6
    assert "FROM" in (tmp_path / "model.Modelfile").read_text()
    assert parameters(tmp_path / "pruned") < parameters(dense)


def test_a_code_model_for_vllm(run, dense, tmp_path):
    code = sorted((Path(saap.__file__).parent / "pipeline").rglob("*.py"))[:40]
    run("code_model_for_vllm.py", dense, "--code", *code, "-o", tmp_path / "out", "--pruning-ratio", 0.3, *FAST)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(opened) is transformers.LlamaForCausalLM
    assert opened.num_parameters() < parameters(dense)


def test_experts(run, tmp_path, capsys):
    tiny.mixture_folder(tmp_path / "dense")
    run("experts.py", tmp_path / "dense", "-o", tmp_path / "out", *FAST)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.num_experts < 8
    assert f": {opened.config.num_experts} experts kept" in capsys.readouterr().out


def test_a_mac(run, dense, tmp_path):
    run("mac.py", dense, "-o", tmp_path, *FAST, "--max-minutes", 1)
    assert parameters(tmp_path / "tuned") < parameters(dense)


def test_several_gpus(run, dense, tmp_path):
    """As one process; how several share the work is tested with the commands."""
    run("several_gpus.py", dense, "-o", tmp_path, *FAST, "--max-minutes", 1)
    assert parameters(tmp_path / "tuned") < parameters(dense)


def test_a_custom_decoder(run, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(runpy.run_path(str(EXAMPLES / "custom_decoder.py"))["Decoder"]().state_dict(), tmp_path / "decoder.pt")
    run("custom_decoder.py", tmp_path / "decoder.pt", "-o", tmp_path / "small.pt", *FAST)
    kept, whole = map(int, re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1]))
    assert kept < whole
    assert (tmp_path / "small.pt").is_file()


def test_an_own_importance(run, dense, tmp_path):
    run("own_importance.py", dense, "-o", tmp_path / "out", *FAST)
    assert (tmp_path / "out.plan.json").is_file()
    assert parameters(tmp_path / "out") < parameters(dense)


def test_every_example_is_listed_and_tested():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(re.findall(r"^\| \[(.*?)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert scripts == set(re.findall(r'run\("(.*?)"', Path(__file__).read_text()))
