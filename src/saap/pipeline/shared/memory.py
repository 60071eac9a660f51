"""Keeping a run within the memory of the device that it computes on: what leaves that memory, and when.

First the activations of the reconstruction leave it, then the weights, of which one block at a time is read. How many
bytes each stage and a whole run take is estimated from sizes alone, before any weight is read: a little too much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from saap.core.errors import ConfigurationError, ModelError
from saap.discovery.blocks import find_blocks
from saap.evaluation.perplexity import LOGITS_BYTES
from saap.models.loading import device_memory
from saap.models.loading.devices import pick_device, working_dtype
from saap.models.loading.pretrained import load_offloaded, open_skeleton
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.offload import offloaded
from saap.models.walk.spill import Spill
from saap.pipeline.shared import stages
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.pipeline.shared.stages import Stage
from saap.pipeline.shared.tokens import COST_TOKENS_AT_ONCE, chooses_units
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.registry import Method

RESERVE_BYTES = 500 * 10**6
"""What is taken without a model: by libraries that are not loaded yet, or by the work space of an accelerator's."""
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
        return 4 * (16 * self.width + 2 * self.widest)

    def scoring(self, config: PruneConfig) -> int:
        """Activations under autograd, two matrices for the gradient of a weight, and some tokens' logits."""
        tokens = max(COST_TOKENS_AT_ONCE, config.sample_length)
        return self.block_activations(tokens, max(WINDOW, config.sample_length)) + 3 * self.matrix

    @property
    def logits(self) -> int:
        """Of the windows that are measured at once, and what is made of them."""
        quarter = WINDOW_TOKENS * self.vocabulary
        return 3 * max(quarter, min(4 * quarter, LOGITS_BYTES))


def refit_tokens(config: PruneConfig) -> int:
    """How many tokens the reconstruction is fitted on."""
    return config.effort_settings.refit_sequences * config.effort_settings.refit_length


def stage_needs(sizes: Sizes, config: PruneConfig) -> Mapping[Stage, int]:
    """Bytes that each stage takes beside the weights, the captured activations of the reconstruction left out."""
    windows = sizes.block_activations(WINDOW_TOKENS)
    measuring = windows + sizes.logits + sizes.pages
    inputs_of_blocks = sizes.blocks * max(COST_TOKENS_AT_ONCE, config.sample_length) * sizes.width * 4
    backward = sizes.scoring(config) + inputs_of_blocks
    # Gram matrices of what a consumer reads, their factors in double precision, and what it should give
    solving = 36 * sizes.widest**2 + 28 * sizes.widest * sizes.width
    kept = 0 if config.method is Method.SAAP else int(config.method.load().bytes_per_weight) * sizes.values
    return {
        stages.MEASURE_DENSE: measuring,
        stages.ESTIMATE: backward + kept,
        stages.FIND_COSTS: backward + _costs(sizes, config),
        stages.EVALUATE_DENSE: measuring,
        stages.SEARCH: measuring,
        stages.WEIGH_TOKENS: backward,
        stages.RESTORE: windows + solving if config.restore else 0,
        stages.MEASURE: measuring,
        stages.TIME_RESULT: measuring,
    }


def _costs(sizes: Sizes, config: PruneConfig) -> int:
    """Gram matrices of the second-order costs, and the weights that candidates replace, kept to be put back."""
    if not (config.restore and config.trusts_calibration and chooses_units(config)):
        return 0
    grams = sizes.blocks * 4 * (sizes.widest**2 + sizes.width**2)
    return (grams if grams <= sizes.weights else 0) + sizes.weights


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


