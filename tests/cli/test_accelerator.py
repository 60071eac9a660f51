"""The command line on an accelerator: a pretended one without float64, and the real one of a machine that has one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import command
from tests.pipeline import tiny
from tests.pretend import pretended_devices

import saap
from saap.models.loading import devices, memory
from saap.models.loading.pretrained import model_ref
from saap.models.walk.spill import Spill
from saap.pipeline.recover import run as recovery_run
from saap.pipeline.shared import memory_limit, outcome, tokens
from saap.pipeline.shared.inputs import LoadedModel
from saap.settings.prune import PruneConfig

FAST = (
    "--effort", "fast", "--samples", "4", "--sample-length", "32", "--align", "16", "--json", "--pruning-ratio", "0.2",
)  # fmt: skip
REFIT = ("--refit-tokens", "1024")
RUNS: dict[str, tuple[str, ...]] = {
    "default": (*REFIT, "--effort", "default"),
    "own text": (*REFIT, "--calibration", "TEXT"),
    "uniform layout": (*REFIT, "--layout", "uniform", "--calibration", "TEXT"),
    "hidden channels": (*REFIT, "--roles", "ffn,hidden", "--calibration", "TEXT"),
    "whole blocks": (*REFIT, "--roles", "ffn,block", "--calibration", "TEXT"),
    "flap": ("--method", "flap", "--calibration", "TEXT"),
    "wanda-sp": ("--method", "wanda-sp", "--restore", *REFIT, "--calibration", "TEXT"),
    "llm-pruner": ("--method", "llm-pruner-mixed", "--calibration", "TEXT"),
    "magnitude": ("--method", "magnitude", "--calibration", "TEXT"),
    "block-influence": ("--method", "block-influence", "--calibration", "TEXT"),
}
no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
ACCELERATORS = ["pretended", pytest.param("real", marks=[pytest.mark.gpu, pytest.mark.skipif(no_gpu, reason="no GPU")])]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"), layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def little_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVALUATION_TOKENS", "KIND_TOKENS"):
        monkeypatch.setattr(tokens, name, 100)
    monkeypatch.setattr(outcome, "ANSWER_TOKENS", 4)


@pytest.fixture(params=ACCELERATORS)
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """An accelerator that `--device auto` takes; how far its results may be from those of the CPU, relatively."""
    if request.param == "real":
        yield 1e-3
        return
    monkeypatch.setattr(devices, "_available", lambda: {"lazy": True, "cpu": True})
    with pretended_devices(float64=False) as found:
        yield 1e-4
    assert found.peak > 0


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    code, out, errors = command.run(capsys, *arguments)
    assert code == 0, errors
    found: dict[str, object] = json.loads(out)
    return found


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        atol = tolerance * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=atol, msg=name)


def test_a_pretended_device_refuses_what_such_a_device_refuses() -> None:
    with pretended_devices(float64=False):
        tensor = torch.ones(3).to("lazy")
        with pytest.raises(TypeError, match="float64"):
            tensor.double()
        with pytest.raises(RuntimeError, match="is given tensors on"):
            tensor + torch.ones(3)
    with pretended_devices(limit=100), pytest.raises(torch.OutOfMemoryError):
        torch.ones(100).to("lazy")


@pytest.mark.parametrize("name", RUNS)
def test_a_model_is_pruned_as_on_the_cpu(
    name: str, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tolerance: float
) -> None:
    flags = [str(text) if flag == "TEXT" else flag for flag in RUNS[name]]
    found = run(capsys, "prune", source, "--out", tmp_path / "lazy", *FAST, *flags)
    expected = run(capsys, "prune", source, "--out", tmp_path / "cpu", "--device", "cpu", *FAST, *flags)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=tolerance)
    assert found["answer"] == expected["answer"]
    assert_same_weights(tmp_path / "cpu", tmp_path / "lazy", tolerance)


@pytest.fixture(scope="module")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "small"
    settings = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 16, "effort": "fast"}
    saap.prune(source, pruning_ratio=0.2, out=out, device="cpu", **settings)
    return out


def test_a_result_is_evaluated_as_on_the_cpu(
    small: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tolerance: float
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "Once there was"}\n{"prompt": "The sky is", "answer": "blue"}\n')
    flags = ("--perplexity", "bundled", "--max-tokens", "600", "--prompts", asked, "--tokens", "4", "--dense", source)
    found = run(capsys, "eval", small, *flags, "--json")
    expected = run(capsys, "eval", small, *flags, "--json", "--device", "cpu")
    for one, other in ((found, expected), (found["dense"], expected["dense"])):
        assert one["perplexity"]["bundled"]["value"] == pytest.approx(
            other["perplexity"]["bundled"]["value"], rel=tolerance
        )
    one, other = found["generation"], expected["generation"]
    assert one["samples"]["greedy"] == other["samples"]["greedy"]
    assert one["cloze"]["answer_nll"] == pytest.approx(other["cloze"]["answer_nll"], rel=tolerance)


def test_it_writes_the_same_text(small: Path, capsys: pytest.CaptureFixture[str], tolerance: float) -> None:
    flags = ("--prompt", "The", "--max-tokens", "6", "--temperature", "0.8", "--json")
    texts = [command.run(capsys, "generate", small, *flags, "--device", name)[:2] for name in ("auto", "cpu")]
    assert texts[0] == texts[1]
    assert texts[0][0] == 0


GROUPS = ("--group-size", "16")


@pytest.mark.parametrize("flags", [GROUPS, (*GROUPS, "--error-feedback"), ("--tuning", "lora")], ids=str)
def test_a_result_is_tuned_as_on_the_cpu(
    flags: tuple[str, ...], small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    tolerance: float, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recovery_run, "FEEDBACK_SAMPLES", 2)
    little = ("--max-steps", "2", "--length", "32", "--validation-samples", "2")
    given = ("recover", small, "--data", text, *little, *flags)
    found = run(capsys, *given, "--out", tmp_path / "lazy", "--json")
    expected = run(capsys, *given, "--out", tmp_path / "cpu", "--json", "--device", "cpu", "--exact-products")
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=tolerance)


LARGE = (*FAST, "--refit-tokens", "32768", "--strategy", "uniform")
NEED = 50 * 10**6


def test_what_does_not_fit_beside_the_weights_is_kept_elsewhere(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_available", lambda: {"lazy": True, "cpu": True})
    monkeypatch.setattr(memory_limit, "RESERVE_BYTES", 0)
    flags = ("prune", source, *LARGE)
    with pretended_devices(float64=False) as whole:
        expected = run(capsys, *flags, "--out", tmp_path / "all")
    assert whole.peak > NEED
    monkeypatch.setattr(memory, "of_device", lambda device: NEED)
    monkeypatch.setattr(memory, "peak_of_device", lambda device: 1)
    with pretended_devices(float64=False, limit=NEED) as limited:
        code, out, errors = command.run(capsys, *flags, "--out", tmp_path / "spilled")
    assert code == 0, errors
    assert "are kept outside the memory of the weights" in errors
    assert limited.peak <= NEED
    assert json.loads(out)["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert_same_weights(tmp_path / "all", tmp_path / "spilled", 0.0)


def test_weights_that_do_not_fit_stay_in_their_files(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_available", lambda: {"lazy": True, "cpu": True})
    flags = (*FAST, *REFIT, "--strategy", "uniform")  # with weights in files, the search measures fewer candidates
    expected = run(capsys, "prune", source, *flags, "--out", tmp_path / "cpu", "--device", "cpu")
    monkeypatch.setattr(memory_limit, "RESERVE_BYTES", 0)
    monkeypatch.setattr(memory_limit.Needs, "of", lambda sizes, config: memory_limit.Needs(3, 3, 2))
    with pretended_devices(float64=False) as whole, monkeypatch.context() as patched:
        patched.setattr(memory, "of_device", lambda device: 2)
        run(capsys, "prune", source, *flags, "--out", tmp_path / "files")
        assert whole.peak > 0
        assert_same_weights(tmp_path / "cpu", tmp_path / "files", 1e-4)
        patched.setattr(memory, "of_device", lambda device: 1)
        code, _, errors = command.run(capsys, "prune", source, *flags, "--out", tmp_path / "none")
    assert code == 2
    assert "The free memory of lazy" in errors
    assert "Use --device cpu" in errors
    assert not (tmp_path / "none").exists()
    assert expected["answer"]


def test_methods_are_compared_as_on_the_cpu(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tolerance: float
) -> None:
    flags = ("--methods", "saap,flap", "--pruning-ratios", "0.2", "--restore", "no", "--max-tokens", "600")
    flags += (
        "--samples",
        "4",
        "--sample-length",
        "32",
        "--align",
        "16",
        "--effort",
        "fast",
        "--calibration",
        str(text),
    )
    rows = [
        run(capsys, "compare", source, *flags, "--out", tmp_path / name, "--device", name, "--json")["rows"]
        for name in ("auto", "cpu")
    ]
    assert len(rows[0]) == 2
    for one, other in zip(*rows, strict=True):
        values = [row["perplexity"]["bundled"]["value"] for row in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


@pytest.mark.parametrize(("room", "in_files"), [(10**12, False), (0, True)])
def test_activations_go_to_the_host_or_where_it_is_small_to_the_disk(
    room: int, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "of_machine", lambda: room)
    with pretended_devices():
        model = tiny.model().to("lazy")
        loaded = LoadedModel(
            model=model,
            tokenizer=None,
            ref=model_ref(model, "tiny", None),
            dtype=torch.float32,
            owned=True,
            spills=True,
        )
        spill = memory_limit.restoration_spill(loaded, PruneConfig(pruning_ratios=(0.2,)), tmp_path)
        assert isinstance(spill, Spill)
        assert (spill.folder is not None) == in_files
        kept = spill.keep([torch.arange(6).reshape(2, 3).to("lazy")])
        assert kept[0].device.type == "lazy"
        assert kept[0].cpu().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_restoration_of_7b_fits_into_24_gb_by_the_formula() -> None:
    """bfloat16 weights of LLaMA-7B on an accelerator, effort `default`."""
    sizes = memory_limit.Sizes(
        weights=13_476_831_232, block=404_766_720, around=524_296_192, matrix=90_177_536, widest=11008, width=4096,
        blocks=32, vocabulary=32000, heads=32, values=6_476_005_376, updates=39_976_960,
    )  # fmt: skip

    def gigabytes(need: str, **choices: Any) -> float:
        config = PruneConfig(pruning_ratios=(0.2,), **choices)
        return round((memory_limit.RESERVE_BYTES + getattr(memory_limit.Needs.of(sizes, config), need)) / 10**9, 1)

    assert gigabytes("resident") == 29.2
    assert gigabytes("spilled") == 20.6  # a card of 24 GB has room for it
    assert gigabytes("offloaded") == 7.6
    assert gigabytes("spilled", method="llm-pruner-mixed") == 66.3
