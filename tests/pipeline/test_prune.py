from __future__ import annotations

import gc
import hashlib
import json
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.families import build
from tests.pipeline import tiny
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import saap
from saap.core.errors import (
    CalibrationError,
    ConfigurationError,
    LayoutError,
    OutputError,
    PlanError,
    StaleInputError,
    TargetError,
)
from saap.core.manifest import PerplexityChange
from saap.estimation import estimate as estimation
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observer
from saap.pipeline.prune import finish, making, planning, steps, with_recovery
from saap.pipeline.prune.run import RunOptions, run_prune
from saap.pipeline.shared import digests, stages
from saap.pipeline.shared.progress import Silent
from saap.pipeline.shared.targets import work_path
from saap.settings.prune import PruneConfig
from saap.settings.recover import RecoverConfig
from saap.structure_search.evaluator import StructureEvaluator

SETTINGS = {"samples": 6, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}
CUT_ONLY = {**SETTINGS, "restore": False, "refit_tokens": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


TOKENS = torch.arange(2, 42).reshape(2, 20)


@pytest.mark.parametrize(("given", "expected"), [(".", "inner"), ("..", "."), ("a", "inner/a")])
def test_files_next_to_a_result_lie_next_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    out = (tmp_path / expected).resolve()
    work = work_path(RunOptions(out=Path(given)))
    assert work is not None
    assert work.resolve() == out.with_name(f"{out.name}.saap-work")


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_the_folder_computes_what_the_result_does(source: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.2, out=out, layout=layout, **SETTINGS)
    report = result.report
    counted = sum(parameter.numel() for parameter in result.model.parameters())
    assert counted == report.parameters == result.plan.parameters
    assert report.pruning_ratio >= 0.2
    opened = saap.load(out)
    torch.testing.assert_close(logits(opened, TOKENS), logits(result.model, TOKENS), rtol=0, atol=0)
    if layout == "uniform":
        stock = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits(stock, TOKENS), logits(opened, TOKENS), rtol=0, atol=0)
    assert len(opened.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)[0]) == 24
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"]
    manifest = json.loads((out / "saap" / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["parameters"]["after"] == counted
    assert bool([*out.glob("modeling_*.py")]) is (layout == "adaptive")
    assert {stage["name"] for stage in manifest["stages"]} >= {"load the model", "measure the dense model"}
    assert not out.with_name("small.saap-work").exists()
    assert (out / "README.md").exists()


def test_same_seed_same_bits(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / name, seed=3, **SETTINGS)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_cutting_only_needs_no_text_for_a_reconstruction(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(" ".join(f"word number {n}" for n in range(50)))
    settings = {"pruning_ratio": 0.2, "calibration": text, "num_samples": 4, "sample_length": 32, "align": 8}
    assert saap.prune(source, restore=False, **settings).report.pruning_ratio >= 0.2
    with pytest.raises(saap.SaapError, match=r"at least .* are needed"):
        saap.prune(source, **settings)


def test_several_ratios_share_one_estimation(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stock = planning.estimate
    monkeypatch.setattr(planning, "estimate", lambda *a, **k: calls.append(1) or stock(*a, **k))
    config = PruneConfig(pruning_ratios=(0.1, 0.3), **SETTINGS)
    results = run_prune(source, config, RunOptions(out=tmp_path / "many"))
    assert len(calls) == 1
    for ratio, result in zip(("0.1", "0.3"), results, strict=True):
        assert result.path == tmp_path / "many" / ratio
        assert sum(p.numel() for p in saap.load(result.path).parameters()) == result.plan.parameters
    assert results[0].plan.parameters > results[1].plan.parameters


def test_models_of_earlier_ratios_do_not_stay_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, measure = [], finish.measure_result

    def measured(run: Any, target: Any, made: Any) -> Any:
        gc.collect()
        held.append(sum(one() is not None for one in opened))
        found = measure(run, target, made)
        opened.append(weakref.ref(made.model))
        return found

    opened: list[weakref.ref[torch.nn.Module]] = []
    watched = steps.ACTIONS[stages.MEASURE]._replace(make=measured)
    monkeypatch.setattr(steps, "ACTIONS", {**steps.ACTIONS, stages.MEASURE: watched})
    config = PruneConfig(pruning_ratios=(0.1, 0.2, 0.3), **SETTINGS)
    results = run_prune(source, config, RunOptions(out=tmp_path / "many"))
    assert held == [0, 0, 0]
    for result in results:
        assert sum(one.numel() for one in result.model.parameters()) == result.plan.parameters


def test_a_search_evaluates_after_compensation_where_its_strategy_says_so(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    class Watched(StructureEvaluator):
        def __init__(
            self, backend: Backend, tokens: torch.Tensor, grams: dict[str, torch.Tensor] | None, *rest, **named
        ) -> None:
            given.append(grams is not None)
            super().__init__(backend, tokens, grams, *rest, **named)

    monkeypatch.setattr(planning, "StructureEvaluator", Watched)
    for strategy in ("adaptive", "second-order"):
        saap.prune(source, pruning_ratio=0.2, strategy=strategy, **SETTINGS | {"effort": "default"})
    assert given == [False, True]


def test_second_order_costs_that_are_larger_than_the_weights_are_refused(tmp_path: Path) -> None:
    wide = tiny.folder(tmp_path, intermediate_size=512)
    with pytest.raises(ConfigurationError, match=r"needs 0\.\d+ GB for its Gram matrices.*Use --strategy adaptive"):
        saap.prune(wide, pruning_ratio=0.2, strategy="second-order", **SETTINGS)


@pytest.mark.parametrize(
    ("strategy", "listening"), [("adaptive", ["TokenFisher"]), ("second-order", ["TokenFisher", "WeightedGrams"])]
)
def test_importance_and_costs_come_from_one_walk(
    source: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, listening: list[str]
) -> None:
    walks: list[list[str]] = []
    stock = estimation.walk

    def walk(backend: Backend, tokens: torch.Tensor, observers: list[Observer], **named: Any) -> None:
        walks.append([type(one).__name__ for one in observers])
        stock(backend, tokens, observers, **named)

    monkeypatch.setattr(estimation, "walk", walk)
    saap.prune(source, pruning_ratio=0.2, strategy=strategy, **SETTINGS)
    assert walks == [listening]


def test_a_loaded_model_is_not_changed_and_token_ids_are_taken(source: Path) -> None:
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = np.random.default_rng(0).integers(1, tiny.VOCABULARY, (60, 64))
    result = saap.prune(model, pruning_ratio=0.25, calibration=tokens, **SETTINGS)
    assert result.path is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    assert logits(result.model, TOKENS).isfinite().all()


def test_a_result_can_be_trained(source: Path, tmp_path: Path) -> None:
    result = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "small", **SETTINGS)
    for model in (result.model, saap.load(tmp_path / "small")):
        model(TOKENS, labels=TOKENS).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_keeping_everything_leaves_the_bits_as_they_were(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "same"
    saap.prune(source, pruning_ratio=0.0, out=out, **SETTINGS)
    dense, same = saap.load(source), saap.load(out)
    for (name, one), (_, other) in zip(dense.state_dict().items(), same.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_an_edited_plan_is_carried_out(source: Path, tmp_path: Path) -> None:
    saap.prune(source, pruning_ratio=0.2, out=tmp_path / "first", **CUT_ONLY)
    document = json.loads((tmp_path / "first" / "saap" / "plan.json").read_text())
    document["groups"]["layers.0.ffn"] = {"kept": 40}
    document["groups"]["layers.1.attention"] = {"units": "1"}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(document))
    result = saap.prune(source, plan=edited, out=tmp_path / "second", **SETTINGS)
    assert len(result.plan.keep["layers.0.ffn"]) == 40
    assert result.plan.keep["layers.1.attention"] == (1,)
    assert sum(p.numel() for p in saap.load(tmp_path / "second").parameters()) == result.plan.parameters


def test_blocks_and_hidden_channels(source: Path, tmp_path: Path) -> None:
    blocks = saap.prune(source, pruning_ratio=0.25, roles=["block"], layout="uniform", out=tmp_path / "b", **SETTINGS)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").config.num_hidden_layers == 3
    assert len(blocks.plan.dropped_blocks) == 1
    hidden = saap.prune(source, pruning_ratio=0.2, roles=["hidden"], out=tmp_path / "h", **CUT_ONLY)
    torch.testing.assert_close(logits(saap.load(tmp_path / "h"), TOKENS), logits(hidden.model, TOKENS))


def test_importance_is_not_estimated_where_it_decides_nothing(source: Path, tmp_path: Path) -> None:
    blocks = saap.prune(source, pruning_ratio=0.25, roles=["block"], out=tmp_path / "blocks", **SETTINGS)
    first = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "first", **SETTINGS)
    again = saap.prune(source, plan=tmp_path / "first" / "saap" / "plan.json", out=tmp_path / "again", **SETTINGS)
    assert again.plan.keep == first.plan.keep
    for result, folder, estimated in ((blocks, "blocks", False), (first, "first", True), (again, "again", False)):
        stages = {stage.name for stage in result.report.stages}
        assert ("estimate the importance of every unit" in stages) is estimated
        assert (tmp_path / folder / "saap" / "scores.safetensors").is_file() is estimated
        assert result.report.refit_errors


@pytest.mark.parametrize("flag", [{"importance": "fused"}, {"strategy": "uniform"}])
def test_whole_blocks_are_not_chosen_by_units(source: Path, flag: dict[str, str]) -> None:
    with pytest.raises(saap.SaapError, match="changes nothing where whole blocks are dropped"):
        saap.prune(source, pruning_ratio=0.25, roles=["block"], **SETTINGS | flag)


def test_a_tokenizer_of_another_alphabet_is_measured_on_held_out_text(tmp_path: Path) -> None:
    source, letters = tiny.folder(tmp_path / "dense"), "абвгдежзийклмноп"
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices(letters, k=9000)), encoding="utf-8")
    report = saap.prune(source, pruning_ratio=0.2, calibration=text, **SETTINGS).report
    assert report.perplexity > 1
    assert report.evaluation_text == "held-out calibration samples"


def test_targets_in_parameters_and_bytes(source: Path, tmp_path: Path) -> None:
    dense = sum(p.numel() for p in tiny.model().parameters())
    result = saap.prune(source, target_params=int(0.9 * dense), **SETTINGS)
    assert result.plan.parameters <= int(0.9 * dense)
    target = int(4 * 0.9 * dense)
    saap.prune(source, target_size=target, out=tmp_path / "sized", **SETTINGS)
    assert (tmp_path / "sized" / "model.safetensors").stat().st_size <= target


class _InterruptError(Exception):
    pass


@pytest.mark.parametrize("stage", ["search", "restore", "observe_after"])
def test_an_interrupted_run_is_taken_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from saap.pipeline.prune import finish as finish_module

    config = PruneConfig(pruning_ratios=(0.2,), **SETTINGS)
    whole = run_prune(source, config, RunOptions(out=tmp_path / "whole"))[0]
    holder, name = {
        "search": (planning, "search"),
        "restore": (making, "reconstruct"),
        "observe_after": (finish_module, "observe"),
    }[stage]

    def stop(*arguments: object, **keywords: object) -> None:
        raise _InterruptError

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, stop)
        with pytest.raises(_InterruptError):
            run_prune(source, config, RunOptions(out=tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()
    with monkeypatch.context() as patch:
        patch.setattr(planning, "estimate", stop)
        again = run_prune(source, config, RunOptions(out=tmp_path / "cut"))[0]
    assert again.plan == whole.plan
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_only_settings_that_can_be_files_are_digested(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **keywords: object) -> None:
        raise _InterruptError

    text, digested = tiny.text_file(tmp_path / "text.txt"), []
    for word in ("adaptive", "sum", "groupwise"):
        (tmp_path / word).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(with_recovery, "run_prune", stop)
    monkeypatch.setattr(with_recovery, "model_digest", lambda resolved: "")
    monkeypatch.setattr(digests, "tree_digest", lambda path: digested.append(path) or "")
    config = PruneConfig(pruning_ratios=(0.2,), calibration=(str(text),), **SETTINGS | {"align": 32})
    tuning = RecoverConfig(data=(str(text),), length=32, validation_samples=1)
    with pytest.raises(_InterruptError):
        with_recovery.prune_and_recover(source, config, tuning, RunOptions(out=tmp_path / "out"), Silent())
    assert set(digested) == {text}


def test_stale_stage_files_are_refused(source: Path, tmp_path: Path) -> None:
    config = PruneConfig(pruning_ratios=(0.2,), **SETTINGS)
    run_prune(source, config, RunOptions(out=tmp_path / "o", keep_work=True))
    other = RunOptions(out=tmp_path / "o", keep_work=True, overwrite=True)
    with pytest.raises(StaleInputError, match="digest"):
        run_prune(source, PruneConfig(pruning_ratios=(0.2,), **{**SETTINGS, "seed": 9}), other)


def test_refusals_come_before_the_estimation(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "estimate", lambda *a, **k: pytest.fail("the estimation began"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    with pytest.raises(OutputError):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / "there", **SETTINGS)
    with pytest.raises(TargetError, match="at most 0"):
        saap.prune(source, pruning_ratio=0.95, **SETTINGS)
    plan = tmp_path / "plan.json"
    for layout, groups, fault in (
        ("adaptive", {"hidden": {"units": ""}}, PlanError), ("adaptive", {"hidden": {"kept": 16}}, PlanError),
        ("uniform", {"layers.0.ffn": {"kept": 40}}, LayoutError),
    ):  # fmt: skip
        plan.write_text(json.dumps({"format_version": 1, "layout": layout, "groups": groups}))
        with pytest.raises(fault):
            saap.prune(source, plan=plan, **SETTINGS)
    with pytest.raises(CalibrationError):
        saap.prune(source, pruning_ratio=0.2, calibration=str(short), **SETTINGS)
    ids = np.random.default_rng(0).integers(2, 128, (60, 64))
    with pytest.raises(LayoutError):
        saap.prune(build("gpt2"), pruning_ratio=0.1, layout="uniform", roles=["attention"], calibration=ids, **SETTINGS)
    assert (tmp_path / "there" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "out", "remedy"),
    [
        ({"restore": False}, "small", "use --restore, or use another --strategy"),
        ({"restore": False}, "small.gguf", "use another --strategy"),
        ({"method": "magnitude"}, "small", "use --restore"),
        ({"method": "random"}, "small.gguf", "prune less"),
    ],
)
def test_findings_recommend_only_what_the_run_would_take(settings: dict[str, Any], out: str, remedy: str) -> None:
    config = PruneConfig(pruning_ratios=(0.2,), **settings)
    run: Any = SimpleNamespace(
        config=config, options=RunOptions(out=Path(out)), vocabulary=None, meter=SimpleNamespace(stages=[]),
        graph=SimpleNamespace(block_parameters=100, parameters=100), loaded=SimpleNamespace(dtype=torch.float32),
    )  # fmt: skip
    made: Any = SimpleNamespace(plan=SimpleNamespace(trail=(), block_parameters=80), restored=making.Restored())
    change = PerplexityChange(text="bundled", tokens=10, before=2.0, after=20.0)
    (finding,) = finish.findings_of(run, made, None, change, None)
    assert finding.endswith(f"may not fit this model; {remedy}.")


def test_evaluate(source: Path, tmp_path: Path) -> None:
    text = tiny.text_file(tmp_path / "text.txt", 4000)
    report = saap.evaluate(source, texts=[text, "bundled"], window=64, max_tokens=640)
    assert set(report.perplexity) == {str(text), "bundled"}
    assert report.perplexity["bundled"].tokens == 630


CHANGES = [
    {"importance": "fused"}, {"importance": "vector"}, {"importance": "element1"}, {"importance": "mixed"},
    {"num_samples": 7}, {"sample_length": 32}, {"refit_tokens": 4096}, {"seed": 1}, {"align": 16},
    {"strategy": "uniform"}, {"strategy": "second-order"}, {"strategy": "importance"}, {"strategy": "stability"},
    {"strategy": "volatility-z"}, {"strategy": "volatility-cv"}, {"restore": False, "refit_tokens": None},
    {"preset": "default", "sample_length": None}, {"preset": "paper", "refit_tokens": None}, {"skip_layers": (1, 0)},
    {"roles": ["block"]},
    {"layout": "uniform"}, {"method": "magnitude", "refit_tokens": None},
]  # fmt: skip
CHANGES_OF_FUSED = [{"element_order": "1"}, {"aggregation": "max"}, {"fusion_scope": "global"}]


@pytest.mark.parametrize("calibration", ["mixed", "code"])
def test_every_setting_that_promises_another_result_gives_one(source: Path, calibration: str) -> None:
    def digest(**changes: Any) -> str:
        settings = {"pruning_ratio": 0.3, "preset": "fast", "num_samples": 4, "sample_length": 16, "refit_tokens": 1024}
        result = saap.prune(source, calibration=calibration, **settings | changes)
        weights = b"".join(one.detach().numpy().tobytes() for one in result.model.parameters())
        return hashlib.sha256(weights).hexdigest()

    plain, fused = digest(), digest(importance="fused")
    every = CHANGES if calibration == "mixed" else CHANGES[:1]  # the rules are the same for every text
    same = [change for change in every if digest(**change) == plain]
    same += [change for change in CHANGES_OF_FUSED if digest(importance="fused", **change) == fused]
    assert not same
