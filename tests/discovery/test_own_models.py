"""Models that are none of transformers' classes, and what discovery refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import ModelGraph, Role
from saap.discovery import discover

HIDDEN, HEADS, WIDTH, FFN = 24, 4, 5, 36


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        self.eps = 1e-6

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt((states * states).mean(-1, keepdim=True) + self.eps)


class OwnAttention(nn.Module):
    """Heads made by reshape with a size of its own, multiplied by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, HEADS * WIDTH)
        self.key_value = nn.Linear(HIDDEN, 2 * HEADS * WIDTH, bias=False)
        self.out = nn.Linear(HEADS * WIDTH, HIDDEN)
        self.heads = HEADS
        self.number = 3

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        shape = (batch, length, self.heads, WIDTH)
        query = self.query(states).view(shape)
        key, value = (part.view(shape) for part in self.key_value(states).chunk(2, dim=-1))
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


class OwnBlock(nn.Module):
    def __init__(self, feed_forward: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = RootMeanSquare(), RootMeanSquare()
        self.attention = OwnAttention()
        self.feed_forward = feed_forward()

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(self.first(states))
        return states + self.feed_forward(self.second(states))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(HIDDEN, 2 * FFN)
        self.narrow = nn.Linear(FFN, HIDDEN)

    def forward(self, states: Tensor) -> Tensor:
        gate, value = self.wide(states).chunk(2, dim=-1)
        return self.narrow(torch.sigmoid(gate) * value)


class Sorted(nn.Module):
    """Its channels are sorted by their values: nothing can be said about where they go."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, states: Tensor) -> Tensor:
        return self.narrow(self.wide(states).sort(dim=-1).values)


class Convolved(nn.Module):
    """Every channel mixes with its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.mix = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, states: Tensor) -> Tensor:
        wide = self.wide(states)
        return self.narrow(self.mix(wide.flatten(0, 1).unsqueeze(1)).view(wide.shape))


