from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests import processes
from tests.command import run
from tests.data.byte_tokenizer import byte_tokenizer
from tests.noted import Noted
from tests.pipeline import tiny
from tests.recovery.tiny import blocks, build
from torch import nn
from transformers import AutoModelForCausalLM

import saap
from saap.core.errors import (
    ConfigurationError,
    GroupSizeError,
    ModelError,
    OutputError,
    StaleInputError,
    VerificationError,
)
from saap.core.manifest import KindChange, RunManifest
from saap.data.texts import GENERAL, KINDS
from saap.data.training import training_data
from saap.evaluation.perplexity import joint_perplexity, perplexities
from saap.export.huggingface import stored_entries
from saap.models.checkpoint.groupwise import GroupwiseLinear, GroupwiseWeight, linears_inside, pack_linear, read_packed
from saap.models.loading.pretrained import load_groupwise, load_model, open_skeleton
from saap.models.loading.references import resolve_model
from saap.models.structure.linear import weight_out_in
from saap.pipeline.prune.with_recovery import shared_by
from saap.pipeline.recover import run as recovery_run
from saap.pipeline.recover.context import check_processes, known_kinds
from saap.pipeline.recover.forecast import share_after
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.tokens import evaluation_sets
from saap.recovery.quantise import quantise
from saap.settings.recover import RecoverConfig, Tuning

QUICK = {"length": 32, "batch": 4, "max_steps": 4, "validate_every": 2, "validation_samples": 2}
FLAGS = [
    "--length", "32", "--batch", "4", "--max-steps", "4", "--validate-every", "2", "--validation-samples", "2",
]  # fmt: skip
TOKENS = torch.arange(2, 42).reshape(2, 20)
PRUNING = {"samples": 6, "sample_length": 32, "refit_tokens": 1024, "effort": "fast", "align": 32}
CUT_ONLY = {**PRUNING, "restore": False, "refit_tokens": None}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def test_a_head_of_its_own_is_kept_though_the_configuration_ties_it(dense: Path, text: Path, tmp_path: Path) -> None:
    model = load_model(resolve_model(dense), device=torch.device("cpu"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0).clone())
    model.config.tie_word_embeddings = False
    folder = tmp_path / "own"
    model.save_pretrained(folder)
    shutil.copytree(
        dense, folder, ignore=lambda at, names: [one for one in names if "token" not in one], dirs_exist_ok=True
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="its output head is its own"):
        open_skeleton(resolve_model(folder), torch.float32)
    saap.recover(folder, data=[text], out=tmp_path / "tuned", distillation=0, bits=8, learning_rate=1e-9, **QUICK)
    tuned = saap.load(tmp_path / "tuned")
    assert tuned.config.tie_word_embeddings is False
    assert torch.allclose(logits(tuned), logits(model), atol=0.1)


