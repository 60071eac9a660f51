from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.estimation.tiny import OwnModel
from tests.families import CORE, build, token_ids
from torch import Tensor, nn

import saap
from saap.core.errors import CalibrationError, NonFiniteLossError, UnsupportedModelError
from saap.core.records import AxisSlice, CalibrationSet, CoupledGroup, ModelGraph, Role, Side
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.structure.linear import contracted_axis, owner
from saap.models.walk.backend import Backend
from saap.settings.prune import Aggregation, ElementOrder

SAMPLES, LENGTH = 5, 9


def calibration(samples: int = SAMPLES, length: int = LENGTH) -> CalibrationSet:
    return CalibrationSet(sources=("random",), seed=0, tokens=token_ids(samples, length).numpy())


def weight_gradients(model: nn.Module, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss of one sample, and its gradient by the stock model and autograd alone."""
    names = dict(model.named_parameters())
    model.requires_grad_(True)
    output = model(tokens[None])
    logits = output if isinstance(output, Tensor) else output.logits
    loss = nn.functional.cross_entropy(logits[0, :-1], tokens[1:])
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    model.requires_grad_(False)
    return float(loss.detach()), {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def element(p: Tensor, order: ElementOrder) -> Tensor:
    second = 0.5 * (LENGTH - 1) * p**2
    return {ElementOrder.FIRST: p.abs(), ElementOrder.SECOND: second, ElementOrder.MIXED: (p - second).abs()}[order]


def by_unit(values: Tensor, part: AxisSlice, units: int) -> Tensor:
    rows = values.movedim(part.axis, 0)
    return torch.stack([rows[list(part.rows(unit))].sum() for unit in range(units)])


def brute_force(
    model: nn.Module,
    graph: ModelGraph,
    group: CoupledGroup,
    order: ElementOrder,
    aggregation: Aggregation,
    tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Vector and element importance of each unit for one sample, straight from the definitions."""
    _, gradients = weight_gradients(model, tokens)
    products = {name: gradient * model.get_parameter(name) for name, gradient in gradients.items()}
    changes, elements = [], []
    for part in group.members:
        module, attribute = owner(model, part.tensor)
        if contracted_axis(module) is None or graph.block_of(part.tensor) < 0:  # norms, embeddings and the head
            continue
        change = by_unit(products[part.tensor], part, group.units)
        fine = by_unit(element(products[part.tensor], order), part, group.units)
        if attribute == "bias":
            weight = part.tensor.removesuffix("bias") + "weight"
            own = [(m.tensor, m.offset) for m in group.members if not m.tensor.endswith("bias")]
            place = own.index((weight, part.offset))
            changes[place] = changes[place] + change
            elements[place] = elements[place] + fine
        else:
            changes.append(change)
            elements.append(fine)
    signed, fine = torch.stack(changes), torch.stack(elements)
    if aggregation is Aggregation.SUM:
        return signed.sum(0).abs(), fine.sum(0)
    reduce = {
        Aggregation.MAX: lambda t: t.amax(0),
        Aggregation.PROD: lambda t: t.prod(0),
        Aggregation.LAST: lambda t: t[-1],
    }[aggregation]
    return reduce(signed.abs()), reduce(fine)


def check(
    model: nn.Module,
    graph: ModelGraph,
    order: ElementOrder = ElementOrder.SECOND,
    aggregation: Aggregation = Aggregation.SUM,
    roles: Collection[Role] = (Role.FFN, Role.ATTENTION),
) -> None:
    samples = calibration()
    scores = estimate(
        Backend(model, graph), samples, roles=roles, element_order=order, aggregation=aggregation, micro_batch=2
    )
    wanted = [group for group in graph.groups if group.role in roles]
    assert list(scores.groups) == [group.name for group in wanted]
    tokens = torch.from_numpy(samples.tokens)
    losses = [weight_gradients(model, row)[0] for row in tokens]
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-12)
    for group in wanted:
        rows = [brute_force(model, graph, group, order, aggregation, row) for row in tokens]
        vector, fine = (torch.stack(column).numpy() for column in zip(*rows, strict=True))
        found = scores.groups[group.name]
        np.testing.assert_allclose(found.vector, vector.mean(0), rtol=1e-9, atol=1e-16)
        np.testing.assert_allclose(found.element, fine.mean(0), rtol=1e-9, atol=1e-20)
        np.testing.assert_allclose(found.vector_m2, vector.var(0) * SAMPLES, rtol=1e-8, atol=1e-20)
        np.testing.assert_allclose(found.element_m2, fine.var(0) * SAMPLES, rtol=1e-8, atol=1e-24)
        both = ((vector - vector.mean(0)) * (fine - fine.mean(0))).sum(0)
        np.testing.assert_allclose(found.comoment, both, rtol=1e-7, atol=1e-9 * abs(both).max())