def open_within(
    source: str | Path | nn.Module, config: PruneConfig, options: RunOptions, tokenizer: Any
) -> LoadedModel:
    """As `open_model`; what would not fit into memory is kept elsewhere.

    The limit is `options.max_memory`, on an accelerator without it what is free there, and on the CPU there is none.
    Raises ConfigurationError if the limit is too small for the model, or for what `config` needs.
    """
    given = options.max_memory
    if isinstance(source, nn.Module):
        if given is not None:
            raise ConfigurationError(
                "--max-memory cannot hold for a model that is in memory already", "Give the folder that it came from"
            )
        return _spilling(open_model(source, options, tokenizer), config, 0, None)
    device = pick_device(options.device)
    base = _base(device)  # now, since weights that are read count as memory of the process
    limit = device_memory.of_device(device) if given is None else given
    if limit is None or options.device_map is not None:
        return open_model(source, options, tokenizer)
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    dtype = working_dtype(device, resolved.dtype)
    try:
        least, whole = limits(resolved, config, dtype, device)
    except ModelError:  # it cannot be read part by part, so it has to fit
        if given is not None:
            raise
        return _spilling(open_model(resolved, options, tokenizer), config, base, None)
    if whole <= limit:
        return _spilling(open_model(resolved, options, tokenizer), config, base, limit)
    size = _gigabytes(limit)
    found = f"The free memory of {device} ({size})" if given is None else f"--max-memory {size}"
    if least > limit:
        raise ConfigurationError(
            f"{found} is too small for this model, which needs {_gigabytes(least)}"
            f"{', or less with --no-restore' if config.restore else ''}",
            "Use --device cpu" if given is None else f"Use --max-memory {_gigabytes(least)}",
        )
    _check_possible(config, whole, found)
    fresh = partial(load_offloaded, resolved, find_blocks, device=device, dtype=dtype)
    return open_model(resolved, options, tokenizer, fresh=fresh, skeleton=open_skeleton(resolved, dtype)[0])


def limits(resolved: ResolvedModel, config: PruneConfig, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Bytes of memory that a run needs at least, and from which on all weights can be in memory.

    dtype: to compute in. Raises ModelError if the files cannot be read part by part.
    """
    sizes, base = Sizes.of(open_skeleton(resolved, dtype)[0], device), _base(device)
    needs = Needs.of(sizes, config)
    return base + needs.offloaded, base + needs.spilled


def _spilling(loaded: LoadedModel, config: PruneConfig, base: int, limit: int | None) -> LoadedModel:
    """The model in memory, with whether the activations of the reconstruction have to be kept elsewhere.

    base: bytes that are taken without the model. limit: bytes for all of the run; None for what the device has.
    """
    device = next(loaded.model.parameters()).device
    limit = device_memory.of_device(device) if limit is None else limit
    if limit is None or not config.restore:
        return loaded
    needed = base + Needs.of(Sizes.of(loaded.model, device), config).resident
    return dataclasses.replace(loaded, spills=needed > limit)


def _base(device: torch.device) -> int:
    return RESERVE_BYTES + (device_memory.of_process() if device.type == "cpu" else 0)


def _check_possible(config: PruneConfig, whole: int, limit: str) -> None:
    """Refuse what needs the whole model in memory. limit: in words."""
    impossible = {
        f"--method {config.method}": config.method is not Method.SAAP,
        "--target-speedup": config.target_speedup is not None,
        "--roles hidden": PrunableRole.HIDDEN in config.roles,
        "--roles block": PrunableRole.BLOCK in config.roles,
    }
    for name, given in impossible.items():
        if given:
            raise ConfigurationError(
                f"{name} needs the whole model in memory, {_gigabytes(whole)}, and there is less: {limit}",
                "Leave it out, or allow more memory",
            )


def _gigabytes(count: int) -> str:
    """Rounded up, as the flag takes it."""
    return f"{-(-count // 10**8) / 10:g}GB"


def restoration_spill(loaded: LoadedModel, config: PruneConfig, folder: Path) -> Spill | None:
    """Where the reconstruction keeps its activations: with the weights (None), in the host's memory, or in a folder."""
    if not loaded.spills:
        return None if offloaded(loaded.model) is None else Spill(folder)
    device = next(loaded.model.parameters()).device
    captured = Sizes.of(loaded.model, device).captured_activations(config)
    return Spill(None if device.type != "cpu" and captured < device_memory.of_machine() else folder)
