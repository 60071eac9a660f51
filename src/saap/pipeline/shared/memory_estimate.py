"""Memory estimates of stages and runs by formula, before weights are read; slightly too high."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from saap.discovery.blocks import find_blocks
from saap.estimation.estimate import TOKENS_AT_ONCE
from saap.evaluation.perplexity import LOGITS_BYTES
from saap.models.checkpoint.layer_fields import text_part
from saap.models.structure.linear import weight_out_in
from saap.pipeline.shared import stages
from saap.pipeline.shared.stages import Stage
from saap.pipeline.shared.tokens import chooses_units
from saap.settings.prune import PruneConfig
from saap.settings.registry import Method, Strategy
from saap.surgery.distillation import RANK, updated_modules

WINDOW_TOKENS = 2048
"""Tokens of a batch of windows of a measured text, and of one of the sequences of a reconstruction."""
WINDOW = 512
"""Tokens of one of them."""
HEAD_WIDTH = 64
"""Assumed head size if the configuration has no number of heads."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights in memory, and lengths. block: of the largest. around: of the modules outside the blocks.

    matrix: bytes of the largest matrix of a block. widest: its longer side. width: of the residual stream. vocabulary:
    0 if unknown. heads: query heads of a block. values: number of elements of the matrices of all blocks. updates: of
    the factors of the low-rank updates of them. pages: bytes of file pages, which count as memory of the process while
    weights are read; 0 on an accelerator. fused: whether attention needs no matrix of all pairs of tokens.
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
    updates: int = 0
    pages: int = 0
    fused: bool = False

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> Sizes:
        """Sizes of a model for computing on a device; its weights need no values."""
        found = [model.get_submodule(path) for path in find_blocks(model)]
        inside = [list(block.parameters()) for block in found]
        updated = [weight_out_in(module) for block in found for module in updated_modules(block).values()]
        matrices = [parameter for block in inside for parameter in block if parameter.dim() > 1]
        largest = max(matrices, key=torch.Tensor.numel)
        blocks = [sum(p.nbytes for p in block) for block in inside]
        weights, config = sum(p.nbytes for p in model.parameters()), text_part(getattr(model, "config", None))
        vocabulary, heads, hidden = (
            getattr(config, name, 0) for name in ("vocab_size", "num_attention_heads", "hidden_size")
        )
        width = hidden if isinstance(hidden, int) and hidden else min(largest.shape[-2:])
        return cls(
            weights=weights, block=max(blocks), around=weights - sum(blocks), matrix=largest.nbytes,
            widest=max(largest.shape), width=width, blocks=len(blocks),
            vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
            heads=heads if isinstance(heads, int) and heads else max(1, width // HEAD_WIDTH),
            values=sum(map(torch.Tensor.numel, matrices)), updates=RANK * sum(sum(one.shape) for one in updated),
            pages=weights // 2 if device.type == "cpu" else 0,
            fused=getattr(config, "_attn_implementation", None) == "sdpa",
        )  # fmt: skip

    def block_activations(self, tokens: int, length: int = WINDOW) -> int:
        """Activations of one block, including attention matrices without a fused kernel.

        length: tokens of one sequence.
        """
        return 4 * tokens * (12 * self.width + 4 * self.widest + 2 * min(tokens, length) * self.heads)

    def captured_activations(self, config: PruneConfig) -> int:
        """Captured activations of one block in the reconstruction, over all of its text."""
        merging = 8 * self.width * config.merge_experts  # what the experts get, and what their output lacks
        return config.restore * refit_tokens(config) * (self.captured_by_token + merging)

    @property
    def captured_by_token(self) -> int:
        """The same for one token: half of them are captured, the others have a stream in the dense model alone."""
        return 4 * (4 * self.width + self.widest // 2)

    def scoring(self, config: PruneConfig) -> int:
        """Activations under autograd, two matrices for the gradient of a weight, and some tokens' logits."""
        tokens = max(TOKENS_AT_ONCE, config.preset_settings.sample_length)
        return self.block_activations(tokens, WINDOW if self.fused else max(WINDOW, tokens)) + 3 * self.matrix

    @property
    def logits(self) -> int:
        """Activations and logits of the windows that are evaluated at once."""
        quarter = WINDOW_TOKENS * self.vocabulary
        return 3 * max(quarter, min(4 * quarter, LOGITS_BYTES))


def refit_tokens(config: PruneConfig) -> int:
    """Number of tokens in the fit of the reconstruction."""
    return config.preset_settings.refit_sequences * config.preset_settings.refit_length


def stage_needs(sizes: Sizes, config: PruneConfig) -> Mapping[Stage, int]:
    """Bytes of each stage besides the weights, without the captured activations of the reconstruction."""
    windows = sizes.block_activations(WINDOW_TOKENS)
    measuring = (stages.MEASURE_DENSE, stages.EVALUATE_DENSE, stages.SEARCH, stages.MEASURE, stages.TIME_RESULT)
    inputs_of_blocks = sizes.blocks * max(TOKENS_AT_ONCE, config.preset_settings.sample_length) * sizes.width * 4
    backward = sizes.scoring(config) + (0 if config.importance.of_experts else inputs_of_blocks)
    # Gram matrices of a consumer's inputs, their factors in double precision, and its targets
    solving = 36 * sizes.widest**2 + 28 * sizes.widest * sizes.width
    kept = 0 if config.method is Method.SAAP else int(config.method.load().bytes_per_weight) * sizes.values
    return {
        **dict.fromkeys(measuring, windows + sizes.logits + sizes.pages),
        stages.ESTIMATE: backward + kept,
        stages.FIND_COSTS: backward + _costs(sizes, config),
        stages.RESTORE: config.restore * max(windows + solving, _distilling(sizes, config)),
    }


def _distilling(sizes: Sizes, config: PruneConfig) -> int:
    """Backpropagation of one sequence; factors of the updates in seven copies (start, changes, gradients, moments)."""
    length = config.preset_settings.refit_length
    return sizes.block_activations(length, length) + 4 * sizes.blocks * length * sizes.width + 28 * sizes.updates


def _costs(sizes: Sizes, config: PruneConfig) -> int:
    """Gram matrices of the second-order costs, and copies of the weights that candidates replace."""
    if not (chooses_units(config) and config.strategy is Strategy.SECOND_ORDER):
        return 0
    grams = sizes.blocks * 4 * (sizes.widest**2 + sizes.width**2)
    return grams + sizes.weights if grams <= sizes.weights else 0


class Needs(NamedTuple):
    """Memory of a run in bytes beyond the empty process.

    resident: everything in memory. spilled: activations of the reconstruction offloaded, except for one micro-batch.
    offloaded: also at most one block in memory.
    """

    resident: int
    spilled: int
    offloaded: int

    @classmethod
    def of(cls, sizes: Sizes, config: PruneConfig) -> Needs:
        """Estimate from the sizes of a model and the settings of a run."""
        needs = stage_needs(sizes, config)
        results = 2 if len(config.pruning_ratios) > 1 or config.target_speedup is not None else 1
        weights = results * sizes.weights  # the dense model stays if another result needs it
        spilled = weights + max(needs.values())
        resident = weights + sizes.captured_activations(config) + needs[stages.RESTORE]
        windows = sizes.block_activations(WINDOW_TOKENS)
        in_block = max(sizes.scoring(config), needs[stages.RESTORE], windows)
        offloaded = max(sizes.block + in_block, sizes.around + sizes.logits)
        return cls(max(resident, spilled), spilled, offloaded)
