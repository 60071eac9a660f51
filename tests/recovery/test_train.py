from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from tests.families import token_ids
from tests.recovery.tiny import blocks, build

from saap.core.errors import NonFiniteLossError, StaleInputError, TrainingDataError
from saap.data.training import Example, TrainingData, training_data
from saap.models.checkpoint.groupwise import GroupwiseLinear, linears_inside, pack_linear
from saap.models.structure.linear import weight_out_in
from saap.models.walk import activations
from saap.models.walk.activations import kept_bytes
from saap.models.walk.loss import learned_losses
from saap.models.walk.processes import Processes
from saap.models.walk.walker import BlockWalker
from saap.recovery import train as training
from saap.recovery.adapter import adapt, add_lora, merge, tuned_matrices
from saap.recovery.quantise import quantise, quantise_by_feedback
from saap.recovery.train import Report, Trainer, Training, learning_rate, share_done
from saap.recovery.weights import TunedWeights, weights_inside
from saap.settings.recover import RecoverConfig

CPU = torch.device("cpu")
SILENT = Report(step=lambda done, total: None, line=lambda text: None)


def quantised(family: str = "llama_tied", bits: int = 4) -> Any:
    model = build(family).float()
    for path in linears_inside(model, blocks(model)):
        weight = weight_out_in(model.get_submodule(path)).detach()
        pack_linear(model, path, quantise(weight, group_size=16, bits=bits), CPU)
    return model


def data(count: int = 12, seed: int = 0) -> TrainingData:
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        start = int(generator.integers(2, 60))
        tokens = (start + np.arange(14 + index % 4)) % 100 + 2
        learned = np.ones(len(tokens), dtype=np.bool_)
        learned[: 1 + index % 3] = False
        examples.append(Example(tokens.astype(np.int64), learned, prompt=1 + index % 3))
    return TrainingData(sources=("made",), train=tuple(examples[2:]), held_out=tuple(examples[:2]), seed=seed)


PLAIN = {
    "length": 16, "batch": 4, "micro_batch": 2, "max_steps": 8, "validate_every": 2, "learning_rate": 0.02,
    "patience": 0,
}  # fmt: skip
SETTINGS = {"group_size": 16, "rank": 4, **PLAIN}


def train(
    folder: Path, *, model: Any = None, report: Report = SILENT, teacher: Any = None, **changes: Any
) -> tuple[Any, Training]:
    model = quantised() if model is None else model
    config = RecoverConfig(**{**SETTINGS, **changes})
    parameters = adapt(model, rank=config.rank, alpha=config.alpha, seed=config.seed, scales=config.scales)
    trainer = Trainer(
        BlockWalker(model, blocks(model)), parameters, data(), config, folder=folder,
        processes=Processes(), report=report,
        teacher=None if teacher is None else BlockWalker(teacher, blocks(teacher)),
    )  # fmt: skip
    return model, trainer.run()


def interrupted(folder: Path, **changes: Any) -> None:
    """Train, and be killed in the middle between two saved states."""

    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done >= 625:
            raise KilledError

    with pytest.raises(KilledError):
        train(folder, report=Report(step=kill, line=lambda text: None), **changes)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2", "opt", "bloom", "granite"])
def test_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = quantised(family)
    ids = token_ids(2, 9)
    learned = torch.ones(2, 9, dtype=torch.bool)
    learned[0, :4] = False
    learned[:, 0] = False
    parameters = adapt(model, rank=2, alpha=4, seed=0)
    for name, value in parameters.items():
        if name.endswith("second"):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    log_p = model(ids).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1) * learned[:, 1:]
    (nll.sum() / learned.sum()).backward()
    expected = {name: value.grad.clone() for name, value in parameters.items()}
    for checkpointing in (True, False):
        for value in parameters.values():
            value.grad = None
        config = RecoverConfig(**{**SETTINGS, "gradient_checkpointing": checkpointing})
        trainer = Trainer(
            BlockWalker(model, blocks(model)), parameters, data(), config, folder=tmp_path,
            processes=Processes(), report=SILENT,
        )  # fmt: skip
        examples = [Example(*(part.numpy() for part in pair)) for pair in zip(ids, learned, strict=True)]
        losses = trainer._gradients(examples, int(learned.sum()))
        torch.testing.assert_close(losses.float(), nll.sum(1).detach(), rtol=1e-4, atol=1e-4)
        for name, value in parameters.items():
            torch.testing.assert_close(value.grad, expected[name], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("free", "recomputed"), [(10**12, False), (10**4, True)])
