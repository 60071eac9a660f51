from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import command
from tests.noted import Noted
from tests.pipeline import tiny
from tests.pipeline.test_experts import mixture

import saap
from saap.core.errors import ConfigurationError, PlanError, StaleInputError
from saap.core.storage import read_scores
from saap.models.loading import memory
from saap.models.walk import offload as offload_module
from saap.models.walk import walk as walk_module
from saap.models.walk.offload import OffloadedWeights
from saap.models.walk.processes import Processes
from saap.pipeline.prune import making, planning
from saap.pipeline.prune.run import run_prune
from saap.pipeline.shared import memory_estimate, memory_limit, stages
from saap.pipeline.shared.inputs import RunOptions
from saap.settings.prune import PruneConfig
from saap.surgery import distillation
from saap.surgery import reconstruct as reconstruct_module

SETTINGS = {"samples": 6, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}
CUT_ONLY = {"restore": False, "refit_tokens": None}


def in_memory(part: offload_module.Part) -> bool:
    return any(value.untyped_storage().nbytes() > 8 for value in part.named_parameters().values())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Everything counts as large and the process as empty; how many parts are in memory after each is brought."""
    found: list[int] = []
    stock = OffloadedWeights.onload

    def counted(self: OffloadedWeights, part: offload_module.Part) -> None:
        stock(self, part)
        found.append(sum(map(in_memory, self.parts)))

    monkeypatch.setattr(OffloadedWeights, "onload", counted)
    monkeypatch.setattr(offload_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(memory_limit, "RESERVE_BYTES", 0)
    monkeypatch.setattr(memory, "of_process", lambda: 0)
    monkeypatch.setattr(memory_estimate.Needs, "of", lambda sizes, config: memory_estimate.Needs(2, 2, 1))
    yield found
    assert max(found, default=0) <= 1


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("flags", "own_text"),
    [
        (CUT_ONLY, False), ({}, True), ({**CUT_ONLY, "layout": "uniform"}, False),
        ({"dtype": "bfloat16", "strategy": "importance", "align": 1}, False),
    ],
    ids=str,
)  # fmt: skip
def test_offloaded_gives_what_the_model_in_memory_gives(
    source: Path, text: Path, tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, object], own_text: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(planning, "SEARCH_SHARE", 1000)  # of so few samples, nothing would be evaluated
    given = {**SETTINGS, **flags, "calibration": str(text) if own_text else "mixed"}
    here = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "here", **given)
    assert not counts
    away = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "away", max_memory=1, **given)
    assert len(counts) > 20
    scores = [read_scores(tmp_path / name / "saap" / "scores.safetensors") for name in ("here", "away")]
    assert scores[0].digest == scores[1].digest
    assert here.plan.keep == away.plan.keep
    expected, found = tensors(tmp_path / "here"), tensors(tmp_path / "away")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    tokens = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(away.model(tokens).logits, here.model(tokens).logits)
    assert away.report.answer == ""
    assert away.report.evaluation_tokens == here.report.evaluation_tokens
    assert not (tmp_path / "away.saap-work").exists()


@pytest.mark.parametrize("flags", [CUT_ONLY, {"merge_experts": True}], ids=str)
def test_offloaded_experts_are_removed_or_merged_as_in_memory(
    tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool]
) -> None:
    source = mixture(tmp_path / "dense")
    monkeypatch.setattr(planning, "search_evaluations", lambda run: 0)  # with experts in files, none can be evaluated
    given: dict[str, Any] = {**SETTINGS, **flags, "roles": ["expert"], "importance": "reap"}
    here = saap.prune(source, pruning_ratio=0.25, out=tmp_path / "here", **given)
    away = saap.prune(source, pruning_ratio=0.25, out=tmp_path / "away", max_memory=1, **given)
    assert here.plan.keep == away.plan.keep
    expected, found = tensors(tmp_path / "here"), tensors(tmp_path / "away")
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


class _InterruptError(Exception):
    pass


@pytest.mark.parametrize("importance", ["reap", "token-fisher"])
def test_an_interrupted_estimation_resumes_at_its_block(
    tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch, importance: str
) -> None:
    source = mixture(tmp_path / "dense")
    config = PruneConfig(pruning_ratios=0.25, roles="expert", importance=importance, **{**SETTINGS, **CUT_ONLY})
    whole = run_prune(source, config, RunOptions(out=tmp_path / "whole", max_memory=1))[0]
    passes: list[int] = []
    stock = walk_module._Walk._forward if importance == "reap" else walk_module._Walk._back

    def forward(self: walk_module._Walk, layer: int, *arguments: Any) -> torch.Tensor:
        if stop and layer == 1:
            raise _InterruptError
        passes.append(layer)
        return stock(self, layer, *arguments)

    monkeypatch.setattr(walk_module._Walk, stock.__name__, forward)
    stop = True
    with pytest.raises(_InterruptError):
        run_prune(source, config, RunOptions(out=tmp_path / "cut", max_memory=1))
    first, stop = set(passes), False
    passes.clear()
    reporter = Noted()
    again = run_prune(source, config, RunOptions(out=tmp_path / "cut", max_memory=1), reporter)[0]
    assert "the estimation resumes after its last finished block" in reporter.notes
    assert first
    assert not first & set(passes)
    assert again.plan == whole.plan
    scores = [read_scores(tmp_path / name / "saap" / "scores.safetensors") for name in ("whole", "cut")]
    assert scores[0].digest == scores[1].digest
    for name, tensor in tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, tensors(tmp_path / "cut")[name])


def test_several_ratios(source: Path, tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SEARCH_SHARE", 1000)
    config = PruneConfig(pruning_ratios=(0.1, 0.3), **SETTINGS)
    here = run_prune(source, config, RunOptions(out=tmp_path / "here"))
    away = run_prune(source, config, RunOptions(out=tmp_path / "away", max_memory=1))
    for ratio, first, second in zip(("0.1", "0.3"), here, away, strict=True):
        assert first.plan.keep == second.plan.keep
        for name, tensor in tensors(tmp_path / "here" / ratio).items():
            assert torch.equal(tensor, tensors(tmp_path / "away" / ratio)[name])


def test_second_order_costs_are_found_block_by_block(tmp_path: Path, counts: list[int]) -> None:
    wide = tiny.folder(tmp_path / "wide", intermediate_size=512)  # all Gram matrices are larger than the weights
    given: dict[str, Any] = {**SETTINGS, "strategy": "second-order"}
    result = saap.prune(wide, pruning_ratio=0.2, out=tmp_path / "out", max_memory=1, **given)
    assert any(stage.name == stages.FIND_COSTS.title for stage in result.report.stages)


def test_the_search_measures_as_many_candidates_as_the_tokens_allow(
    source: Path, tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "READING_TOKENS", 0)
    given = {**SETTINGS, "effort": "default", "samples": 100, "sample_length": 128, "roles": ("ffn",)}
    result = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "many", max_memory=1, **given)
    assert len(result.plan.trail) == int(0.2 * 4 * 100 * 128 / (16 * 128)) - 1  # 4
    given["samples"] = 6
    result = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "few", max_memory=1, **given)
    assert result.plan.trail == ()


def test_a_limit_larger_than_the_need_changes_nothing(source: Path, tmp_path: Path, counts: list[int]) -> None:
    result = saap.prune(source, pruning_ratio=0.2, out=tmp_path / "out", max_memory=2, **SETTINGS)
    assert not counts
    assert result.report.answer or result.report.prompt


def test_trusting_code_that_is_not_there_changes_nothing(source: Path, tmp_path: Path, counts: list[int]) -> None:
    saap.prune(source, pruning_ratio=0.2, out=tmp_path / "out", max_memory=1, trust_remote_code=True, **SETTINGS)
    assert counts


def test_estimate_by_folder(source: Path, tmp_path: Path, counts: list[int]) -> None:
    graph = saap.discover(source)
    tokens = np.random.default_rng(0).integers(2, 300, (4, 32))
    expected = saap.estimate(source, graph, tokens)
    assert not counts
    assert saap.estimate(source, graph, tokens, max_memory=1).digest == expected.digest
    assert counts


FLAGS: list[tuple[tuple[str, ...], str]] = [
    (("--max-memory", "much"), "--max-memory"),
    (("--max-memory", "1B", "--method", "flap"), "--method flap"),
    (("--max-memory", "1B", "--roles", "hidden"), "--roles hidden"),
    (("--max-memory", "1B", "--roles", "ffn,block"), "--roles block"),
    (("--max-memory", "1B", "--dry-run"), "--dry-run"),
    (("--max-memory", "1B", "--recover", "mixed"), "--recover"),
]


@pytest.mark.parametrize(("flags", "offender"), FLAGS, ids=str)
def test_what_needs_the_whole_model_is_refused_by_name(
    flags: tuple[str, ...], offender: str, source: Path, tmp_path: Path, counts: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    code, _, errors = command.run(capsys, "prune", source, "--pruning-ratio", "0.2", "--out", out, *flags)
    assert code == 2
    assert offender in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"), [(("--max-memory", "1B"), 2), (("--device-map", "auto", "--dry-run"), 0)], ids=str
)
def test_the_preset_of_the_paper_says_that_its_recovery_is_left_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], expected: int
) -> None:
    paper = ("--pruning-ratio", "0.2", "--preset", "paper", "--out", tmp_path / "out")
    code, said, errors = command.run(capsys, "prune", source, *paper, *flags)
    assert (code, f"{flags[0]} leaves out the recovery of --preset paper" in said) == (expected, True), errors


@pytest.mark.parametrize(("roles", "offender"), [(["block"], "whole blocks"), (["hidden"], "hidden")], ids=str)
def test_plans_that_need_the_whole_model_are_refused_by_name(
    source: Path, tmp_path: Path, counts: list[int], roles: list[str], offender: str
) -> None:
    saap.prune(source, pruning_ratio=0.25, roles=roles, out=tmp_path / "first", **{**SETTINGS, **CUT_ONLY})
    plan, out = tmp_path / "first" / "saap" / "plan.json", tmp_path / "out"
    with pytest.raises(PlanError, match=f"removes {offender}.*the whole model has to be in memory"):
        saap.prune(source, plan=plan, out=out, max_memory=1, **SETTINGS)
    assert not out.exists()


def test_a_plan_without_some_blocks_is_cut_part_by_part(source: Path, tmp_path: Path, counts: list[int]) -> None:
    cut = {**SETTINGS, **CUT_ONLY}
    saap.prune(source, pruning_ratio=0.25, roles=["block"], out=tmp_path / "whole", **cut)
    assert not counts
    plan = tmp_path / "whole" / "saap" / "plan.json"
    saap.prune(source, plan=plan, out=tmp_path / "parts", max_memory=1, **cut)
    assert counts
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_several_processes_are_refused_before_there_is_a_work_folder(
    source: Path, tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "found", lambda: Processes(rank=1, count=2))
    with pytest.raises(ConfigurationError, match="read by one process"):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / "out", max_memory=1, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_is_too_small_names_the_least(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--max-memory 0.1GB is too small .* Use --max-memory [\d.]+GB"):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / "out", max_memory=10**8, **SETTINGS)


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="in memory already"):
        saap.prune(tiny.model(), pruning_ratio=0.2, max_memory=10**9, out=tmp_path / "out", **SETTINGS)


def test_needs_grow_with_what_is_asked() -> None:
    sizes = memory_estimate.Sizes(
        weights=27 * 10**9, block=810 * 10**6, around=10**9, matrix=180 * 10**6, widest=11008, width=4096, blocks=32,
        vocabulary=32000, heads=32, values=65 * 10**8,
    )  # fmt: skip

    def needs(**choices: Any) -> memory_estimate.Needs:
        return memory_estimate.Needs.of(sizes, PruneConfig(pruning_ratios=(0.2,), **choices))

    assert needs(restore=False).offloaded < 2 * 10**9 < needs(restore=True).offloaded < 8 * 10**9
    assert needs(restore=False).resident > sizes.weights
    estimation = [
        memory_estimate.stage_needs(sizes, PruneConfig(pruning_ratios=(0.2,), sample_length=length))[stages.ESTIMATE]
        for length in (128, 256, 2048)
    ]
    assert estimation[0] == estimation[1] < estimation[2] / 3
    without, with_gradients = (needs(method=method).spilled for method in ("flap", "llm-pruner-mixed"))
    assert without < sizes.weights + 8 * sizes.values <= with_gradients


def test_weights_count_once_where_the_run_fits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are read count as memory of the process, and are part of the need as well."""
    weights = 10**9
    taken = [10**8]
    monkeypatch.setattr(memory, "of_process", lambda: taken[0])
    stock = memory_limit.open_model

    def reading(*arguments: Any, **named: Any) -> Any:
        taken[0] += weights
        return stock(*arguments, **named)

    monkeypatch.setattr(memory_limit, "open_model", reading)
    needs = memory_estimate.Needs(weights + 10**8, weights + 10**8, 1)
    monkeypatch.setattr(memory_estimate.Needs, "of", lambda sizes, config: needs)
    config = PruneConfig(pruning_ratios=(0.2,), **SETTINGS)
    limit = memory_limit.RESERVE_BYTES + weights + 3 * 10**8
    assert not memory_limit.open_within(source, config, RunOptions(max_memory=limit), None).spills