def test_an_instruction_without_an_input_may_say_null(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Say hi", "input": null, "output": "hi"}\n' * 4)
    assert len(training_data([file], byte_tokenizer(), length=64, held_out=1, seed=0).train) == 3


@pytest.mark.parametrize("tuning", ["groupwise", "full"])
def test_a_dry_run_forecasts_costs_and_gain(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tuning: str
) -> None:
    learned, small = tmp_path / "learned", tmp_path / "small"
    taught = {"data": [text], "tuning": "full", "distillation": 0, "learning_rate": 0.01}
    saap.recover(dense, **taught, out=learned, **{**QUICK, "max_steps": 30})  # so that there is something to lose
    plain = {**CUT_ONLY, "roles": ["ffn"]}
    saap.prune(learned, pruning_ratio=0.4, out=small, **plain)
    flags = ["recover", str(small), "--data", str(text), "--tuning", tuning, *FLAGS]
    found = json.loads(run(capsys, *flags, "--dry-run", "--json")[1])
    assert {path.name for path in tmp_path.iterdir()} == {"learned", "small"}
    assert (found["steps"], found["tokens"]) == (4, 4 * 4 * 32)
    assert found["seconds"] > 4 * found["seconds_of_step"] > 0
    if tuning == "full":
        assert found["gap_closed"] == pytest.approx(share_after(found["tokens"], Tuning.FULL))
        gap = found["validation_before"] - found["validation_teacher"]
        assert found["validation"] == pytest.approx(found["validation_before"] - found["gap_closed"] * gap)
    else:
        assert found["gap_closed"] is found["validation"] is None
    tuned = json.loads(run(capsys, *flags, "--out", tmp_path / "tuned", "--json")[1])
    assert (tuned["steps"], tuned["tokens"]) == (found["steps"], found["tokens"])
    assert tuned["validation_teacher"] == pytest.approx(found["validation_teacher"], rel=1e-5)  # it is distilled from
    assert tuned["validation_before"] == pytest.approx(found["validation_before"], rel=1e-5)

    printed = " ".join(run(capsys, *flags, "--dry-run", "--max-minutes", "1", "--distillation", "0")[1].split())
    assert "4 steps until the first limit" in printed
    assert "not forecast" in printed
    code, _, error = run(capsys, *flags, "--dry-run", "--on-policy", "0.5")
    assert (code, error.count("--on-policy")) == (2, 1)


def test_a_training_that_gained_nothing_says_what_helps(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["--data", text, "--distillation", "0", "--tuning", "full", *FLAGS]
    for model, name, rate in ((dense, "learned", "0.01"), (tmp_path / "learned", "harmed", "1")):
        code, out, error = run(capsys, "recover", model, *plain, "--learning-rate", rate, "--out", tmp_path / name)
        assert code == 0, error
        printed = " ".join(out.split())
        assert ("(step 0 of 4)" in printed) is (name == "harmed"), printed
        assert ("lower --learning-rate, or give more --data" in printed) is (name == "harmed")


def test_the_law_of_tokens_rises_from_nothing() -> None:
    shares = [share_after(tokens, Tuning.FULL) for tokens in (0, 1e3, 1e5, 1e7)]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] < 1


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_a_pruned_model_is_tuned_and_opens_everywhere(dense: Path, text: Path, tmp_path: Path, layout: str) -> None:
    small = tmp_path / "small"
    pruned = saap.prune(dense, pruning_ratio=0.2, out=small, layout=layout, **PRUNING)
    result = saap.recover(small, data=[text], out=tmp_path / "tuned", **QUICK)
    out = tmp_path / "tuned"
    opened = saap.load(out)
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=1e-4, atol=1e-4)
    elsewhere = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=layout == "adaptive")
    torch.testing.assert_close(logits(elsewhere), logits(opened), rtol=0, atol=0)
    packed = saap.load(out, packed=True)
    torch.testing.assert_close(logits(packed), logits(opened), rtol=1e-4, atol=1e-4)
    layers = [module for module in packed.modules() if isinstance(module, GroupwiseLinear)]
    assert len(layers) == len(read_packed(out)) == 4 * 7
    assert not [name for name, value in packed.named_parameters() if value.ndim > 1 and "embed" not in name]
    report = result.report
    assert report.perplexity_dense == pytest.approx(pruned.report.perplexity_dense)
    assert report.perplexity_before == pytest.approx(pruned.report.perplexity)
    assert report.answer_dense == pruned.report.answer_dense
    manifest = RunManifest.model_validate_json((out / "saap" / "manifest.json").read_bytes())
    assert manifest.parameters.after == pruned.report.parameters == report.parameters
    assert manifest.recovery is not None
    assert [point.step for point in manifest.recovery.curve] == [1, 2, 3, 4]
    assert manifest.recovery.curve[1].validation is not None
    assert manifest.recovery.settings["teacher"] == str(dense)  # the record names it
    assert manifest.recovery.settings["distillation"] == 1
    assert (out / "saap" / "plan.json").read_bytes() == (small / "saap" / "plan.json").read_bytes()
    assert "## Recovery" in (out / "README.md").read_text()
    assert not out.with_name("tuned.saap-work").exists()
    again = saap.recover(out, data=[text], out=tmp_path / "twice", **QUICK)  # also a tuned one can be tuned
    assert again.report.perplexity_quantised == pytest.approx(report.perplexity, rel=1e-2)