def test_activations_are_recomputed_if_the_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, recomputed: bool
) -> None:
    calls = []
    stock = training.checkpoint
    monkeypatch.setattr(training, "checkpoint", lambda *a, **k: calls.append(1) or stock(*a, **k))
    monkeypatch.setattr(activations.memory, "free", lambda device: free)
    train(tmp_path, max_steps=1)
    assert bool(calls) == recomputed


def test_the_bytes_of_activations_are_those_that_autograd_keeps() -> None:
    """Of a linear layer: its input, besides its weight."""
    model = build("llama_tied").float()
    width = model.config.hidden_size
    model.linear = torch.nn.Linear(width, width)
    walker = BlockWalker(model, blocks(model))
    for block in walker.blocks:
        block.forward = lambda hidden, *_, **__: model.linear(hidden)
    assert kept_bytes(walker, walker.start(token_ids(2, 9))) == len(walker.blocks) * 2 * 9 * width * 4


def test_training_lowers_the_loss_and_merging_keeps_the_function(tmp_path: Path) -> None:
    model, done = train(tmp_path, max_steps=40)
    assert done.validation < 0.8 * done.validation_before
    assert done.stopped_by == "the limit of 40 steps"
    assert done.points[-1].tokens == done.tokens
    ids = token_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        packed = merge(model)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not [name for name, value in model.named_parameters() if value.requires_grad]
    assert all(type(model.get_submodule(path)) is GroupwiseLinear for path in packed)


def test_a_killed_training_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    _, whole = train(tmp_path / "whole")

    interrupted(tmp_path / "cut")
    _, resumed = train(tmp_path / "cut")
    assert [point.step for point in resumed.points] == list(range(1, 9))
    for one, other in zip(whole.points, resumed.points, strict=True):
        assert abs(one.loss - other.loss) <= 1e-6
        assert one.validation is None or abs(one.validation - (other.validation or 0)) <= 1e-6
    _, again = train(tmp_path / "cut")  # a finished one is not trained further
    assert len(again.points) == 8


def test_progress_says_how_much_of_the_gap_to_the_teacher_is_closed(tmp_path: Path) -> None:
    teacher, taught = train(tmp_path / "teacher", max_steps=40)
    lines: list[str] = []
    report = Report(step=lambda done, total: None, line=lines.append)
    _, done = train(tmp_path / "student", teacher=teacher, report=report, distillation=1)
    assert done.validation_teacher == pytest.approx(taught.validation)
    assert f"(the teacher {taught.validation:.4f})" in lines[0]
    last = done.points[-1].validation
    assert last is not None
    closed = (done.validation_before - last) / (done.validation_before - taught.validation)
    assert closed > 0.1
    assert f"({closed:.0%} of the gap closed)" in lines[-1]
    train(tmp_path / "alone", report=report)
    assert "gap" not in lines[-1]


def test_state_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(StaleInputError, match="not a state of this training"):
        train(tmp_path, model=quantised("llama"))


def test_the_best_parameters_are_taken_and_training_stops_early(tmp_path: Path) -> None:
    _, done = train(tmp_path, learning_rate=30.0, max_steps=50, patience=2, validate_every=1, clip=1e6)
    assert done.stopped_by == "validation, which fell no more"
    assert done.points[-1].step < 50
    assert done.validation <= min([done.validation_before, *[p.validation for p in done.points if p.validation]])


def test_a_loss_that_is_not_finite_names_step_and_sample(tmp_path: Path) -> None:
    model = quantised()
    train(tmp_path, model=model, max_steps=4)
    broken = quantised()
    poisoned = data().train[data().step_indices(4, 4)[2]].tokens[3]
    broken.get_input_embeddings().weight.data[poisoned] = torch.nan
    with pytest.raises(NonFiniteLossError) as caught:
        train(tmp_path, model=broken, max_steps=8)
    assert "in step 5" in str(caught.value)
    assert "sample" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "best.safetensors").exists()


def test_distillation_equals_its_formula() -> None:
    student, teacher = build("llama_tied", seed=0), build("llama_tied", seed=1)
    ids = token_ids(2, 9)
    learned = torch.ones_like(ids, dtype=torch.bool)
    learned[:, 0] = False
    walkers = [BlockWalker(model, blocks(model)) for model in (student, teacher)]
    hidden = []
    for walker in walkers:
        stream = walker.start(ids)
        state = stream.hidden
        for layer in range(len(walker.blocks)):
            state = walker.run_block(layer, state, stream.contexts)
        hidden.append(state.detach())
    losses, gradient = learned_losses(
        walkers[0], hidden[0], ids, learned, predictions=1, teacher=(walkers[1], hidden[1]), weight=0.3
    )
    entry = hidden[0].clone().requires_grad_(True)
    log_p = walkers[0].logits(entry)[:, :-1].log_softmax(-1)
    goal = walkers[1].logits(hidden[1])[:, :-1].softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    divergence = (goal * (goal.log() - log_p)).sum(-1)
    expected = (0.7 * nll + 0.3 * divergence).sum(1)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.sum().backward()
    torch.testing.assert_close(gradient, entry.grad, rtol=1e-4, atol=1e-6)


