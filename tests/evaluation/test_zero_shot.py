from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from tests.pipeline import tiny

from saap.core.errors import CalibrationError, ConfigurationError, EvaluationError
from saap.core.evaluation_records import EvalReport
from saap.evaluation import zero_shot
from saap.evaluation.zero_shot import check_tasks, evaluate_tasks, local_file, read_records
from saap.settings.evaluate import EvalRequest

QUESTIONS = [
    ("What do bees make?", ["Honey", "Stone from old walls", "Rain"], 0),
    ("Which of these is a metal?", ["wood", "iron", "a cloud over the sea"], 1),
    ("Where do fish live?", ["in trees", "in the desert sand", "in water"], 2),
    ("What falls in winter?", ["snow", "summer", "leaves of the palm"], 0),
]


@pytest.fixture(scope="module")
def model():
    return tiny.model(), tiny.tokenizer()


def write(folder: Path, name: str, rows: list[object]) -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def local_rows() -> list[object]:
    return [
        {"query": f"Question: {question}\nAnswer:", "choices": choices, "label": label, "id": "not read"}
        for question, choices, label in QUESTIONS
    ]


def hub_rows() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {
                "id": str(index),
                "question": question,
                "choices": {"text": choices, "label": ["A", "B", "C"]},
                "answerKey": "ABC"[label],
            }
            for index, (question, choices, label) in enumerate(QUESTIONS)
        ]
    )


def test_a_local_file_gives_what_the_harness_gives_for_its_own_rows(model, tmp_path, monkeypatch) -> None:
    asked = []

    def load(path: str, name: str, **_: object) -> datasets.DatasetDict:
        asked.append((path, name))
        return datasets.DatasetDict({"train": hub_rows(), "validation": hub_rows(), "test": hub_rows()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    write(tmp_path, "arc_easy.test.jsonl", local_rows())
    (local,) = evaluate_tasks(*model, ["arc_easy"], data=tmp_path).values()
    (hub,) = evaluate_tasks(*model, ["arc_easy"]).values()
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "correct", "correct_norm", "chance", "questions"):
        assert getattr(local, name) == getattr(hub, name), name
    assert (local.questions, local.chance, hub.source) == (4, pytest.approx(1 / 3), "hub")


def test_boolq_from_the_hub_has_the_same_figures_as_from_a_file(model, tmp_path, monkeypatch) -> None:
    passages = [("Ice is cold.", "is ice cold", 1), ("Fire is hot.", "is fire cold", 0), ("A dog barks.", "bark", 1)]
    rows = [{"passage": p, "question": q, "label": label, "idx": i} for i, (p, q, label) in enumerate(passages)]
    hub = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"train": hub, "validation": hub}))
    queries = [
        {"query": f"{p}\nQuestion: {q}?\nAnswer:", "choices": ["no", "yes"], "label": label} for p, q, label in passages
    ]
    write(tmp_path, "boolq.validation.jsonl", queries)
    (local,) = evaluate_tasks(*model, ["boolq"], data=tmp_path).values()
    (from_hub,) = evaluate_tasks(*model, ["boolq"]).values()
    assert (local.acc, local.acc_norm, local.correct) == (from_hub.acc, from_hub.acc_norm, from_hub.correct)


def test_winogrande_scores_the_continuation_after_each_context(model, tmp_path, monkeypatch) -> None:
    sentence = "The cup did not fit in the bag because _ was too large."
    rows = [{"sentence": sentence, "option1": "the cup", "option2": "the bag", "answer": "1"}] * 2
    hub = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"train": hub, "validation": hub}))
    before, after = sentence.split("_")
    contexts = [before + "the cup", before + "the bag"]
    write(
        tmp_path,
        "winogrande.validation.jsonl",
        [{"contexts": contexts, "continuation": after.strip(), "label": 0}] * 2,
    )
    (local,) = evaluate_tasks(*model, ["winogrande"], data=tmp_path).values()
    (from_hub,) = evaluate_tasks(*model, ["winogrande"]).values()
    assert local.correct == from_hub.correct
    assert local.acc_norm is None


