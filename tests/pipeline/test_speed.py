"""Asked and measured speeds, with a runtime whose time is known: so much for each parameter that a step reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.command import run
from tests.export.gguf_models import EMPTY, adaptive_folder, family_folder
from tests.pipeline import tiny

import saap
from saap.core.errors import SaapError, TargetError
from saap.core.manifest import RunManifest
from saap.evaluation.speed import Runtime, Speed
from saap.pipeline.evaluate import speed
from saap.pipeline.prune import speed_target
from saap.pipeline.prune.run import preview, run_prune
from saap.pipeline.shared.inputs import RunOptions
from saap.settings.evaluate import SpeedSettings
from saap.settings.export import GgufType
from saap.settings.prune import PruneConfig
from saap.settings.registry import RuntimeName

FAST: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}
REST = 20_000


class KnownTime:
    """In place of the clock: a step takes as long as the model has parameters (float32), and a constant."""

    def __init__(self) -> None:
        self.measured = 0

    def __call__(
        self, runtimes: Sequence[Runtime], prompt: Sequence[int], *, new_tokens: int, rounds: int
    ) -> list[Speed]:
        self.measured += 1
        found = []
        for runtime in runtimes:
            runtime.step(runtime.read(prompt))
            step = (REST + runtime.bytes_per_token / 4) / 1e6
            times = {"read_seconds": (1.0,) * rounds, "step_seconds": (step,) * rounds}
            found.append(Speed(prefill=1.0, decode=1 / step, **times))
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> KnownTime:
    made = KnownTime()
    monkeypatch.setattr(speed, "measure_speeds", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_the_asked_speed_is_reached_and_recorded(source: Path, tmp_path: Path, known: KnownTime, layout: str) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, target_speedup=1.15, layout=layout, out=out, **FAST)
    found = result.report.speed
    assert found is not None
    assert 1.15 <= found["reached"] < (1.17 if layout == "adaptive" else 1.25)  # one step of all layers is larger
    assert found["predicted"] == pytest.approx(found["reached"], rel=1e-3)
    recorded = RunManifest.model_validate_json((out / "saap" / "manifest.json").read_bytes()).speed
    assert recorded is not None
    assert recorded.model_dump() == found
    assert (found["asked"], found["runtime"], found["weights"]) == (1.15, "transformers", "float32")
    assert "tokens/s, decoding in transformers" in (out / "README.md").read_text()


def test_the_table_is_measured_once(source: Path, tmp_path: Path, known: KnownTime) -> None:
    saap.prune(source, target_speedup=1.15, **FAST)
    first, known.measured = known.measured, 0
    saap.prune(source, target_speedup=1.2, **FAST)
    (file,) = (tmp_path / "cache" / "saap" / "decode-costs").iterdir()
    assert (first, known.measured) == (2 + len(json.loads(file.read_text())["curves"]["ffn"]), 2)
    file.write_text("broken")
    saap.prune(source, target_speedup=1.2, **FAST)
    assert json.loads(file.read_text())["block"] is None


def test_an_unwritable_cache_is_no_reason_to_fail(
    source: Path, tmp_path: Path, known: KnownTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert saap.prune(source, target_speedup=1.1, **FAST).report.speed is not None


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert speed_target.cache_folder() == Path.home() / ".cache" / "saap" / "decode-costs"


def test_a_dry_run_measures_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, known: KnownTime
) -> None:
    out = tmp_path / "small"
    arguments = ["--target-speedup", "1.1", "--align", "8", "--samples", "4", "--sample-length", "32", "--dry-run"]
    code, said, _ = run(capsys, "prune", source, "--out", out, *arguments)
    assert code == 0
    assert "target target: decoding 1.1 times as fast in transformers; reachable with ffn, attention" in said
    assert not out.exists()


def test_the_forecast_has_the_stages_of_the_run(source: Path, tmp_path: Path, known: KnownTime) -> None:
    config, options = PruneConfig(target_speedup=1.15, **FAST), RunOptions(out=tmp_path / "small")
    shown = preview(source, config, options)["forecast"]["stages"]
    (result,) = run_prune(source, config, options)
    assert [stage["name"] for stage in shown] == [stage.name for stage in result.report.stages]


def test_blocks_are_dropped_for_speed(source: Path, known: KnownTime) -> None:
    result = saap.prune(source, target_speedup=1.3, roles=("block",), **FAST)
    assert result.plan.dropped_blocks
    assert result.report.speed is not None
    assert result.report.speed["reached"] >= 1.3


def test_an_unreachable_speed_is_refused_before_the_estimation(
    source: Path, tmp_path: Path, known: KnownTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saap.pipeline.prune.planning.estimate", None)
    with pytest.raises(TargetError, match=r"speed-up of 9\.00 cannot be reached .* the largest is \d"):
        saap.prune(source, target_speedup=9, out=tmp_path / "small", **FAST)
    assert not (tmp_path / "small").exists()


def test_what_llama_cpp_cannot_compute_is_refused_before_the_estimation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saap.pipeline.prune.planning.estimate", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = family_folder(tmp_path / "model", "gpt_neox")
    with pytest.raises(SaapError, match="gpt_neox"):
        saap.prune(folder, target_speedup=1.1, runtime="llama.cpp", **FAST)


def test_a_speed_is_reached_in_llama_cpp_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speed_target.DecodeCosts, "saved", lambda self, role, fraction: (1 - fraction) * 0.3)
    monkeypatch.setattr("saap.pipeline.prune.speed_target.trial_speedup", lambda *given: 1.05)
    result = saap.prune(source, target_speedup=1.05, runtime="llama.cpp", quantization="f32", **FAST)
    found = result.report.speed
    assert found is not None
    assert (found["runtime"], found["weights"]) == ("llama.cpp", "f32")
    assert found["reached"] > 0


@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp"])
def test_the_command_measures_beside_another_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, runtime: str
) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: tuple(range(40)), 2: EMPTY}, attention={1: (0, 2)})
    arguments = ["eval", folder, "--speed", "--dense", tmp_path / "dense", "--runtime", runtime, "--json"]
    code, out, _ = run(capsys, *arguments, *(["--quantization", "f32"] if runtime == "llama.cpp" else []))
    assert code == 0
    found = json.loads(out)["speed"]
    assert (found["runtime"], found["weights"]) == (runtime, "f32" if runtime == "llama.cpp" else "float32")
    parameters = sum(p.numel() for p in saap.load(folder, device="cpu").parameters())
    embedding = saap.load(folder, device="cpu").get_input_embeddings().weight.numel()
    read = found["model"]["bytes_per_token"] / 4
    if runtime == "transformers":
        assert read == parameters - embedding  # llama's output has a weight of its own
    assert found["bytes_ratio"] == found["against"]["bytes_per_token"] / found["model"]["bytes_per_token"] > 1
    assert min(found["prefill_speedup"], found["decode_speedup"], found["model"]["decode"]) > 0


@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp"])
def test_experts_that_no_token_is_routed_to_are_not_read(tmp_path: Path, runtime: str) -> None:
    folder = tiny.mixture_folder(tmp_path / "mixture")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_topk_prob": True}))  # as llama.cpp has it
    of_file = {"gguf_type": GgufType.F32} if runtime == "llama.cpp" else {}
    settings = SpeedSettings(runtime=RuntimeName(runtime), prompt_tokens=4, new_tokens=2, **of_file)
    model = saap.load(folder, device="cpu")
    experts = sum(one.nbytes for name, one in model.named_parameters() if ".experts." in name)
    unread = model.get_input_embeddings().weight.nbytes + experts * 6 // 8
    with settings.runtime.load().opened(str(folder), settings) as opened:
        read = sum(one.nbytes for one in model.parameters()) - unread
        assert opened.bytes_per_token == pytest.approx(read, rel=0.01)


def test_the_table_shows_the_base_of_a_pruned_folder(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    saap.prune(source, pruning_ratio=0.1, out=tmp_path / "small", **FAST)
    code, out, _ = run(capsys, "eval", tmp_path / "small", "--speed")
    assert code == 0
    assert str(source) in out
    assert "speed-up" in out
