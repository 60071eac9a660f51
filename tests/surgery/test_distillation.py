from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.families import build
from torch import nn

from saap.core.records import Layout
from saap.discovery import discover
from saap.models.walk import activations
from saap.models.walk.backend import Backend
from saap.models.walk.spill import Spill
from saap.structure_search.plan import make_plan
from saap.surgery import distillation
from saap.surgery.cut import cut
from saap.surgery.distillation import RANK, DistillationText, distill, updated_modules
from saap.surgery.held_out import MICRO_BATCH, divided, held_out_sequences, shorter
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct


def tokens(rows: int = 32, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def pruned(
    name: str, ids: torch.Tensor, spill: Spill | None = None, dropped: tuple[int, ...] = ()
) -> tuple[nn.Module, nn.Module, Backend, list[str], DistillationText]:
    """A dense model, one with half of its FFN channels and scales that are off, what the latter is tuned with."""
    dense = build(name)
    model, graph = copy.deepcopy(dense), discover(dense)
    kept = [group for group in graph.groups if group.role == "ffn" and group.layer not in dropped]
    keep = {group.name: tuple(range(0, group.units, 2)) for group in kept}
    plan = make_plan(graph, keep, dropped, layout=Layout.ADAPTIVE, strategy="test", align=1)
    backend = Backend(model, graph, spill=spill)
    done = reconstruct(backend, plan, ids, ReconstructionSettings(second_order=False), ids)
    cut(model, graph, plan)
    with torch.no_grad():  # what is to be made up for, more than a few random tokens of random weights are off by
        for path in graph.blocks[: len(graph.blocks) - len(dropped)]:
            for parameter in model.get_submodule(path).parameters():
                if parameter.dim() == 1:
                    parameter.mul_(0.8)
    held = held_out_sequences(len(ids))
    text = DistillationText(tokens=ids, teacher=done.dense, held_out=held, micro_batch=MICRO_BATCH)
    return dense, model, backend, list(graph.blocks[: len(graph.blocks) - len(dropped)]), text


def divergence(dense: nn.Module, model: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        target, found = (one(ids, use_cache=False).logits[:, :-1].log_softmax(-1) for one in (dense, model))
    return float(torch.nn.functional.kl_div(found, target, log_target=True, reduction="sum")) / target[..., 0].numel()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2", "phi3"])
def test_vectors_and_matrices_of_the_blocks_change_and_unseen_text_is_predicted_more_like_before(name: str) -> None:
    dense, model, backend, blocks, text = pruned(name, tokens())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    at_first = divergence(dense, model, tokens(seed=1))
    measured = distill(backend, blocks, text)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    inside = {f"{path}.{key}" for path in blocks for key, one in model.get_submodule(path).named_parameters()}
    assert changed == inside
    assert divergence(dense, model, tokens(seed=1)) < at_first
    assert measured[1] < measured[0]
    held = text.tokens[-text.held_out :]
    assert divergence(dense, model, held) == pytest.approx(measured[1], rel=1e-4)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_is_still_dense_stays_as_it_is() -> None:
    dense = build("llama")
    graph = discover(dense)
    model, ids = copy.deepcopy(dense), tokens(rows=8)
    plan = make_plan(graph, {}, (), layout=Layout.ADAPTIVE, strategy="test", align=1)
    done = reconstruct(Backend(model, graph), plan, ids, ReconstructionSettings(), ids)
    text = DistillationText(tokens=ids, teacher=done.dense, held_out=4, micro_batch=MICRO_BATCH)
    before, after = distill(Backend(model, graph), graph.blocks, text)
    assert (before, after) == (0.0, 0.0)
    assert all(torch.equal(*both) for both in zip(model.parameters(), dense.parameters(), strict=True))


def test_blocks_that_were_dropped_are_not_looked_for() -> None:
    dense, model, backend, blocks, text = pruned("llama", tokens(), dropped=(1,))
    at_first = divergence(dense, model, tokens(seed=1))
    distill(backend, blocks, text)
    assert len(blocks) == 2
    assert divergence(dense, model, tokens(seed=1)) < at_first


def test_ignored_ids_teach_nothing() -> None:
    _, model, backend, blocks, text = pruned("llama", tokens(rows=8))
    before = copy.deepcopy(model.state_dict())
    assert distill(backend, blocks, replace(text, ignored=tuple(range(128)))) == (0.0, 0.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_spilled_hidden_states_of_the_teacher_give_the_same(tmp_path: Path) -> None:
    _, one, *first = pruned("llama", tokens())
    _, other, *second = pruned("llama", tokens(), spill=Spill(tmp_path))
    assert distill(*first) == pytest.approx(distill(*second), rel=1e-6)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6)


def test_a_text_in_shorter_sequences_is_the_same_text() -> None:
    ids = tokens(rows=6, length=33)
    ids[:5, 0] = 1  # BOS, which one row lacks
    pieces = shorter(ids, 16, [1])
    assert pieces.shape == (18, 11)
    assert torch.equal(pieces.flatten(), ids.flatten())
    fitted, others, held = divided(ids, 0, [1], share=2 / 3, length=16)  # four sequences, of which two are held out
    assert (fitted.shape, others.shape, held) == ((2, 33), (12, 11), 6)


def test_activations_that_are_computed_again_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, one, *first = pruned("llama", tokens())
    _, other, backend, blocks, text = pruned("llama", tokens())
    kept = distill(*first)
    monkeypatch.setattr(distillation, "kept_bytes", None)
    assert distill(backend, blocks, replace(text, may_keep=False)) == pytest.approx(kept, rel=1e-6)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_matrices_are_held_in_the_type_of_the_products_where_that_rounds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results, seen = [], []
    stock = distillation._Distillation._train

    def watched(training: distillation._Distillation) -> tuple[float, float]:
        modules = [module for each in training.modules.values() for module in each.values()]
        seen.append({module.weight.dtype for module in modules})
        return stock(training)

    monkeypatch.setattr(distillation._Distillation, "_train", watched)
    for narrow in (True, False):
        _, model, backend, blocks, text = pruned("llama", tokens())
        for parameter in model.float().parameters():
            parameter.data = parameter.data.bfloat16().float()
        if not narrow:
            monkeypatch.setattr(distillation._Distillation, "_narrow_matrices", lambda training: nullcontext())
        text = replace(text, teacher=[hidden.float() for hidden in text.teacher])
        measured = distill(replace(backend, products=torch.bfloat16), blocks, text)
        results.append((measured, {name: value.clone() for name, value in model.state_dict().items()}))
    assert seen == [{torch.bfloat16}, {torch.float32}]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        assert value.dtype is torch.float32
        assert torch.allclose(value, results[1][1][name], rtol=1e-5, atol=1e-6)


def test_updates_that_were_merged_predict_what_was_measured_with_them() -> None:
    dense, model, backend, blocks, text = pruned("gpt2", tokens())
    weight = model.get_submodule(blocks[0]).mlp.c_fc.weight.clone()
    _, after = distill(backend, blocks, text)
    change = (model.get_submodule(blocks[0]).mlp.c_fc.weight - weight).double()
    assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= RANK
    assert divergence(dense, model, text.tokens[-text.held_out :]) == pytest.approx(after, rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


class _Router(nn.Linear):
    """As Llama 4 has it: a linear module whose forward gives more than one tensor."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(hidden)
        return scores, scores.softmax(-1)


def test_modules_that_are_no_plain_linear_ones_get_no_update_and_keywords_are_read() -> None:
    _, model, backend, blocks, text = pruned("llama", tokens())
    mlp = model.get_submodule(f"{blocks[0]}.mlp")
    mlp.router = _Router(mlp.gate_proj.in_features, 2).to(mlp.gate_proj.weight)
    router, gate = mlp.router.weight.clone(), mlp.gate_proj.weight.clone()

    def forward(x: torch.Tensor) -> torch.Tensor:
        mlp.router(x)
        hidden = mlp.act_fn(mlp.gate_proj(input=x)) * mlp.up_proj(x)
        found: torch.Tensor = mlp.down_proj(hidden)
        return found

    mlp.forward = forward
    before, after = distill(backend, blocks, text)
    assert after < before
    assert torch.equal(mlp.router.weight, router)
    assert not torch.equal(mlp.gate_proj.weight, gate)


@pytest.mark.parametrize("name", ["falcon", "falcon_mqa"])
def test_linear_modules_with_a_forward_of_their_own_get_updates_if_it_only_multiplies(name: str) -> None:
    block = build(name).get_submodule("transformer.h.0")
    assert len(updated_modules(block)) == 4


def test_activations_of_the_updates_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(distillation, "kept_bytes", lambda *given: seen.append(activations.kept_bytes(*given)) or 0)
    _, _, backend, blocks, text = pruned("llama", tokens())
    distill(backend, blocks, text)
    walker = backend.walker()
    size = max(1, distillation.TOKENS_AT_ONCE // text.tokens.shape[1])
    first = text.tokens[: min(size, distillation.SEQUENCES)]
    assert seen[0] > activations.kept_bytes(walker, walker.start(first))


def test_a_training_that_diverges_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, backend, blocks, text = pruned("llama", tokens())
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(distillation, "LEARNING_RATE", float("nan"))
    first, last = distill(backend, blocks, text)
    assert first == last > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_vectors_of_a_bfloat16_model_take_steps_that_its_type_cannot_hold() -> None:
    _, model, backend, blocks, text = pruned("llama", tokens(rows=64))
    model.bfloat16()
    teacher = [one.bfloat16() for one in text.teacher]
    before, after = distill(backend, blocks, replace(text, teacher=teacher))
    assert after < before


@pytest.mark.parametrize(
    ("length", "leading", "expected"),
    [
        (4, (), [[9, 1, 2], [3, 4, 5], [9, 6, 7], [8, 1, 0]]),
        (4, (9,), [[9, 1, 2, 3], [9, 4, 5, 6], [9, 6, 7, 8], [9, 1, 0, 2]]),
        (7, (9,), None),
        (1, (9,), None),
    ],
)
def test_shorter_sequences_begin_as_the_given_ones(
    length: int, leading: tuple[int, ...], expected: list[list[int]] | None
) -> None:
    given = torch.tensor([[9, 1, 2, 3, 4, 5, 6], [9, 6, 7, 8, 1, 0, 2]])
    found = shorter(given, length, leading)
    if expected is None:
        assert torch.equal(found, given)
    else:
        assert found.tolist() == expected
    assert shorter(given[:0], length, leading).shape[0] == 0
    assert torch.equal(shorter(given, 4, (8,)), shorter(given, 4, ()))