def test_limit_takes_the_first_and_test_comes_before_validation(model, tmp_path) -> None:
    write(tmp_path, "made.validation.jsonl", local_rows())
    write(tmp_path, "made.test.jsonl", local_rows()[:3])
    assert local_file(tmp_path, "made").name == "made.test.jsonl"
    (all_rows,) = evaluate_tasks(*model, ["made"], data=tmp_path).values()
    (two,) = evaluate_tasks(*model, ["made"], data=tmp_path, limit=2).values()
    assert (all_rows.questions, two.questions) == (3, 2)
    assert two.correct == all_rows.correct[:2]
    mean = EvalReport(model="tiny", tasks={"a": all_rows}).tasks_mean
    assert mean is not None
    assert mean["acc"] == all_rows.acc


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "line 2, is not JSON"),
        ({"query": "a", "choices": ["b", "c"]}, "label"),
        ({"query": "a", "choices": ["b", "c"], "label": 2}, "label 2"),
        ({"query": "a", "choices": ["b"], "label": 0}, "at least 2 items"),
        ({"query": 1, "choices": ["b", "c"], "label": 0}, "query"),
        ({"query": "a", "label": 0}, "`query` and `choices`"),
        ({"contexts": ["a", "b"], "continuation": "c", "label": 0}, "another kind"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(tmp_path, row, reason) -> None:
    path = write(tmp_path, "made.test.jsonl", [local_rows()[0], row])
    with pytest.raises((EvaluationError, CalibrationError), match="line 2") as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_unknown_tasks_get_near_names(tmp_path) -> None:
    write(tmp_path, "arc_easy.test.jsonl", local_rows())
    with pytest.raises(EvaluationError, match="Did you mean arc_easy"):
        check_tasks(["arc_esay"], tmp_path)
    with pytest.raises(EvaluationError, match="hellaswag"):
        check_tasks(["helaswag"], None)
    with pytest.raises(EvaluationError, match="no file named"):
        check_tasks(["arc_easy"], tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="--limit 0"):
        EvalRequest(tasks=("arc_easy",), limit=0)


def test_the_names_of_tasks_are_checked_without_their_rows(monkeypatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the rows were fetched"))
    check_tasks(["arc_easy"], None, fetch=False)
    with pytest.raises(EvaluationError, match="hellaswag"):
        check_tasks(["helaswag"], None, fetch=False)


def test_a_single_question_has_no_standard_error(model, tmp_path) -> None:
    write(tmp_path, "made.test.jsonl", local_rows()[:1])
    (one,) = evaluate_tasks(*model, ["made"], data=tmp_path).values()
    assert (one.questions, one.acc_stderr, one.acc_norm_stderr) == (1, 0.0, 0.0)


def test_tasks_that_are_no_choices_are_refused_before_any_is_scored(model, monkeypatch) -> None:
    generated = datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "It is 2\n#### 2"}] * 2)

    def load(path: str, **_: object) -> datasets.DatasetDict:
        rows = generated if path == "openai/gsm8k" else hub_rows()
        return datasets.DatasetDict({"train": rows, "validation": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    scored: list[str] = []
    monkeypatch.setattr(zero_shot, "_result", lambda task, *_: scored.append(task))
    with pytest.raises(EvaluationError, match="gsm8k is not a multiple-choice task"):
        evaluate_tasks(*model, ["arc_easy", "gsm8k"])
    with pytest.raises(EvaluationError, match="gsm8k is not a multiple-choice task"):
        check_tasks(["arc_easy", "gsm8k"], None)
    assert scored == []
    for name in ("mmlu", "ai2_arc"):
        with pytest.raises(EvaluationError, match=f"{name} is a group of tasks"):
            check_tasks(["arc_easy", name], None)


def test_a_task_whose_answers_are_right_to_some_degree_is_refused(model, monkeypatch) -> None:
    choices = {"choices": ["No", "Yes", "Perhaps"], "labels": [1, 0, 1]}
    rows = datasets.Dataset.from_list([{"question": "Is it?", "mc1_targets": choices, "mc2_targets": choices}] * 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"validation": rows}))
    (one,) = evaluate_tasks(*model, ["truthfulqa_mc1"]).values()
    assert one.questions == 2
    with pytest.raises(EvaluationError, match="truthfulqa_mc2 scores answers by a rule of its own"):
        evaluate_tasks(*model, ["truthfulqa_mc2"])
