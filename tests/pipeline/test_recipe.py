from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import families
from tests.pipeline import tiny
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from saap.core.errors import ConfigurationError, GroupSizeError, OutputError, PlanError, SaapError
from saap.core.records import Layout, ModelGraph, Role
from saap.core.storage import write_plan
from saap.discovery import discover
from saap.models.loading.pretrained import load
from saap.pipeline.recipe import run as recipe_run
from saap.pipeline.recipe.run import Step, preview_recipe, recipe_steps, run_recipe
from saap.settings.evaluate import SpeedSettings
from saap.settings.export import ExportRequest
from saap.settings.prune import PruneConfig
from saap.settings.recipe import Recipe, read_recipe, recipe_from
from saap.settings.recover import RecoverConfig
from saap.structure_search.plan import make_plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SEVEN_B = LlamaConfig()
SHAPES: dict[str, PretrainedConfig] = {
    "llama-7b": SEVEN_B,
    "vicuna-7b": SEVEN_B,
    "llama-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, dtype="bfloat16"
    ),
    "tinyllama": LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "qwen3": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8
    ),
    "smollm2": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
}
PARAMETERS = {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320}
SMALL = {"pruning_ratios": [0.2], "samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}


GRAPHS: dict[int, ModelGraph] = {}
"""By shape, since two of the recipes share one."""


def kept(name: str, graph: ModelGraph) -> ModelGraph:
    return GRAPHS.setdefault(id(SHAPES[name]), graph)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_runs_dry_on_the_shape_of_its_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = GRAPHS.get(id(SHAPES[file.stem]))
    stock = recipe_run.discover
    monkeypatch.setattr(recipe_run, "discover", lambda *one, **more: kept(file.stem, found or stock(*one, **more)))
    SHAPES[file.stem].save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    recipe = read_recipe(file, [f"model={tmp_path / 'model'}", f"output_dir={tmp_path / 'out'}"])
    shown = preview_recipe(recipe)
    pruned = shown["steps"][0]
    assert pruned["name"] == "prune"
    assert 0.7 < pruned["parameters"] / shown["parameters"] < 0.9
    assert shown["parameters"] == PARAMETERS.get(file.stem, shown["parameters"])
    assert not (tmp_path / "out").exists()
    teachers = [request.dense for request in recipe.eval.values()]
    assert set(teachers) == {str(tmp_path / "model")}


def test_a_dry_run_knows_speeds_and_experts(tmp_path: Path) -> None:
    source = str(tmp_path / "model")
    families.configuration("mixtral").save_pretrained(source)
    tree = {
        "model": source, "out": str(tmp_path / "out"), "prune": {**SMALL, "roles": ["ffn"]},
        "eval": {"fast": {"speed": {"rounds": 2}, "dense": "${model}"}},
    }  # fmt: skip
    recipe = recipe_from(tree, "r")
    assert (recipe.eval["fast"].speed, recipe.eval["fast"].dense) == (SpeedSettings(rounds=2), source)
    pruned, measured = preview_recipe(recipe)["steps"]
    assert 0 < pruned["parameters"] < preview_recipe(recipe)["parameters"]
    assert measured["name"] == "eval.fast"
    asked = {"target_speedup": 1.2, "samples": 4}
    (pruned, _) = preview_recipe(recipe_from({**tree, "prune": asked}, "r"))["steps"]
    assert (pruned["speedup"], pruned["runtime"]) == (1.2, "transformers")
    with pytest.raises(ConfigurationError, match="stacks its experts"):
        preview_recipe(recipe_from({**tree, "prune": {**SMALL, "method": "flap", "restore": True}}, "r"))
    with pytest.warns(FutureWarning, match="eval.a.against is now eval.a.dense"):
        old = recipe_from({**tree, "eval": {"a": {"texts": ["bundled"], "against": source}}}, "r")
    assert old.eval["a"].dense == source


def test_there_is_a_recipe_for_each_shape() -> None:
    assert {file.stem for file in RECIPES} == set(SHAPES)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_set_takes_the_place_of_what_the_file_says(tmp_path: Path) -> None:
    file = written(tmp_path, "model: a\nout: o\nprune: {pruning_ratios: [0.2]}\nrecover: {teacher: '${model}'}\n")
    recipe = read_recipe(
        file, ["model=b", "prune.pruning_ratios=[0.1, 0.3]", "prune.skip_layers.first=2", "recover.learning_rate=1e-3"]
    )
    assert recipe.prune == PruneConfig(pruning_ratios=(0.1, 0.3), skip_layers={"first": 2})
    assert recipe.recover == RecoverConfig(teacher="b", learning_rate=1e-3)
    assert read_recipe(file, ["recover=null"]).recover is None


def test_a_step_without_settings_has_the_defaults_and_is_left_out_with_null(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\nout: o\nexport:\n  f16:\neval: {a: {texts: [bundled]}}\n")
    assert read_recipe(file).export == {"f16": ExportRequest()}
    left = read_recipe(file, ["export.f16=null"])
    assert (left.export, list(left.eval)) == ({}, ["a"])


def test_any_step_may_name_the_model_of_the_recipe(tmp_path: Path) -> None:
    tree = {"model": "dense", "out": tmp_path, "eval": {"model": {"texts": ["bundled"], "dense": "${model}"}}}
    assert recipe_from(tree, "a recipe").eval["model"].dense == "dense"


def test_a_recovery_that_does_not_fit_is_refused_before_the_pruning(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "model")  # of 32 channels
    tuning = {"data": ["novels"], "group_size": 64}
    recipe = recipe_from(
        {"model": str(source), "out": str(tmp_path / "out"), "prune": {**SMALL, "align": 64}, "recover": tuning}, "one"
    )
    for start in (run_recipe, preview_recipe):
        with pytest.raises(GroupSizeError, match="64, which do not divide the hidden size 32"):
            start(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["prune", "recover"])
def test_lines_of_a_text_are_read_before_the_pruning(step: str, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"content": "a"}\n')
    steps: dict[str, dict[str, object]] = {"prune": {**SMALL, "align": 32}, "recover": {"data": ["novels"]}}
    steps[step]["calibration" if step == "prune" else "data"] = [str(tmp_path / "text.jsonl")]
    recipe = recipe_from({"model": str(tiny.folder(tmp_path / "model")), "out": str(tmp_path / "out"), **steps}, "one")
    for start in (preview_recipe, run_recipe):
        with pytest.raises(SaapError, match=r"text\.jsonl, line 1, has n"):
            start(recipe)
    assert not (tmp_path / "out").exists()


def test_a_baseline_does_not_restore_unless_told_to() -> None:
    base = {"model": "m", "out": "o"}
    plain = recipe_from({**base, "prune": {"pruning_ratios": [0.2], "method": "flap"}}, "r").prune
    told = recipe_from({**base, "prune": {"pruning_ratios": [0.2], "method": "flap", "restore": True}}, "r").prune
    assert (plain is not None and plain.restore, told is not None and told.restore) == (False, True)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_only_quantised_weights_have_groups(tmp_path: Path, tuning: str) -> None:
    base = {"model": str(tiny.folder(tmp_path / "odd", intermediate_size=88)), "out": str(tmp_path / "out")}
    pruning = {"pruning_ratio": [0.2], "align": 8}
    assert recipe_from({**base, "prune": pruning, "recover": {"tuning": tuning}}, "r").recover is not None
    (step,) = preview_recipe(recipe_from({**base, "recover": {"tuning": tuning}}, "r"))["steps"]
    assert step["name"] == "recover"
    with pytest.raises(GroupSizeError, match="32 does not divide"):
        preview_recipe(recipe_from({**base, "recover": {}}, "r"))
    with pytest.raises(SaapError, match="router"):
        preview_recipe(recipe_from({**base, "recover": {"tuning": "router"}}, "r"))


@pytest.mark.parametrize(
    ("text", "offenders"),
    [
        (
            "model: m\nout: o\nprune: {pruning_ratio: 1, smples: 3}\n",
            ["prune.pruning_ratio 1 is out of range", "prune.smples is unknown, did you mean num_samples?"],
        ),
        (
            "modle: m\nout: o\nprune: {pruning_ratios: [0.2]}\n",
            ["modle is unknown, did you mean model?", "model is missing"],
        ),
        ("model: m\nout: o\nprune: {pruning_ratios: [1.2]}\n", ["prune.pruning_ratio 1.2"]),
        ("model: m\nout: o\nprune: {}\n", ["prune: no target was given"]),
        ("model: m\nout: o\nprune: 0.2\n", ["prune: give settings"]),
        ("model: m\nout: o\nprune: {pruning_ratios: [0.2], skip_layers: {frist: 2}}\n", ["did you mean first?"]),
        ("model: m\nout: o\neval: {a: {txts: [bundled]}}\n", ["eval.a.txts", "texts"]),
        ("model: m\nout: o\neval: {../a: {texts: [bundled]}}\n", ["eval.../a", "not a valid file name"]),
        ("model: m\nout: o\neval: {a: {}}\n", ["eval.a measures nothing"]),
        ("model: m\nout: o\neval: {a: {speed: {runtme: llama.cpp}}}\n", ["eval.a.speed.runtme", "mean runtime?"]),
        ("model: m\nout: o\neval: {a: {speed: {gguf_type: q9}}}\n", ["eval.a.speed.gguf_type"]),
        ("model: m\nout: o\nprune: {target_speedup: 0.5}\n", ["prune.target_speedup 0.5"]),
        ("model: m\nout: o\nprune: {pruning_ratios: [0.2]}\nrecover: {distillation: 2}\n", ["recover.distillation 2"]),
        ("model: m\nout: o\nexport: {a: {quantization: q9}}\n", ["export.a.quantization"]),
        (
            "model: m\nout: o\nprune: {pruning_ratio: 0.2}\nexport: {a: {format: mlx, quantization: q4_k_m}}\n",
            ["export.a: --quantization can only be given for GGUF files, not for mlx"],
        ),
        ("model: m\nout: o\n", ["has no step"]),
        ("model: m\nout: o\nreport: {}\nexport: {a: {}}\n", ["not pruned"]),
        ("model: m\nmodel: n\nout: o\n", ["line 2", "'model' is given twice"]),
        ("model: m\nout: &a o\nprune: *a\n", ["aliases"]),
        ("model: !!python/object/apply:os.system [ls]\n", ["python/object"]),
        ("model: [\n", ["not valid YAML"]),
        ("- model\n", ["not a recipe"]),
        ("", ["not a recipe"]),
        ("model: m\nout: o\nprune: {pruning_ratios: [0.2], align: 8}\nrecover: {}\n", ["prune.align 8"]),
        ("? [a, b]\n: c\n", ["a key is not a string"]),
    ],
)  # fmt: skip
def test_refusals_name_everything_that_is_wrong(tmp_path: Path, text: str, offenders: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_recipe(written(tmp_path, text))
    for offender in offenders:
        assert offender in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["samples", "=1", "prune..a=1", "model.a=1", "prune.samples=["])
def test_settings_that_are_not_understood(tmp_path: Path, setting: str) -> None:
    file = written(tmp_path, "model: m\nout: o\nprune: {pruning_ratios: [0.2]}\n")
    with pytest.raises(ConfigurationError, match="--set"):
        read_recipe(file, [setting])


WORDS = st.sampled_from(["model", "out", "prune", "recover", "eval", "export", "report", "samples", "texts", "align"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(tree=VALUES)
def test_any_tree_is_a_recipe_or_refused(tree: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = written(tmp_path_factory.getbasetemp(), yaml.safe_dump(tree))
    with suppress(SaapError):
        assert isinstance(read_recipe(file), Recipe)


@given(raw=st.binary(max_size=200) | st.text(alphabet="a:-[]{}&*!|>'\"#%@ \n\t?,0", max_size=60).map(str.encode))
def test_any_bytes_are_a_recipe_or_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(raw)
    with pytest.raises(ConfigurationError):
        read_recipe(file)


def test_deep_and_large_files_are_refused(tmp_path: Path) -> None:
    for text in ("a: " + "[" * 5000, "a: " + "{a: " * 3000, "a: " + "x" * 1_000_001):
        with pytest.raises(ConfigurationError):
            read_recipe(written(tmp_path, text))


class _Made:
    """Steps that only write files, and count how often they do."""

    def __init__(self, out: Path) -> None:
        self.out, self.calls, self.digest = out, [], "one"

    def steps(self, recipe: Recipe) -> list[Step]:
        return [self._step("prune", ()), self._step("recover", ("prune",)), self._step("eval.a", ("recover",))]

    def _step(self, name: str, needs: tuple[str, ...]) -> Step:
        path = self.out / name

        def make(reporter: object) -> None:
            self.calls.append(name)
            path.write_text(self.digest)

        digest = self.digest if name == "recover" else "same"
        return Step(name=name, digest=digest, needs=needs, outputs=(path,), run=make)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Made:
    stand_in = _Made(tmp_path / "out")
    monkeypatch.setattr(recipe_run, "recipe_steps", stand_in.steps)
    monkeypatch.setattr(recipe_run, "_check_inputs", lambda recipe: None)
    return stand_in


def carry_out(made: _Made) -> list[str]:
    made.calls.clear()
    run_recipe(Recipe(model="m", out=made.out, prune=PruneConfig(pruning_ratios=(0.2,))))
    return list(made.calls)


ALL = ["prune", "recover", "eval.a"]


def test_finished_steps_are_kept_and_what_follows_a_change_is_made_again(made: _Made) -> None:
    assert carry_out(made) == ALL
    assert carry_out(made) == []
    made.digest = "two"
    assert carry_out(made) == ["recover", "eval.a"]
    (made.out / "prune").unlink()
    assert carry_out(made) == ALL


def test_an_interrupted_step_is_made_again(made: _Made, monkeypatch: pytest.MonkeyPatch) -> None:
    stock: Callable[..., None] = recipe_run._State.record

    def stop(self: object, step: Step, *, done: bool) -> None:
        if step.name == "recover" and done:
            raise KeyboardInterrupt
        stock(self, step, done=done)

    with monkeypatch.context() as patch:
        patch.setattr(recipe_run._State, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            carry_out(made)
    assert carry_out(made) == ["recover", "eval.a"]


def test_what_the_recipe_did_not_write_is_not_replaced(made: _Made) -> None:
    carry_out(made)
    (made.out / "recover").write_text("mine")
    with pytest.raises(OutputError, match="recover exists, and is not as this recipe has written it"):
        carry_out(made)
    (made.out / "recipe.json").unlink()
    with pytest.raises(OutputError, match="prune"):
        carry_out(made)
    assert (made.out / "recover").read_text() == "mine"


def test_a_changed_text_or_model_changes_the_digests(tmp_path: Path) -> None:
    source, text = tiny.folder(tmp_path / "model"), tiny.text_file(tmp_path / "text.txt")
    tree = {
        "model": str(source), "out": str(tmp_path / "out"), "prune": {**SMALL, "calibration": [str(text)]},
        "eval": {"a": {"texts": ["bundled"]}},
    }  # fmt: skip
    first = [step.digest for step in recipe_steps(recipe_from(tree, "r"))]
    assert [step.digest for step in recipe_steps(recipe_from(tree, "r"))] == first
    text.write_text(text.read_text() + "more")
    second = [step.digest for step in recipe_steps(recipe_from(tree, "r"))]
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    third = [step.digest for step in recipe_steps(recipe_from(tree, "r"))]
    assert all(len({*digests}) == 3 for digests in zip(first, second, third, strict=True))


def test_a_dry_run_checks_a_given_plan(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "model")
    graph, plan = discover(load(source)), tmp_path / "plan.json"
    keep = {group.name: tuple(range(group.units // 2)) for group in graph.of_role(Role.ATTENTION)[:1]}
    write_plan(plan, make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="mine", align=1), graph)
    document = json.loads(plan.read_text())
    ((name, group),) = [(name, group) for name, group in document["groups"].items() if name in keep]
    tree = {"model": str(source), "out": str(tmp_path / "out"), "prune": {"plan": str(plan), "roles": ["ffn"]}}
    assert preview_recipe(recipe_from(tree, "r"))["steps"][0]["parameters"] > 0
    del group["units"]
    plan.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=f"only the number of units of {name}"):
        preview_recipe(recipe_from(tree, "r"))


def test_a_dry_run_finds_query_heads_and_refuses_roles_as_the_run_does(tmp_path: Path) -> None:
    base = {"model": str(tiny.folder(tmp_path / "model")), "out": str(tmp_path / "out")}
    wanted = {**SMALL, "pruning_ratios": [0.05], "roles": ["query"]}
    (pruned,) = preview_recipe(recipe_from({**base, "prune": wanted}, "r"))["steps"]
    assert pruned["parameters"] < tiny.model().num_parameters()
    refused = {**SMALL, "method": "block-influence", "restore": True, "roles": ["ffn"]}
    with pytest.raises(ConfigurationError, match="always removes block, not ffn"):
        preview_recipe(recipe_from({**base, "prune": refused}, "r"))


@pytest.mark.parametrize(("package", "words"), [("gguf", "gguf needs the package"), ("llama_cpp_py_sync", "Checking")])
def test_missing_packages_of_an_export_are_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, words: str
) -> None:
    tree = {
        "model": str(tiny.folder(tmp_path / "model")), "out": str(tmp_path / "out"), "prune": SMALL,
        "export": {"small": {}},
    }  # fmt: skip
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    for carry_out_recipe in (preview_recipe, run_recipe):
        with pytest.raises(SaapError, match=words):
            carry_out_recipe(recipe_from(tree, "r"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"texts": ["none.txt"]}, {"chat": "none.jsonl"}])
def test_files_of_an_evaluation_are_checked_before_the_first_step(tmp_path: Path, wrong: dict[str, object]) -> None:
    tree = {
        "model": str(tiny.folder(tmp_path / "model")), "out": str(tmp_path / "out"), "prune": SMALL,
        "eval": {"a": wrong},
    }  # fmt: skip
    for carry_out_recipe in (preview_recipe, run_recipe):
        with pytest.raises(SaapError, match="none"):
            carry_out_recipe(recipe_from(tree, "r"))
    assert not (tmp_path / "out").exists()


def test_all_steps_of_several_ratios(tmp_path: Path) -> None:
    source, out = tiny.folder(tmp_path / "model", num_hidden_layers=2), tmp_path / "out"
    text = str(tiny.text_file(tmp_path / "text.txt"))
    brief = {"rounds": 1, "prompt_tokens": 4, "new_tokens": 2}
    tree = {
        "model": str(source), "out": str(out),
        "prune": {**SMALL, "pruning_ratios": [0.1, 0.3], "layout": "uniform", "calibration": [text]},
        "recover": {
            "data": [text], "group_size": 16, "max_steps": 1, "length": 32, "batch": 1, "validation_samples": 1,
        },
        "eval": {"a": {"texts": ["bundled"], "window": 32, "max_tokens": 128, "dense": "${model}", "speed": brief}},
        "export": {"f16": {"verify": False}}, "report": {},
    }  # fmt: skip
    tree["prune"]["align"] = 16
    done = run_recipe(recipe_from(tree, "r"))
    assert {step["fate"] for step in done["steps"]} == {"made"}
    for ratio in ("0.1", "0.3"):
        report = json.loads((out / "eval" / ratio / "a.json").read_text())
        assert report["model"] == str(out / "recovered" / ratio)
        assert report["dense"]["parameters"] > report["parameters"]
        assert report["speed"]["against"]["model"] == str(source)
        assert (out / "export" / ratio / "f16.gguf").stat().st_size > 1000
        assert "<svg" in (out / "report" / ratio / "report.html").read_text()
    again = run_recipe(recipe_from({**tree, "export": {"q": {"quantization": "f32", "verify": False}}}, "r"))
    assert {step["name"] for step in again["steps"] if step["fate"] == "made"} == {"export.q (0.1)", "export.q (0.3)"}
