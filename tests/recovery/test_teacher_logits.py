"""Recoveries that read stored predictions of the teacher, which several runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import processes
from tests.command import run
from tests.recovery.test_train import data
from tests.recovery.tiny import blocks, build
from torch import nn

import saap
from saap.core.errors import NonFiniteLossError, StaleInputError
from saap.models.walk.loss import TopPredictions
from saap.models.walk.walker import BlockWalker
from saap.pipeline.recover import run as recovery_run
from saap.recovery.teacher_logits import TeacherLogits, read_by

SETTINGS: dict[str, Any] = {
    "max_seq_length": 32, "batch_size": 4, "max_steps": 4, "validate_every": 2, "validation_samples": 2,
    "tuning": "full", "exact_products": True,
}  # fmt: skip
FLAGS = [
    "--max-seq-length", "32", "--batch-size", "4", "--validate-every", "2", "--validation-samples", "2",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with something to learn from its teacher."""
    out = tmp_path_factory.mktemp("pruned") / "small"
    saap.prune(dense, pruning_ratio=0.3, out=out, num_samples=2, sample_length=32, effort="fast", restore=False)
    return out


def losses(result: Any) -> list[float]:
    return [point.loss for point in result.training.points]


@pytest.mark.parametrize("k", [1, 5, 24])
def test_the_rest_is_one_more_class(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 24, generator=generator, dtype=torch.float64).requires_grad_()
    q = (2 * torch.randn(6, 24, generator=generator, dtype=torch.float64)).softmax(-1)
    most, tokens = q.topk(k)
    log_p = logits.log_softmax(-1)
    completed = TopPredictions(tokens.int(), most.log()).completed(log_p.detach())
    torch.testing.assert_close(completed.exp().sum(-1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-5)
    found = nn.functional.kl_div(log_p, completed, log_target=True, reduction="sum")
    (slope,) = torch.autograd.grad(found, logits, retain_graph=True)

    classes = [log_p.gather(-1, tokens)]
    goal = [most]
    if k < 24:
        classes.append((1 - classes[0].exp().sum(-1, keepdim=True)).log())
        goal.append(1 - most.sum(-1, keepdim=True))
    expected = nn.functional.kl_div(torch.cat(classes, -1), torch.cat(goal, -1), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-4)


def test_the_sequences_of_a_training_are_known_before_it() -> None:
    examples = data()
    for limits in ({"steps": 2, "tokens": None}, {"steps": None, "tokens": 100}, {"steps": 1000, "tokens": 10**9}):
        found = read_by(examples, batch=3, **limits)
        assert found[: len(examples.held_out)] == list(examples.held_out)
        read = found[len(examples.held_out) :]
        assert len({id(one) for one in read}) == len(read)
        steps, done = 0, 0
        expected: set[int] = set()
        while steps < (limits["steps"] or 10**9) and done < (limits["tokens"] or 10**9) and steps < 100:
            places = examples.step_indices(steps, 3)
            done += sum(len(examples.train[place].tokens) for place in places)
            expected |= set(places)
            steps += 1
        assert {id(one) for one in read} == {id(examples.train[place]) for place in expected}


def test_all_tokens_of_the_predictions_teach_as_the_teacher_does(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = saap.recover(small, data=[text], out=tmp_path / "live", **SETTINGS)
    stored = {"data": [text], "teacher_logits": tmp_path / "logits", **SETTINGS}
    whole = saap.recover(small, out=tmp_path / "whole", teacher_top_k=1000, **stored)
    assert losses(whole) == pytest.approx(losses(live), rel=1e-3)
    assert whole.training.validation_teacher == pytest.approx(live.training.validation_teacher, rel=1e-5)
    assert whole.training.validation == pytest.approx(live.training.validation, rel=1e-4)
    files = set((tmp_path / "logits").iterdir())
    assert len([file for file in files if file.suffix]) == 4 * 4 + 2

    few = saap.recover(small, out=tmp_path / "few", teacher_top_k=8, **stored)
    assert losses(few) != pytest.approx(losses(live), rel=1e-3)
    assert max(losses(few)) < max(losses(live))  # a divergence of fewer classes is smaller
    added = set((tmp_path / "logits").iterdir()) - files
    assert len(added) == 4 * 4 + 2
    assert sum(file.stat().st_size for file in added) < 0.1 * sum(file.stat().st_size for file in files)

    monkeypatch.setattr(recovery_run, "load_teacher", None)  # nothing is missing: the teacher is not even loaded
    sweep = saap.recover(small, out=tmp_path / "sweep", teacher_top_k=8, learning_rate=1e-3, **stored)
    assert losses(sweep)[0] == losses(few)[0]
    assert losses(sweep) != losses(few)


def test_a_longer_training_computes_only_what_is_missing(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logits"
    for steps, missing in ((1, 6), (2, 4), (2, 1)):
        for damaged in sorted(folder.glob("*.safetensors"))[:1] if missing == 1 else ():
            damaged.write_bytes(damaged.read_bytes()[:200])
        flags = [*FLAGS, "--max-steps", steps, "--teacher-logits", folder, "--data", text]
        code, printed, error = run(capsys, "recover", small, "--out", tmp_path / f"{steps}-{missing}", *flags)
        assert code == 0, error
        assert f"sequences missing in {folder}: {missing}" in printed + error
    assert len(list(folder.glob("*.safetensors"))) == 10


def test_two_processes_give_the_losses_of_one(small: Path, text: Path, tmp_path: Path) -> None:
    curves = []
    for count in (1, 2):
        where = ["--teacher-logits", tmp_path / f"logits-{count}", "--out", tmp_path / f"of-{count}"]
        arguments = ["recover", small, "--data", text, *FLAGS, "--max-steps", "3", *where]
        for done in processes.saap_in_several(count, *arguments) if count > 1 else [processes.saap(*arguments)]:
            assert done.returncode == 0, done.stderr[-2000:]
        manifest = json.loads((tmp_path / f"of-{count}" / "saap" / "manifest.json").read_text())
        curves.append([point["loss"] for point in manifest["recovery"]["curve"]])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    names = [sorted(file.name for file in (tmp_path / f"logits-{count}").glob("*.safetensors")) for count in (1, 2)]
    assert names[0] == names[1]


def test_a_model_without_a_teacher_stores_nothing(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    saap.recover(dense, data=[text], out=tuned, **{**SETTINGS, "distillation": 0})
    flags = ["--data", text, "--max-steps", "1", "--teacher-logits", tmp_path / "logits"]
    code, _, error = run(capsys, "recover", tuned, "--out", tmp_path / "twice", *flags)
    assert code == 2
    assert error.startswith("error: --teacher-logits has no teacher")
    assert not (tmp_path / "logits").exists()


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    logits, examples = TeacherLogits(folder=tmp_path, top_k=2, teacher="t"), data().train
    assert len(logits.missing([*examples, *examples])) == len({one.tokens.tobytes() for one in examples})
    logits.file(examples[0]).write_bytes(bytes(10_000))
    assert len(logits.missing(examples[:1])) == 0
    with pytest.raises(StaleInputError, match=r"has no log-probabilities of the teacher .*Delete it and start again"):
        logits.predictions(examples[:1], torch.device("cpu"))


def test_predictions_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    model = build("llama_tied").float()
    model.model.norm.weight.data[:] = float("nan")
    logits = TeacherLogits(folder=tmp_path, top_k=2, teacher="t")
    with pytest.raises(NonFiniteLossError, match="Check --dense"):
        logits.add(BlockWalker(model, blocks(model)), data().train[0])
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_not_be_replaced_or_deleted_later(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in ("tuned/logits", "tuned.saap-work", "file", "file/logits"):
        flags = ["--data", text, "--max-steps", "1", "--teacher-logits", tmp_path / folder]
        code, printed, error = run(capsys, "recover", dense, "--out", tmp_path / "tuned", *flags)
        assert (code, printed.strip()) == (2, "")
        assert str(file) in error or f"--teacher-logits {tmp_path / folder} would be in" in error
    assert list(tmp_path.iterdir()) == [file]
