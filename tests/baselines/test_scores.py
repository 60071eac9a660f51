"""Each baseline's score on a small case against its formula written out another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.families import build, token_ids
from torch import nn

from saap.baselines.activations import (
    activations,
    compensating_biases,
    flap_channels,
    flap_scores,
    influence_scores,
    standardised,
    wanda_channels,
    wanda_scores,
)
from saap.baselines.baseline import add_biases
from saap.baselines.llm_pruner import gradients as averaged_gradients
from saap.baselines.llm_pruner import taylor_channels, taylor_scores
from saap.baselines.weights import magnitude_scores, random_scores
from saap.discovery import discover
from saap.models.loading.pretrained import model_ref
from saap.models.walk.backend import Backend

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([[0.5, 1.0], [-1.0, 2.0]], dtype=torch.float64)
SQUARE = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def graph(model):
    return discover(model, model_ref(model, "tiny"))


@pytest.fixture(scope="module")
def tokens():
    return token_ids(3, 9)


@pytest.fixture(scope="module")
def gradients(model, graph, tokens):
    return averaged_gradients(Backend(model, graph), tokens)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        # w g = [[0.5, -2], [-3, 1]]; w^2 h = [[1, 8], [27, 1]]
        ("vectorize", [abs(0.5 - 3), abs(-2 + 1)]),
        ("param_first", [0.5 + 3, 2 + 1]),
        ("param_second", [1 + 27, 8 + 1]),
        ("param_mix", [abs(0.5 - 0.5) + abs(-3 - 13.5), abs(-2 - 4) + abs(1 - 0.5)]),
    ],
)
def test_llm_pruner_by_hand(kind, columns) -> None:
    assert taylor_channels(WEIGHT, MEAN, SQUARE, 1, kind).tolist() == pytest.approx(columns)


def test_llm_pruner_counts_rows_too() -> None:
    assert taylor_channels(WEIGHT, MEAN, SQUARE, 0, "vectorize").tolist() == pytest.approx([1.5, 2.0])


def test_gradients_are_those_of_autograd(model, gradients, tokens) -> None:
    names = list(gradients.mean)
    weights = [model.get_parameter(name).requires_grad_(True) for name in names]
    each = []
    for sample in tokens:
        logits = model(sample[None]).logits[0, :-1]
        each.append(torch.autograd.grad(nn.functional.cross_entropy(logits, sample[1:]), weights))
    for weight in weights:
        weight.requires_grad_(False)
    assert len(names) == 3 * 7
    for index, name in enumerate(names):
        stacked = torch.stack([one[index] for one in each])
        torch.testing.assert_close(gradients.mean[name], stacked.mean(0))
        torch.testing.assert_close(gradients.square[name], stacked.square().mean(0))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_llm_pruner_sums_channels_and_members(model, graph, gradients) -> None:
    scores = taylor_scores(Backend(model, graph), gradients, 0, "param_first")
    ffn = model.model.layers[1].mlp
    expected = sum(
        (weight * gradients.mean[f"model.layers.1.mlp.{name}.weight"]).abs().sum(axis)
        for name, weight, axis in (
            ("gate_proj", ffn.gate_proj.weight, 1), ("up_proj", ffn.up_proj.weight, 1),
            ("down_proj", ffn.down_proj.weight, 0),
        )
    )  # fmt: skip
    np.testing.assert_allclose(scores["layers.1.ffn"], expected.float().numpy(), rtol=1e-5)
    assert scores["layers.1.attention"].shape == (3,)


def test_magnitude_is_the_sum_of_squares_over_members(model, graph) -> None:
    scores = magnitude_scores(Backend(model, graph), None, 0)
    ffn, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    expected = (
        ffn.gate_proj.weight[5].square().sum() + ffn.up_proj.weight[5].square().sum()
        + ffn.down_proj.weight[:, 5].square().sum()
    )  # fmt: skip
    assert scores["layers.0.ffn"][5] == pytest.approx(float(expected))
    # KV group 1 of 3: query heads 2 and 3 of 6, of width 12
    expected = (
        attention.q_proj.weight[24:48].square().sum() + attention.k_proj.weight[12:24].square().sum()
        + attention.v_proj.weight[12:24].square().sum() + attention.o_proj.weight[:, 24:48].square().sum()
    )  # fmt: skip
    assert scores["layers.0.attention"][1] == pytest.approx(float(expected))


def test_random_scores_follow_the_seed(model, graph) -> None:
    backend = Backend(model, graph)
    first, again, other = (random_scores(backend, None, seed) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert not (first["layers.0.ffn"] == other["layers.0.ffn"]).all()
    assert "hidden" not in first


def test_wanda_and_flap_by_hand() -> None:
    square, mean = torch.tensor([4.0, 9.0]), torch.tensor([1.0, 3.0])
    assert wanda_channels(WEIGHT, square).tolist() == pytest.approx([2 * (1 + 3) / 2, 3 * (2 + 0.5) / 2])
    assert flap_channels(WEIGHT, mean, square).tolist() == pytest.approx([(4 - 1) * (1 + 9), 0.0])
    assert standardised(torch.tensor([1.0, 2.0, 3.0])).tolist() == [-1.0, 0.0, 1.0]
    assert standardised(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_statistics_are_those_of_the_inputs_and_blocks(model, graph, tokens) -> None:
    found = activations(Backend(model, graph), tokens)
    path = "model.layers.1.mlp.down_proj"
    seen, streams = [], []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])),
        model.model.layers[1].register_forward_hook(lambda m, inputs, output: streams.append((inputs[0], output))),
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    inputs = seen[0].flatten(0, 1)
    torch.testing.assert_close(found.mean[path], inputs.mean(0))
    torch.testing.assert_close(found.square[path], inputs.square().mean(0))
    before, after = streams[0][0], streams[0][1][0] if isinstance(streams[0][1], tuple) else streams[0][1]
    dots = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    assert found.influence[1] == pytest.approx(1 - float(dots.mean()))
    scores = influence_scores(Backend(model, graph), found, 0)
    of_block = sum(scores[group.name].sum() for group in graph.in_block(1) if group.name in scores)
    assert of_block == pytest.approx(found.influence[1])


def test_heads_take_wandas_sum_and_flaps_mean_of_standardised_channels(model, graph, tokens) -> None:
    found = activations(Backend(model, graph), tokens)
    path = "model.layers.0.self_attn.o_proj"
    weight = model.get_submodule(path).weight
    wanda = weight.abs().mean(0) * found.square[path].sqrt()
    backend = Backend(model, graph)
    assert wanda_scores(backend, found, 0)["layers.0.attention"][2] == pytest.approx(float(wanda[48:72].sum()))
    fluctuation = ((found.square[path] - found.mean[path] ** 2) * weight.square().sum(0)) ** 2
    z = (fluctuation - fluctuation.mean()) / fluctuation.std()
    per_unit = graph.group("layers.0.attention").parameters_per_unit(graph.shapes)
    assert flap_scores(backend, found, 0)["layers.0.attention"][2] / per_unit == pytest.approx(float(z[48:72].mean()))


def test_biases_keep_the_mean_output_of_what_is_removed(model, graph, tokens) -> None:
    found = activations(Backend(model, graph), tokens)
    keep = {"layers.0.ffn": tuple(range(3, 80))}
    biases = compensating_biases(Backend(model, graph), found, keep)
    assert list(biases) == ["model.layers.0.mlp.down_proj"]
    module = nn.Linear(80, 48, bias=False).double()
    module.weight.data.copy_(model.model.layers[0].mlp.down_proj.weight)
    mean = found.mean["model.layers.0.mlp.down_proj"]
    masked = mean.clone()
    masked[:3] = 0
    holder = nn.ModuleDict({"down": module})
    assert add_biases(holder, {"down": biases["model.layers.0.mlp.down_proj"]}) == 48
    torch.testing.assert_close(module(masked), mean @ module.weight.T, rtol=1e-5, atol=1e-6)
    assert add_biases(holder, {"down": torch.ones(48)}) == 0
