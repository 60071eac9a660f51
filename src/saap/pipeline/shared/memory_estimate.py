"""Bytes that each stage and a whole run take: by formulas of sizes, before weights are read, and a little too much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from saap.discovery.blocks import find_blocks
from saap.estimation.estimate import TOKENS_AT_ONCE
from saap.evaluation.perplexity import LOGITS_BYTES
from saap.pipeline.shared import stages
from saap.pipeline.shared.stages import Stage
from saap.pipeline.shared.tokens import chooses_units
from saap.settings.prune import PruneConfig
from saap.settings.registry import Method, Strategy

WINDOW_TOKENS = 2048
"""Tokens of a batch of windows of a measured text, and of one of the sequences of a reconstruction."""
WINDOW = 512
"""Tokens of one of them."""
HEAD_WIDTH = 64
"""Of a head, where the configuration does not say how many there are."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights in memory, and lengths. block: of the largest. around: of the modules outside the blocks.

    matrix: bytes of the largest matrix of a block. widest: its longer side. width: of the residual stream.
    vocabulary: 0 where the configuration does not say. heads: query heads of a block. values: how many numbers the
    matrices of all blocks have. pages: of files, which count as memory of the process while weights are read from them;
    0 on an accelerator.
    """

    weights: int
    block: int
    around: int
    matrix: int
    widest: int
    width: int
    blocks: int
    vocabulary: int
    heads: int
    values: int
    pages: int = 0

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> Sizes:
        """Sizes of a model, whose weights need no values, for computing on a device."""
        inside = [list(model.get_submodule(path).parameters()) for path in find_blocks(model)]
        matrices = [parameter for block in inside for parameter in block if parameter.dim() > 1]
        largest = max(matrices, key=torch.Tensor.numel)
        weights, width = sum(p.nbytes for p in model.parameters()), min(largest.shape[-2:])
        blocks = [sum(p.nbytes for p in block) for block in inside]
        config = getattr(model, "config", None)
        vocabulary, heads = (getattr(config, name, 0) for name in ("vocab_size", "num_attention_heads"))
        return cls(
            weights=weights, block=max(blocks), around=weights - sum(blocks), matrix=largest.nbytes,
            widest=max(largest.shape), width=width, blocks=len(blocks),
            vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
            heads=heads if isinstance(heads, int) and heads else max(1, width // HEAD_WIDTH),
            values=sum(map(torch.Tensor.numel, matrices)), pages=weights // 2 if device.type == "cpu" else 0,
        )  # fmt: skip

    def block_activations(self, tokens: int, length: int = WINDOW) -> int:
        """Of one block, with what attention makes of each pair of tokens where it has no fused kernel.

        length: tokens of one sequence.
        """
        return 4 * tokens * (12 * self.width + 4 * self.widest + 2 * min(tokens, length) * self.heads)

    def captured_activations(self, config: PruneConfig) -> int:
        """What the reconstruction captures of one block, over all of its text."""
        return config.restore * refit_tokens(config) * self.captured_by_token

    @property
    def captured_by_token(self) -> int:
        """The same for one token."""
        return 4 * (9 * self.width + self.widest)

    def scoring(self, config: PruneConfig) -> int:
        """Activations under autograd, two matrices for the gradient of a weight, and some tokens' logits."""
        tokens = max(TOKENS_AT_ONCE, config.preset_settings.sample_length)
        return self.block_activations(tokens, max(WINDOW, config.preset_settings.sample_length)) + 3 * self.matrix

    @property
    def logits(self) -> int:
        """Of the windows that are measured at once, and what is made of them."""
        quarter = WINDOW_TOKENS * self.vocabulary
        return 3 * max(quarter, min(4 * quarter, LOGITS_BYTES))


def refit_tokens(config: PruneConfig) -> int:
    """How many tokens the reconstruction is fitted on."""
    return config.preset_settings.refit_sequences * config.preset_settings.refit_length


def stage_needs(sizes: Sizes, config: PruneConfig) -> Mapping[Stage, int]:
    """Bytes that each stage takes beside the weights, the captured activations of the reconstruction left out."""
    windows = sizes.block_activations(WINDOW_TOKENS)
    measuring = windows + sizes.logits + sizes.pages
    inputs_of_blocks = sizes.blocks * max(TOKENS_AT_ONCE, config.preset_settings.sample_length) * sizes.width * 4
    backward = sizes.scoring(config) + inputs_of_blocks
    # Gram matrices of what a consumer reads, their factors in double precision, and what it should give
    solving = 36 * sizes.widest**2 + 28 * sizes.widest * sizes.width
    kept = 0 if config.method is Method.SAAP else int(config.method.load().bytes_per_weight) * sizes.values
    return {
        stages.MEASURE_DENSE: measuring,
        stages.ESTIMATE: backward + kept,
        stages.FIND_COSTS: backward + _costs(sizes, config),
        stages.KEEP_SCORES: 0,
        stages.EVALUATE_DENSE: measuring,
        stages.SEARCH: measuring,
        stages.RESTORE: windows + solving if config.restore else 0,
        stages.MEASURE: measuring,
        stages.TIME_RESULT: measuring,
    }


def _costs(sizes: Sizes, config: PruneConfig) -> int:
    """Gram matrices of the second-order costs, and the weights that candidates replace, kept to be put back."""
    if not (chooses_units(config) and config.strategy is Strategy.SECOND_ORDER):
        return 0
    grams = sizes.blocks * 4 * (sizes.widest**2 + sizes.width**2)
    return grams + sizes.weights if grams <= sizes.weights else 0


class Needs(NamedTuple):
    """Bytes that a run takes beyond the empty process.

    resident: with all in memory. spilled: with the activations of the reconstruction kept elsewhere, but for those of
    one micro-batch. offloaded: with at most one block in memory as well.
    """

    resident: int
    spilled: int
    offloaded: int

    @classmethod
    def of(cls, sizes: Sizes, config: PruneConfig) -> Needs:
        """By the sizes of a model and the settings of a run."""
        needs = stage_needs(sizes, config)
        results = 2 if len(config.pruning_ratios) > 1 or config.target_speedup is not None else 1
        weights = results * sizes.weights  # the dense model stays where another result needs it
        spilled = weights + max(needs.values())
        resident = weights + sizes.captured_activations(config) + needs[stages.RESTORE]
        windows = sizes.block_activations(WINDOW_TOKENS)
        in_block = max(sizes.scoring(config), needs[stages.RESTORE], windows)
        offloaded = max(sizes.block + in_block, sizes.around + sizes.logits)
        return cls(max(resident, spilled), spilled, offloaded)