@pytest.mark.parametrize("stop_at", ["block 1", "block 2", "distillation", "writing"])
@pytest.mark.parametrize(
    "given", [{}, {"roles": "expert"}, {"roles": "expert", "merge_experts": True}], ids=["dense", "experts", "merged"]
)
def test_an_interrupted_reconstruction_resumes_at_its_block(
    source: Path, tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any],
    stop_at: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(distillation, "ROUNDING", 0.0)  # of random weights, there is hardly anything to learn
    model = mixture(tmp_path / "dense") if given else source
    config = PruneConfig(pruning_ratios=0.25, **{**SETTINGS, "refit_tokens": 4096}, **given)
    whole = run_prune(model, config, RunOptions(out=tmp_path / "whole", max_memory=1))[0]
    visited: list[int] = []

    def stopping(module: Any, name: str, place: Callable[..., str]) -> None:
        stock = getattr(module, name)

        def stopped(*arguments: Any) -> Any:
            if stop and place(*arguments) == stop_at:
                raise _InterruptError
            if place(*arguments).startswith("block"):
                visited.append(arguments[1])
            return stock(*arguments)

        monkeypatch.setattr(module, name, stopped)

    stopping(reconstruct_module._BlockByBlock, "run_block", lambda _, layer: f"block {layer}")
    stopping(making, "distill", lambda *_: "distillation")
    stopping(making, "_write_folder", lambda *_: "writing")
    stop = True
    with pytest.raises(_InterruptError):
        run_prune(model, config, RunOptions(out=tmp_path / "cut", max_memory=1))
    stop, reporter, first = False, Noted(), list(visited)
    again = run_prune(model, config, RunOptions(out=tmp_path / "cut", max_memory=1), reporter)[0]
    resumed = "the reconstruction resumes after its last finished block" in reporter.notes
    if stop_at == "writing":  # the weights are not those of the reconstruction any more
        assert not resumed
        assert visited == 2 * first
    else:
        assert resumed
        assert visited == list(range(len(visited)))
    assert again.plan == whole.plan
    assert again.report.distillation == whole.report.distillation != (0.0, 0.0)
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another block"])
def test_damaged_weights_of_finished_blocks_are_refused(
    source: Path, tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config = PruneConfig(pruning_ratios=0.25, **SETTINGS)

    def interrupted(*_: Any) -> None:
        raise _InterruptError

    with monkeypatch.context() as patch:
        patch.setattr(making, "distill", interrupted)
        with pytest.raises(_InterruptError):
            run_prune(source, config, RunOptions(out=tmp_path / "cut", max_memory=1))
    first, second, *_ = sorted(tmp_path.glob("cut.saap-work/changed-*/0*.safetensors"))
    if damage == "missing":
        first.unlink()
    elif damage == "truncated":
        first.write_bytes(first.read_bytes()[:-8])
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(StaleInputError, match=first.name):
        run_prune(source, config, RunOptions(out=tmp_path / "cut", max_memory=1))