def test_the_written_weights_are_scale_times_code_plus_zero(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    saap.recover(dense, data=[text], out=out, bits=3, group_size=16, **QUICK)
    packed = read_packed(out)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        for name, weight in packed.items():
            stored = file.get_tensor(f"{name}.weight")
            by_hand = weight.codes().reshape(len(stored), -1, 16) * weight.scale.float()[..., None]
            by_hand = (by_hand + weight.zero[..., None]).flatten(1)
            torch.testing.assert_close(stored, by_hand, rtol=0, atol=1e-6)
            assert weight.codes().max() <= 7
    assert not list(out.glob("*packed*"))


@pytest.mark.parametrize(
    "changes", [{"error_feedback": True}, {"tuning": "lora"}, {"tuning": "full"}, {"teacher": "dense"}]
)
def test_options(dense: Path, text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "teacher" in changes:
        changes = {"teacher": str(dense), "distillation": 0.5}
    result = saap.recover(dense, data=[text], out=tmp_path / "tuned", learning_rate=0.01, **{**QUICK, **changes})
    torch.testing.assert_close(logits(saap.load(tmp_path / "tuned")), logits(result.model), rtol=1e-4, atol=1e-4)
    assert result.report.validation < result.report.validation_before
    assert (result.report.perplexity_dense is not None) == ("teacher" in changes)
    assert (tmp_path / "tuned" / "saap" / "packed.safetensors").exists() == ("tuning" not in changes)


def test_a_result_that_opens_as_another_model_is_not_put_in_its_place(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_run, "TOLERANCE", -1.0)
    with pytest.raises(VerificationError, match="does not compute what the one in memory does"):
        saap.recover(dense, data=[text], out=tmp_path / "tuned", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.saap-work"]
    monkeypatch.undo()
    saap.recover(dense, data=[text], out=tmp_path / "tuned", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_without_the_dense_model_the_text_alone_teaches(text: Path, tmp_path: Path) -> None:
    dense = tiny.folder(tmp_path / "dense")
    small = tmp_path / "small"
    saap.prune(dense, pruning_ratio=0.2, out=small, **PRUNING)
    other = tiny.folder(tmp_path / "other", intermediate_size=128)
    with pytest.raises(ConfigurationError, match=r"other has .* parameters, but .*small was pruned from a model of"):
        saap.recover(small, data=[text], out=tmp_path / "tuned", teacher=other, **QUICK)
    dense.rename(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match=r"--distillation has no teacher.*--dense"):
        saap.recover(small, data=[text], out=tmp_path / "tuned", distillation=0.5, **QUICK)
    noted = Noted()
    result = saap.recover(small, data=[text], out=tmp_path / "tuned", reporter=noted, **QUICK)
    assert "no distillation from the dense model: The folder" in noted.notes[0]
    manifest = RunManifest.model_validate_json((tmp_path / "tuned" / "saap" / "manifest.json").read_bytes())
    assert manifest.recovery is not None
    assert (manifest.recovery.settings["teacher"], manifest.recovery.settings["distillation"]) == (None, 0)
    assert result.report.perplexity_dense is not None  # known from the record


def test_sizes_that_do_not_divide_are_refused_before_training(text: Path, tmp_path: Path) -> None:
    odd = tiny.folder(tmp_path / "odd", intermediate_size=88)
    with pytest.raises(GroupSizeError, match=r"4 matrices .* 32 .*model\.layers\.0\.mlp\.down_proj \(88\).*--align 32"):
        saap.recover(odd, data=[text], out=tmp_path / "tuned", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_other_refusals(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists"):
        saap.recover(dense, data=[text], out=out, **QUICK)
    with pytest.raises(ModelError, match="no packed weights"):
        saap.load(dense, packed=True)
    assert (out / "mine.txt").read_text() == "keep"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(text: Path, tmp_path: Path) -> None:
    small = tiny.folder(tmp_path / "small", vocab_size=100)
    with pytest.raises(ModelError, match="embedding has 100 rows"):
        saap.recover(small, data=[text], **QUICK)


def test_on_the_command_line_a_killed_run_goes_on(dense: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *FLAGS[:4], "--max-steps", "16", *FLAGS[6:], "--patience", "0"]
    whole = processes.saap("recover", dense, "--out", tmp_path / "whole", "--json", *flags)
    assert whole.returncode == 0, whole.stderr
    report = json.loads(whole.stdout)
    assert report["steps"] == 16
    processes.start("recover", dense, "--out", tmp_path / "cut", *flags).kill_at("step 4:")
    assert not (tmp_path / "cut").exists()
    resumed = processes.saap("recover", dense, "--out", tmp_path / "cut", *flags)
    assert "resuming after step" in resumed.stdout, resumed.stdout + resumed.stderr
    curves = [
        json.loads((tmp_path / name / "saap" / "manifest.json").read_text())["recovery"]["curve"]
        for name in ("whole", "cut")
    ]
    assert len(curves[0]) == len(curves[1]) == 16
    assert max(abs(one["loss"] - other["loss"]) for one, other in zip(*curves, strict=True)) <= 1e-6


def test_other_settings_do_not_take_up_a_training(dense: Path, text: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    saap.recover(dense, data=[text], out=tmp_path / "a", work_dir=work, keep_work=True, **QUICK)
    with pytest.raises(StaleInputError, match="other settings"):
        saap.recover(dense, data=[text], out=tmp_path / "b", work_dir=work, **{**QUICK, "rank": 2})


def test_two_processes_give_the_losses_of_one(dense: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--data", text, *FLAGS, "--device", "cpu", "--teacher", dense]
    curves = {}
    for name, count, more in (("one", 1, []), ("two", 2, []), ("shards", 2, ["--shard"])):
        arguments = ["recover", dense, *flags, "--out", tmp_path / name, *more]
        for done in processes.saap_in_several(count, *arguments) if count > 1 else [processes.saap(*arguments)]:
            assert done.returncode == 0, done.stderr[-2000:]
        manifest = json.loads((tmp_path / name / "saap" / "manifest.json").read_text())
        curves[name] = manifest["recovery"]["curve"]
        assert manifest["recovery"]["processes"] == (1 if name == "one" else 2)
    for name in ("two", "shards"):
        for one, other in zip(curves["one"], curves[name], strict=True):
            assert abs(one["loss"] - other["loss"]) <= 1e-5
            assert one["validation"] is None or abs(one["validation"] - other["validation"]) <= 1e-5
    whole, split = (read_packed(tmp_path / name) for name in ("two", "shards"))
    assert whole.keys() == split.keys()
    for path, weight in whole.items():
        assert torch.equal(weight.packed, split[path].packed)
        assert torch.allclose(weight.zero, split[path].zero, atol=1e-6)


def test_prune_with_recover_runs_all_three_stages_in_several_processes(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done, other = processes.saap_in_several(
        2, "prune", dense, "--pruning-ratio", "0.2", "--out", out, "--effort", "fast", "--samples", "4",
        "--sample-length", "32", "--refit-tokens", "1024", "--recover", text, "--recover-minutes", "0.02", "--json",
    )  # fmt: skip
    assert done.returncode == other.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["pruned"]["pruning_ratio"] >= 0.2
    assert report["recovered"]["perplexity_before"] == pytest.approx(report["pruned"]["perplexity"])
    assert report["recovered"]["path"] == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert len(read_packed(out)) == 28
    saap.load(out)


def test_a_tuning_after_the_pruning_has_a_sequence_for_each_process(text: Path, tmp_path: Path) -> None:
    plain, options = RecoverConfig(data=(str(text),)), RunOptions(out=tmp_path / "small")
    assert [shared_by(plain, count).batch for count in (1, 4)] == [1, 4]
    given = RecoverConfig(data=(str(text),), batch=2)
    assert shared_by(given, 4) is given
    with pytest.raises(ConfigurationError, match="--batch-size 2 is less than the 4 processes"):
        check_processes(given, options, 4)


def test_a_kind_that_is_part_of_mixed_is_read_once() -> None:
    found = [
        training_data(sources, byte_tokenizer(), length=512, held_out=1, seed=0, kinds=("code", "french"))
        for sources in (["mixed"], ["mixed", "code"])
    ]
    assert len(found[0].train) == len(found[1].train)


def test_stages_of_other_weights_and_texts_are_not_taken_up(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    calibration, data = (Path(shutil.copy(text, tmp_path / name)) for name in ("calibration.txt", "data.txt"))
    words = [
        "prune", source, "--pruning-ratio", "0.2", "--out", tmp_path / "small", "--overwrite", "--effort", "fast",
        "--samples", "4", "--sample-length", "32", "--refit-tokens", "1024", "--calibration", calibration, "--recover",
        data, "--recover-minutes", "0.01", "--work-dir", tmp_path / "work", "--keep-work", "--quiet",
    ]  # fmt: skip
    for _ in range(2):
        code, _, error = run(capsys, *words)
        assert code == 0, error
    weights = (source / "model.safetensors").read_bytes()
    others = {source / "model.safetensors": weights[:-200] + weights[-100:] + weights[-200:-100]}
    others |= {file: file.read_text()[50:].encode() for file in (calibration, data)}
    for changed, content in others.items():
        before = changed.read_bytes()
        changed.write_bytes(content)
        code, _, error = run(capsys, *words)
        assert (code, "another model" in error) == (2, True), changed
        changed.write_bytes(before)


def test_a_recovery_measures_anew_what_was_recorded_with_the_other_kind_of_windows(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    source, small = Path(shutil.copytree(dense, tmp_path / "dense")), tmp_path / "small"
    led = byte_tokenizer(bos=True)
    led.save_pretrained(source)
    pruned = saap.prune(source, pruning_ratio=0.2, out=small, calibration=text, **CUT_ONLY).report
    found = {
        bos: saap.recover(small, data=[text], bos=bos, **{**QUICK, "max_steps": 1}).report for bos in (True, False)
    }
    texts = evaluation_sets(led, GENERAL)
    assert found[True].perplexity_before == pruned.perplexity
    alone = joint_perplexity(perplexities(saap.load(small), texts).values())
    assert found[False].perplexity_before == pytest.approx(alone, rel=1e-5)
    assert abs(alone - pruned.perplexity) > 1e-4 * alone


def test_what_a_manifest_says_cannot_steer_the_terminal(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    saap.prune(dense, pruning_ratio=0.2, out=small, calibration=text, **CUT_ONLY)
    file = small / "saap" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["answers"] = dict.fromkeys(manifest["answers"], "a\x1b]0;b\x07[red]c\x9b2J")
    file.write_text(json.dumps(manifest))
    code, out, error = run(capsys, "recover", small, "--data", text, *FLAGS, "--out", tmp_path / "tuned")
    assert code == 0, error
    shown = [line.split(":")[0].strip() for line in out.splitlines() if "a ]0;b [red]c 2J" in line]
    assert shown == ["dense", "before"]
    assert not [letter for letter in out + error if not letter.isprintable() and letter != "\n"]


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen2", "phi3", "bloom"])
def test_opening_tensor_by_tensor_equals_opening_whole(family: str, tmp_path: Path) -> None:
    model = build(family).float()
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    resolved = resolve_model(tmp_path)
    open_skeleton(resolved, torch.float32)  # nothing has to be opened whole
    calls: list[str] = []

    def pack(path: str, read: Any) -> GroupwiseWeight:
        calls.append(path)
        return quantise(read(), group_size=16, bits=4)

    streamed = load_groupwise(
        resolved, lambda model: linears_inside(model, blocks(model)), pack, device=torch.device("cpu")
    )
    whole = load_model(resolved, device=torch.device("cpu"))
    for path in linears_inside(whole, blocks(whole)):
        weight = pack(path, partial(weight_out_in, whole.get_submodule(path)))
        pack_linear(whole, path, weight, torch.device("cpu"))
    assert len(set(calls)) * 2 == len(calls)
    torch.testing.assert_close(logits(streamed), logits(whole), rtol=0, atol=0)
    assert streamed.generation_config.temperature == 0.25
    assert not any(tensor.is_meta for tensor in streamed.state_dict().values())
    entries = stored_entries(streamed, torch.float32)
    expected = model.state_dict()
    assert set(entries) <= set(expected)
    assert all(tuple(expected[name].shape) == entry.make().shape for name, entry in entries.items())


def test_mixed_has_only_what_the_dense_model_knows() -> None:
    found = {"novels": 1.1, "code": 0.8, "french": 2.4, "chinese": None}
    kinds = tuple(
        KindChange(text=text, tokens=512, before=8.0, after=9.0, bits_per_byte=bits) for text, bits in found.items()
    )
    assert set(known_kinds(RunManifest.model_construct(kinds=kinds))) == {"novels", "code"}
    assert set(known_kinds(RunManifest.model_construct(kinds=()))) == set(known_kinds(None)) == set(KINDS)


def test_training_data_has_the_kinds_that_are_asked_for() -> None:
    read = partial(training_data, ("mixed",), byte_tokenizer(), length=512, held_out=1, seed=0)
    whole, part = (read(kinds=kinds) for kinds in (KINDS, ("mathematics",)))
    assert len(part.train) < len(whole.train) / 4
    assert part.digest != whole.digest
