"""A graph made of records only: L blocks of one FFN and one attention group, and hidden channels."""

from __future__ import annotations

import numpy as np

from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, ModelRef, Role, Side, UnitScores

WIDTH, CHANNELS, HEADS, HEAD_WIDTH, VOCABULARY = 12, 64, 4, 3, 20


def _slice(tensor: str, axis: int, side: Side, width: int = 1) -> AxisSlice:
    return AxisSlice(tensor=tensor, axis=axis, side=side, offset=0, width=width, stride=width)


def graph(layers: int = 6) -> ModelGraph:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, WIDTH)}
    groups, hidden = [], [_slice("embed.weight", 1, Side.PRODUCER)]
    for layer in range(layers):
        prefix = f"blocks.{layer}"
        ffn, attention = [], []
        for name in ("gate", "up"):
            shapes[f"{prefix}.{name}.weight"] = (CHANNELS, WIDTH)
            ffn.append(_slice(f"{prefix}.{name}.weight", 0, Side.PRODUCER))
            hidden.append(_slice(f"{prefix}.{name}.weight", 1, Side.CONSUMER))
        shapes[f"{prefix}.down.weight"] = (WIDTH, CHANNELS)
        ffn.append(_slice(f"{prefix}.down.weight", 1, Side.CONSUMER))
        hidden.append(_slice(f"{prefix}.down.weight", 0, Side.PRODUCER))
        for name in ("q", "k", "v"):
            shapes[f"{prefix}.{name}.weight"] = (HEADS * HEAD_WIDTH, WIDTH)
            attention.append(_slice(f"{prefix}.{name}.weight", 0, Side.PRODUCER, HEAD_WIDTH))
            hidden.append(_slice(f"{prefix}.{name}.weight", 1, Side.CONSUMER))
        shapes[f"{prefix}.o.weight"] = (WIDTH, HEADS * HEAD_WIDTH)
        attention.append(_slice(f"{prefix}.o.weight", 1, Side.CONSUMER, HEAD_WIDTH))
        hidden.append(_slice(f"{prefix}.o.weight", 0, Side.PRODUCER))
        groups += [
            CoupledGroup(
                layer=layer,
                role=Role.ATTENTION,
                name=f"layers.{layer}.attention",
                units=HEADS,
                members=tuple(attention),
            ),
            CoupledGroup(layer=layer, role=Role.FFN, name=f"layers.{layer}.ffn", units=CHANNELS, members=tuple(ffn)),
        ]
    groups.append(CoupledGroup(layer=-1, role=Role.HIDDEN, name="hidden", units=WIDTH, members=tuple(hidden)))
    return ModelGraph(
        model=ModelRef(source="synthetic", config_digest="c", weights_digest="w"),
        blocks=tuple(f"blocks.{layer}" for layer in range(layers)),
        groups=tuple(groups),
        shapes=shapes,
    )


def scores(of: ModelGraph, seed: int = 0) -> dict[str, UnitScores]:
    generator = np.random.default_rng(seed)
    return {
        group.name: UnitScores(mean=generator.random(group.units) + 0.01, variance=generator.random(group.units))
        for group in of.groups
    }