def test_packed_weights_are_no_activations() -> None:
    model = quantised()
    walker = BlockWalker(model, blocks(model))
    counted = [kept_bytes(walker, walker.start(token_ids(1, length))) for length in (8, 16)]
    assert counted[1] >= 1.9 * counted[0]


def test_the_last_step_of_a_trial_writes_nothing_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "continued", None)
    model = quantised()
    trainer = Trainer(
        BlockWalker(model, blocks(model)), adapt(model, rank=4, alpha=4, seed=0), data(),
        RecoverConfig(**{**SETTINGS, "max_steps": 2}), folder=tmp_path, processes=Processes(), report=SILENT,
    )  # fmt: skip
    assert trainer.seconds_of_token() > 0


@pytest.mark.parametrize(("weight", "everything"), [(1.0, True), (0.5, False)])
def test_the_teacher_alone_has_a_target_for_prompts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float, everything: bool
) -> None:
    seen: list[torch.Tensor] = []
    stock = training.learned_losses

    def spied(walker: Any, hidden: Any, ids: Any, learned: torch.Tensor, **named: Any) -> Any:
        if named.get("teacher") is not None:
            seen.append(learned)
        return stock(walker, hidden, ids, learned, **named)

    monkeypatch.setattr(training, "learned_losses", spied)
    train(
        tmp_path, teacher=build("llama_tied", seed=1).float(), distillation=weight, batch=1, micro_batch=1, max_steps=3
    )
    assert len(seen) == 3
    assert not any(learned[:, 0].any() for learned in seen)
    assert all(learned[:, 1:].all() for learned in seen) == everything


def test_plain_lora_learns_and_merges(tmp_path: Path) -> None:
    model = build("llama_tied").float()
    handle, parameters = add_lora(model, linears_inside(model, blocks(model)), rank=4, alpha=8, seed=0)
    config = RecoverConfig(**{**PLAIN, "tuning": "lora", "rank": 4, "max_steps": 20})
    done = Trainer(
        BlockWalker(model, blocks(model)), parameters, data(), config, folder=tmp_path,
        processes=Processes(), report=SILENT,
    ).run()  # fmt: skip
    assert done.validation < done.validation_before
    ids = token_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        after = handle.merge_and_unload()(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "gpt2"])
def test_all_weights_of_the_blocks_learn_and_no_others(tmp_path: Path, family: str) -> None:
    model = build(family).float()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    weights = TunedWeights(model, weights_inside(model, blocks(model)))
    config = RecoverConfig(**{**PLAIN, "tuning": "full", "learning_rate": 3e-3, "max_steps": 20})
    done = Trainer(
        BlockWalker(model, blocks(model)), weights.parameters, data(), config, folder=tmp_path,
        processes=Processes(), report=SILENT,
    ).run()  # fmt: skip
    assert done.validation < done.validation_before
    after = dict(weights.merge_and_unload().named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith(tuple(f"{path}." for path in blocks(model)))}


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_error_feedback_over_a_model_loses_less(family: str) -> None:
    ids = [token_ids(1, 60, seed=seed) for seed in range(8)]
    held = token_ids(8, 60, seed=99)
    dense = build(family).float()
    expected = dense(held).logits

    def error(model: Any) -> float:
        with torch.no_grad():
            return float((model(held).logits - expected).norm())

    model = build(family).float()
    quantise_by_feedback(model, blocks(model), ids, group_size=16, bits=3, progress=lambda done, total: None)
    assert error(model) < error(quantised(family, bits=3))


def test_schedule() -> None:
    rates = [learning_rate(1.0, share / 100, 0.1) for share in range(101)]
    assert max(rates) == 1.0 == rates[10]
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[5] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(0.5)
    assert share_done(RecoverConfig(max_steps=10, max_tokens=1000), 5, 800, 1e9) == 0.8
    assert share_done(RecoverConfig(max_minutes=1), 5, 800, 120) == 1


@pytest.mark.parametrize("limit", [{"max_steps": 1}, {"max_steps": None, "max_tokens": 1}])
def test_a_single_step_learns(tmp_path: Path, limit: dict[str, Any]) -> None:
    _, done = train(tmp_path, **limit)
    assert done.points[0].rate == pytest.approx(learning_rate(SETTINGS["learning_rate"], 0.5, 0.05), rel=0.01)
    assert done.best_step == 1
    assert done.validation < done.validation_before