class OwnModel(nn.Module):
    def __init__(self, feed_forward: Callable[[], nn.Module] = Gated, layers: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(50, HIDDEN)
        self.places = nn.Parameter(torch.zeros(64, HIDDEN))
        self.layers = nn.ModuleList(OwnBlock(feed_forward) for _ in range(layers))
        self.last = RootMeanSquare()
        self.head = nn.Linear(HIDDEN, 50, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.words(input_ids) + self.places[: input_ids.shape[1]]
        for layer in self.layers:
            states = layer(states)
        return self.head(self.last(states))


def members(graph: ModelGraph, name: str) -> list[tuple[str, int, int, int]]:
    return [(m.tensor.split(".", 2)[-1], m.axis, m.offset, m.width) for m in graph.group(name).members]


def test_own_classes_are_understood_without_a_configuration() -> None:
    graph = discover(OwnModel())
    assert graph.blocks == ("layers.0", "layers.1", "layers.2")
    assert members(graph, "layers.2.ffn") == [
        ("feed_forward.wide.weight", 0, 0, 1),
        ("feed_forward.wide.weight", 0, FFN, 1),
        ("feed_forward.wide.bias", 0, 0, 1),
        ("feed_forward.wide.bias", 0, FFN, 1),
        ("feed_forward.narrow.weight", 1, 0, 1),
    ]
    assert members(graph, "layers.1.attention") == [
        ("attention.query.weight", 0, 0, WIDTH),
        ("attention.query.bias", 0, 0, WIDTH),
        ("attention.key_value.weight", 0, 0, WIDTH),
        ("attention.key_value.weight", 0, HEADS * WIDTH, WIDTH),
        ("attention.out.weight", 1, 0, WIDTH),
    ]
    assert graph.config_fields == ()


def test_own_attributes_follow_the_heads() -> None:
    (attribute,) = discover(OwnModel()).group("layers.1.attention").attributes
    assert (attribute.module, attribute.attribute, attribute.per_unit) == ("layers.1.attention", "heads", 1)


def test_the_hidden_channels_of_an_own_model() -> None:
    group = discover(OwnModel()).group("hidden")
    assert ("places", 1) in {(member.tensor, member.axis) for member in group.members}
    assert len(group.scaled_norms) == 7


class Stiff(RootMeanSquare):
    """Its epsilon is part of the code."""

    def __init__(self) -> None:
        super().__init__()
        del self.eps

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt((states * states).mean(-1, keepdim=True) + 1e-6)


def test_a_norm_that_cannot_be_rescaled_refuses_the_hidden_channels() -> None:
    model = OwnModel()
    model.last = Stiff()
    refused = {refusal.name: refusal.reason for refusal in discover(model).refused}
    assert "the norm last has no weight or no epsilon" in refused["hidden"]


@pytest.mark.parametrize(("feed_forward", "operation"), [(Sorted, "sort"), (Convolved, "conv1d")])
def test_what_is_not_understood_is_refused_by_name(feed_forward: Callable[[], nn.Module], operation: str) -> None:
    graph = discover(OwnModel(feed_forward))
    refused = {refusal.name: refusal.reason for refusal in graph.refused}
    assert {f"layers.{layer}.feed_forward.wide" for layer in range(3)} <= set(refused)
    assert f"the operation {operation} in layers.2.feed_forward" in refused["layers.2.feed_forward.wide"]
    assert not graph.of_role(Role.FFN)
    assert len(graph.of_role(Role.ATTENTION)) == 3


class Latent(nn.Module):
    """Keys are written into a new tensor, half of each one's own and half the same for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.own = nn.Linear(HIDDEN, 2 * HEADS * WIDTH), nn.Linear(HIDDEN, 2 * HEADS * WIDTH)
        self.common, self.out = nn.Linear(HIDDEN, WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        query = self.query(states).view(batch, length, -1, 2 * WIDTH).transpose(1, 2)
        own, value = self.own(states).view(batch, length, -1, 2 * WIDTH).transpose(1, 2).chunk(2, dim=-1)
        key = own.new_empty(*own.shape[:-1], 2 * WIDTH)
        key[..., :WIDTH].copy_(own)
        key[..., WIDTH:].copy_(self.common(states).unsqueeze(1).expand(own.shape))
        heard = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.out(heard.transpose(1, 2).flatten(2))


def test_heads_leave_without_the_keys_that_they_have_in_common() -> None:
    model = OwnModel()
    for block in model.layers:
        block.attention = Latent()
    assert members(discover(model), "layers.1.attention") == [
        ("attention.query.weight", 0, 0, 2 * WIDTH),
        ("attention.query.bias", 0, 0, 2 * WIDTH),
        ("attention.own.weight", 0, 0, 2 * WIDTH),
        ("attention.own.bias", 0, 0, 2 * WIDTH),
        ("attention.out.weight", 1, 0, WIDTH),
    ]


class Muted(Gated):
    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) * 0.0


class SinglePrecision(Gated):
    def forward(self, states: Tensor) -> Tensor:
        if states.dtype is torch.float64:
            raise TypeError("only float32 is known here")
        return super().forward(states)


def test_units_without_effect_are_refused_as_that() -> None:
    model = OwnModel()
    model.layers[2] = OwnBlock(Muted)
    refused = {refusal.name: refusal.reason for refusal in discover(model).refused}
    reason = "masking its units does not change the output of its block, so their removal cannot be tested"
    assert refused["layers.2.ffn"] == reason


def test_a_small_model_that_fails_is_refused_with_its_error() -> None:
    reason = "a small random model of its classes ends with TypeError: only float32 is known here"
    with pytest.raises(UnsupportedModelError, match=reason):
        discover(OwnModel(SinglePrecision))


class Unfinished(OwnModel):
    def forward(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError("the head is missing")


class NoList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, HIDDEN), nn.Linear(HIDDEN, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids))


class Unused(OwnModel):
    """Its longest list takes no part in the forward."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids))


class DependsOnValues(OwnModel):
    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.words(input_ids)
        if float(states.sum()) > 0:
            states = states * 2
        return self.head(self.layers[0](states))


class OnlySorted(nn.Module):
    """A block of which nothing is understood."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, HIDDEN), nn.Linear(HIDDEN, 50)
        self.layers = nn.ModuleList(Sorted() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.words(input_ids).sort(dim=-1).values
        for layer in self.layers:
            states = layer(states)
        return self.head(states)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (NoList, "NoList has no nn.ModuleList"),
        (Unused, "does not pass through layers.0"),
        (DependsOnValues, "The forward of DependsOnValues cannot be traced: its control flow depends on values"),
        (
            Unfinished,
            "The dense model itself does not run: Unfinished ends with NotImplementedError: the head is missing",
        ),
        (OnlySorted, "sort"),
    ],
)
def test_models_of_which_nothing_can_be_pruned_are_refused(model: Callable[[], Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        discover(model())