@pytest.mark.parametrize("family", CORE)
def test_scores_equal_the_definition_by_autograd(family: str) -> None:
    model = build(family)
    graph = discover(model)
    assert {group.role for group in graph.groups} >= {Role.FFN, Role.ATTENTION}
    check(model, graph)


@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize("order", ElementOrder)
def test_orders_and_aggregations(order: ElementOrder, aggregation: Aggregation) -> None:
    model = build("gpt2")
    check(model, discover(model), order, aggregation)


def test_hidden_channels_when_asked_for() -> None:
    model = build("llama")
    check(model, discover(model), roles=tuple(Role))


def test_micro_batches_do_not_change_the_result() -> None:
    model = build("llama")
    graph, samples = discover(model), calibration()
    one, three = (estimate(Backend(model, graph), samples, micro_batch=rows) for rows in (1, 3))
    for name, scores in one.groups.items():
        for field in ("vector", "vector_m2", "element", "element_m2", "comoment"):
            first, second = getattr(scores, field), getattr(three.groups[name], field)
            np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12 * abs(first).max())


def test_the_same_bits_twice() -> None:
    model = build("phi3")
    graph = discover(model)
    assert (
        estimate(Backend(model, graph), calibration()).digest == estimate(Backend(model, graph), calibration()).digest
    )


def test_the_model_is_left_as_it_was() -> None:
    model = build("gpt2")
    graph, samples = discover(model), calibration()
    model.train().requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen: list[tuple[int, int]] = []
    backend = Backend(model, graph, progress=lambda done, total: seen.append((done, total)))
    estimate(backend, samples, micro_batch=2)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_own_model() -> None:
    model = OwnModel().requires_grad_(False)
    scores = estimate(Backend(model, discover(model)), calibration())
    rows = []
    for tokens in torch.from_numpy(calibration().tokens):
        _, gradients = weight_gradients(model, tokens)
        p = {name: gradient * model.get_parameter(name) for name, gradient in gradients.items()}
        up, bias, down = (p[f"blocks.1.{name}"] for name in ("up.weight", "up.bias", "down.weight"))
        rows.append((up.sum(1) + bias + down.sum(0)).abs())
    np.testing.assert_allclose(scores.groups["layers.1.ffn"].vector, torch.stack(rows).mean(0).numpy(), rtol=1e-10)


def test_bfloat16_agrees_with_float32() -> None:
    model = build("llama").float()
    graph = discover(model)
    exact = estimate(Backend(model, graph), calibration())
    rough = estimate(Backend(model.bfloat16(), graph), calibration())
    for name, scores in exact.groups.items():
        assert np.corrcoef(scores.element, rough.groups[name].element)[0, 1] > 0.98


def test_a_loss_that_is_no_number_names_the_sample() -> None:
    model = OwnModel()
    graph = discover(model)
    with torch.no_grad():
        model.embed.weight[95] = torch.nan
    samples = calibration()
    samples.tokens[:] = samples.tokens % 90
    samples.tokens[3, 2] = 95
    with pytest.raises(NonFiniteLossError, match="sample 3 is nan"):
        estimate(Backend(model, graph), samples, micro_batch=2)


def test_one_sample_has_no_fluctuation() -> None:
    model = OwnModel()
    with pytest.raises(CalibrationError, match="--num-samples 2 or more"):
        estimate(Backend(model, discover(model)), calibration(samples=1))
    with pytest.raises(CalibrationError, match="Give at least two rows"):
        saap.estimate(model, discover(model), [[1, 2, 3]])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    model = build("llama")
    with pytest.raises(CalibrationError, match="token ids given gave id 199, but the model's embedding has 128 rows"):
        saap.estimate(model, discover(model), [[1, 2], [1, 199]])


def test_samples_of_one_token_predict_nothing() -> None:
    model = OwnModel()
    with pytest.raises(CalibrationError, match="one token"):
        estimate(Backend(model, discover(model)), calibration(length=1))


def test_a_group_without_linear_members_is_refused() -> None:
    model = OwnModel()
    embedding = AxisSlice(tensor="embed.weight", axis=1, side=Side.PRODUCER, offset=0, width=1, stride=1)
    odd = CoupledGroup(layer=-1, role=Role.FFN, name="odd", units=12, members=(embedding,))
    with pytest.raises(UnsupportedModelError, match="odd"):
        estimate(Backend(model, replace(discover(model), groups=(odd,))), calibration())


def test_a_module_that_runs_twice_is_refused() -> None:
    model = OwnModel().requires_grad_(False)
    graph, block = discover(model), model.blocks[0]
    block.forward = lambda states, scale: states + block.down(torch.tanh(block.up(states) + block.up(2 * states)))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.up runs twice"):
        estimate(Backend(model, graph), calibration())


def test_an_output_changed_in_place_is_refused() -> None:
    model = OwnModel().requires_grad_(False)
    graph, block = discover(model), model.blocks[0]
    block.forward = lambda states, scale: states + block.down(block.up(states).mul_(2))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.up is changed in place"):
        estimate(Backend(model, graph), calibration())