def test_every_pass_takes_every_example_once() -> None:
    made = data(14)
    taken = [index for step in range(6) for index in made.step_indices(step, 4)]
    assert sorted(taken[:12]) == sorted(taken[12:24]) == list(range(12))
    assert taken[:12] != taken[12:24]


def test_blocks_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 100)
    made = training_data([tmp_path / "a.txt"], byte_tokenizer(), length=32, held_out=4, seed=0)
    assert (len(made.train), len(made.held_out)) == (23, 2)  # 25 blocks, at most a tenth held back
    assert all(len(one.tokens) == 32 and one.learned.sum() == 31 and not one.learned[0] for one in made.train)


def answers(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.tokens[example.learned]))


def test_only_answers_are_learned(tmp_path: Path) -> None:
    rows = [
        {"messages": [
            {"role": "user", "content": f"How {index}?"}, {"role": "assistant", "content": f"So {index}."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."},
        ]}
        for index in range(12)
    ]  # fmt: skip
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    made = training_data([file], tokenizer, length=200, held_out=1, seed=0)
    texts = {answers(example, tokenizer) for example in made.train}
    assert len(texts) == 11
    assert all("<|assistant|>So" in text or text.startswith("<|assistant|>") for text in texts)
    assert not any("How" in text or "And" in text or "Be brief" in text for text in texts)
    whole = {tokenizer.decode(example.tokens) for example in made.train}
    assert all(text.startswith("<|system|>Be brief.") and "How" in text for text in whole)


def test_instructions_with_and_without_a_chat_template(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {n}", "input": "to 1", "output": f"{n + 1}"} for n in range(20)]
    file = tmp_path / "instruct.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for template in (None, CHAT_TEMPLATE):
        tokenizer = byte_tokenizer(chat_template=template)
        made = training_data([file], tokenizer, length=200, held_out=1, seed=0)
        for example in made.train:
            learned, whole = answers(example, tokenizer), tokenizer.decode(example.tokens)
            assert "Add" in whole
            assert "to 1" in whole
            assert "Add" not in learned
            assert any(character.isdigit() for character in learned)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a"}', "line 1.*no `output`"),
        ('{"question": "a"}', "line 1.*neither"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the role `assistant`"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n{"text": "b"}', "line 2.*neither"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(TrainingDataError, match=message):
        training_data([file], byte_tokenizer(chat_template=CHAT_TEMPLATE), length=64, held_out=1, seed=0)


def test_too_little_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 10)
    with pytest.raises(TrainingDataError, match="1 examples of 64 tokens"):
        training_data([tmp_path / "a.txt"], byte_tokenizer(), length=64, held_out=1, seed=0)


@pytest.mark.parametrize(
    ("tuning", "of_smollm2", "twelfth"),
    [("full", 2e-4, 2e-5), ("lora", 1e-3, 8e-5), ("groupwise", 1e-3, 8e-5)],
)
def test_the_default_rate_follows_the_size_of_the_weights(tuning: str, of_smollm2: float, twelfth: float) -> None:
    matrices = [torch.full((4, 4), 0.193), torch.full((4, 4), -0.193)]
    assert training.peak_rate(RecoverConfig(tuning=tuning), matrices) == of_smollm2
    assert training.peak_rate(RecoverConfig(tuning=tuning), [one / 12 for one in matrices]) == twelfth
    assert training.peak_rate(RecoverConfig(tuning=tuning, learning_rate=0.01), matrices) == 0.01
    assert training.peak_rate(RecoverConfig(tuning="router"), matrices) == training.ROUTER_RATE


def test_the_tuned_matrices_are_those_under_the_adapters() -> None:
    model = quantised()
    plain = {
        path: one.quantised.dequantised() for path, one in model.named_modules() if isinstance(one, GroupwiseLinear)
    }
    found = list(tuned_matrices(model, adapt(model, rank=2, alpha=4, seed=0)))
    torch.testing.assert_close(found, list(plain.values()))
    model = build("llama_tied").float()
    linears = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = [model.get_submodule(path).weight.detach() for path in linears]
    _, parameters = add_lora(model, linears, rank=2, alpha=4, seed=0)
    torch.testing.assert_close([one.detach() for one in tuned_matrices(model, parameters)], expected)
    norm, matrix = torch.ones(4), torch.ones(4, 4)
    torch.testing.assert_close([*tuned_matrices(torch.nn.Module(), {"norm": norm, "matrix": matrix})], [matrix])
