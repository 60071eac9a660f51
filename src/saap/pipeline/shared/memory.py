"""Keeping a run within the memory of the device that it computes on: what leaves that memory, and when.

First the activations of the restoration leave it, then the weights, of which one block at a time is read. The figures
are estimates from sizes alone, made before any weight is read. They are meant to be a little too large.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import ConfigurationError, ModelError
from saap.discovery.blocks import find_blocks
from saap.evaluation.perplexity import LOGITS_BYTES
from saap.export.placing import check_place
from saap.models.loading import device_memory
from saap.models.loading.devices import pick_device, pick_dtype, spread_over, working_dtype
from saap.models.loading.pretrained import load, load_offloaded, load_tokenizer, model_ref, open_skeleton
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.offload import offloaded, placeholder
from saap.models.walk.spill import HostSpill, Spill
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import COST_TOKENS_AT_ONCE, LoadedModel, RunOptions, chooses_units, open_model
from saap.pipeline.shared.targets import Target
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.registry import Method

RESERVE_BYTES = 500 * 10**6
"""What is taken without a model: by libraries that are not loaded yet, or by the work space of an accelerator's."""
SEARCH_SHARE = 0.2
READING_TOKENS = 256
"""Reading a block takes about as long as passing so many tokens through it."""
WINDOW_TOKENS = 2048
"""Tokens of a batch of windows of a measured text, and of one of the sequences of a restoration."""
WINDOW = 512
"""Tokens of one of them."""
HEAD_WIDTH = 64
"""Of a head, where the configuration does not say how many there are."""
DISK_SPARE = 1.05


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights in memory, and lengths. block: of the largest. around: of the modules outside the blocks.

    matrix: bytes of the largest matrix of a block. widest: its longer side. width: of the residual stream.
    vocabulary: 0 where the configuration does not say. heads: query heads of a block. values: of all matrices of the
    blocks, a number. pages: of files, which count as memory of the process while weights are read from them; 0 on an
    accelerator.
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
        blocks = find_blocks(model)
        inside = [list(model.get_submodule(path).parameters()) for path in blocks]
        matrices = [parameter for block in inside for parameter in block if parameter.dim() > 1]
        largest = max(matrices, key=torch.Tensor.numel)
        weights = sum(_size(parameter) for parameter in model.parameters())
        config = getattr(model, "config", None)
        vocabulary, heads = (getattr(config, name, 0) for name in ("vocab_size", "num_attention_heads"))
        width = min(largest.shape[-2:])
        return cls(
            weights=weights,
            block=max(sum(map(_size, block)) for block in inside),
            around=weights - sum(sum(map(_size, block)) for block in inside),
            matrix=_size(largest),
            widest=max(largest.shape),
            width=width,
            blocks=len(blocks),
            vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
            heads=heads if isinstance(heads, int) and heads else max(1, width // HEAD_WIDTH),
            values=sum(map(torch.Tensor.numel, matrices)),
            pages=weights // 2 if device.type == "cpu" else 0,
        )


def _size(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def resident_need(sizes: Sizes, config: PruneConfig) -> int:
    """Bytes that a run takes, beyond the empty process, with weights and activations in memory."""
    restoring = captured(sizes, config) + _passing(sizes, WINDOW_TOKENS) + _solving(sizes)
    return max(spilled_need(sizes, config), _weights(sizes, config) + restoring)


def spilled_need(sizes: Sizes, config: PruneConfig) -> int:
    """The same if the activations of the restoration are kept elsewhere, but for those of one micro-batch."""
    reading = sizes.blocks * COST_TOKENS_AT_ONCE * sizes.width * 4
    restoring = _passing(sizes, WINDOW_TOKENS) + _solving(sizes) if config.restore else 0
    measuring = _passing(sizes, WINDOW_TOKENS) + _logits(sizes) + sizes.pages
    scoring = _scoring(sizes, config) + reading + _costs(sizes, config) + gradients(sizes.values, config)
    return _weights(sizes, config) + max(scoring, restoring, measuring)


def captured(sizes: Sizes, config: PruneConfig) -> int:
    """Bytes of the activations of one block, over all text of the restoration."""
    settings = config.effort_settings
    tokens = settings.refit_sequences * settings.refit_length if config.restore else 0
    return 4 * tokens * (16 * sizes.width + 2 * sizes.widest)


def _weights(sizes: Sizes, config: PruneConfig) -> int:
    """Of the dense model, and of a result as well where the dense one is needed for another."""
    results = 2 if len(config.pruning_ratios) > 1 or config.target_speedup is not None else 1
    return results * sizes.weights


def _costs(sizes: Sizes, config: PruneConfig) -> int:
    """Gram matrices of the second-order costs, and the weights that candidates replace, kept to be put back."""
    if not (config.restore and config.trusts_calibration and chooses_units(config)):
        return 0
    grams = sizes.blocks * 4 * (sizes.widest**2 + sizes.width**2)
    return (grams if grams <= sizes.weights else 0) + sizes.weights


def gradients(values: int, config: PruneConfig) -> int:
    """Bytes of what a baseline keeps of each weight of the blocks (LLM-Pruner: two sums in float32)."""
    return 0 if config.method is Method.SAAP else int(config.method.load().bytes_per_weight) * values


def offloaded_need(sizes: Sizes, config: PruneConfig) -> int:
    """The same with at most one block in memory."""
    restoring = 0
    if config.restore:
        restoring = _passing(sizes, WINDOW_TOKENS) + _solving(sizes)
    in_block = sizes.block + max(_scoring(sizes, config), restoring, _passing(sizes, WINDOW_TOKENS))
    return max(in_block, sizes.around + _logits(sizes))


def _passing(sizes: Sizes, tokens: int) -> int:
    """Activations of one block, with what attention makes of each pair of tokens where it has no fused kernel."""
    return 4 * tokens * (12 * sizes.width + 4 * sizes.widest + 2 * min(tokens, WINDOW) * sizes.heads)


def _logits(sizes: Sizes) -> int:
    """Logits of the windows that are measured at once, and what is made of them."""
    one = 4 * WINDOW_TOKENS // 4 * sizes.vocabulary
    return 3 * max(one, min(4 * one, LOGITS_BYTES))


def _scoring(sizes: Sizes, config: PruneConfig) -> int:
    """Activations under autograd, two matrices for the gradient of a weight, and some tokens' logits."""
    return _passing(sizes, max(COST_TOKENS_AT_ONCE, config.sample_length)) + 3 * sizes.matrix


def _solving(sizes: Sizes) -> int:
    """Gram matrices of what a consumer reads, their factors in double precision, and what it should give."""
    return 36 * sizes.widest**2 + 28 * sizes.widest * sizes.width


def open_within(
    source: str | Path | nn.Module, config: PruneConfig, options: RunOptions, tokenizer: Any
) -> LoadedModel:
    """As `open_model`; what would not fit into memory is kept elsewhere.

    The limit is `options.max_memory`, on an accelerator without it what is free there, and on the CPU there is none.
    Raises ConfigurationError if the limit is too small for the model, or for what `config` needs.
    """
    if isinstance(source, nn.Module):
        if options.max_memory is not None:
            raise ConfigurationError(
                "--max-memory cannot hold for a model that is in memory already", "Give the folder that it came from"
            )
        return _spilling(open_model(source, options, tokenizer), config, 0, None)
    device = pick_device(options.device)
    base = _base(device)  # now, since weights that are read count as memory of the process
    limit = device_memory.of_device(device) if options.max_memory is None else options.max_memory
    if limit is None or options.device_map is not None:
        return open_model(source, options, tokenizer)
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    dtype = working_dtype(device, resolved.dtype)
    try:
        least, whole = limits(resolved, config, dtype, device)
    except ModelError:  # it cannot be read part by part, so it has to fit
        if options.max_memory is not None:
            raise
        return _spilling(open_model(resolved, options, tokenizer), config, base, None)
    if whole <= limit:
        return _spilling(open_model(resolved, options, tokenizer), config, base, limit)
    given = _limit_in_words(limit, options, device)
    if least > limit:
        raise ConfigurationError(
            f"{given[0].upper()}{given[1:]} is too small for this model, which needs {_gigabytes(least)}"
            f"{', or less with --no-restore' if config.restore else ''}",
            f"Use --max-memory {_gigabytes(least)}" if options.max_memory is not None else "Use --device cpu",
        )
    _check_possible(config, given, whole)
    return _open_offloaded(resolved, options, tokenizer, device, dtype)


def _spilling(loaded: LoadedModel, config: PruneConfig, base: int, limit: int | None) -> LoadedModel:
    """The model in memory, with whether the activations of the restoration have to be kept elsewhere.

    base: bytes that are taken without the model. limit: bytes for all of the run; None for what the device has.
    """
    device = next(loaded.model.parameters()).device
    limit = device_memory.of_device(device) if limit is None else limit
    needed = base + resident_need(Sizes.of(loaded.model, device), config)
    return dataclasses.replace(loaded, spills=config.restore and limit is not None and needed > limit)


def limits(resolved: ResolvedModel, config: PruneConfig, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Bytes of memory that a run needs at least, and from which on all weights can be in memory.

    dtype: to compute in. Raises ModelError if the files cannot be read part by part.
    """
    sizes, base = Sizes.of(open_skeleton(resolved, dtype)[0], device), _base(device)
    return base + offloaded_need(sizes, config), base + spilled_need(sizes, config)


def _base(device: torch.device) -> int:
    return RESERVE_BYTES + (device_memory.of_process() if device.type == "cpu" else 0)


def _open_offloaded(
    resolved: ResolvedModel, options: RunOptions, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    fresh = partial(load_offloaded, resolved, find_blocks, device=device, dtype=dtype)
    model = fresh()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(resolved),
        ref=model_ref(model, resolved.source, options.revision),
        dtype=pick_dtype(options.dtype, source=resolved.dtype),
        owned=True,
        folder=resolved.folder,
        fresh=fresh,
        skeleton=open_skeleton(resolved, dtype)[0],
    )


def _limit_in_words(limit: int, options: RunOptions, device: torch.device) -> str:
    size = _gigabytes(limit)
    return f"the free memory of {device} ({size})" if options.max_memory is None else f"--max-memory {size}"


def _check_possible(config: PruneConfig, limit: str, whole: int) -> None:
    """Refuse what needs the whole model in memory."""
    impossible = {
        f"--method {config.method}": config.method is not Method.SAAP,
        "--target-speedup": config.target_speedup is not None,
        "--roles hidden": PrunableRole.HIDDEN in config.roles,
        "--roles block": PrunableRole.BLOCK in config.roles,
    }
    for name, given in impossible.items():
        if given:
            raise ConfigurationError(
                f"{name} needs the whole model in memory, {_gigabytes(whole)}, which is more than {limit}",
                "Leave it out, or allow more memory",
            )


def refuse_offloaded(loaded: LoadedModel, what: str) -> None:
    """Raise ConfigurationError if the weights stay in their files, with which `what` cannot be done."""
    if loaded.fresh is not None:
        raise ConfigurationError(
            f"{what} tries the stages with all weights in memory, which is too small for them",
            f"Leave out {what}; a limit that is too small for the run itself is refused at once",
        )


def _gigabytes(count: int) -> str:
    """Rounded up, as the flag takes it."""
    return f"{-(-count // 10**8) / 10:g}GB"


def check_disk(run: Run, targets: Sequence[Target]) -> None:
    """Raise OutputError if the disk cannot hold what is to lie there: results, changed blocks, spilled activations."""
    spill = restoration_spill(run.loaded, run.config, run.work.file("spill"))
    if run.options.out is None or not isinstance(spill, Spill):
        return
    sizes = Sizes.of(run.loaded.model, run.device)
    needed = captured(sizes, run.config)
    if run.loaded.fresh is not None:
        itemsize = run.loaded.dtype.itemsize
        left = [run.graph.parameters - (one.budget.removal if one.budget is not None else 0) for one in targets]
        scored = 4 * run.tokens.scored.tokens.size * sizes.width * (sizes.blocks + 2)
        needed = max(needed, scored) + int(DISK_SPARE * (sum(left) + max(left)) * itemsize)
    check_place(run.options.out, needed)


def restoration_spill(loaded: LoadedModel, config: PruneConfig, folder: Path) -> Spill | HostSpill | None:
    """Where the restoration keeps its activations: with the weights (None), in the host's memory, or in a folder."""
    if not loaded.spills:
        return None if offloaded(loaded.model) is None else Spill(folder)
    device = next(loaded.model.parameters()).device
    fits = device.type != "cpu" and captured(Sizes.of(loaded.model, device), config) < device_memory.of_machine()
    return HostSpill() if fits else Spill(folder)


def require_alone(run: Run) -> None:
    """Raise ConfigurationError if several processes were to read the weights from the files block by block."""
    if run.processes.count > 1 and run.loaded.fresh is not None:
        raise ConfigurationError(
            "Weights that stay in their files are read by one process",
            "Start it without torchrun, or leave out --max-memory",
        )


def clear_spill(run: Run) -> None:
    """Delete what a run that was killed has left."""
    shutil.rmtree(run.work.file("spill"), ignore_errors=True)


def search_evaluations(run: Run) -> int:
    """How many candidates the search may measure.

    Each of them reads all weights if these are in files; so that all together take at most a fifth of the time of the
    estimation, their number follows from the tokens: the estimation passes its tokens about four times through each
    block (forward, again, back, gradients of weights) and reads it twice; a candidate passes its own once.
    """
    wanted = run.config.effort_settings.search_evaluations
    if offloaded(run.loaded.model) is None:
        return wanted
    if any(member.part is not None for group in run.graph.groups for member in group.members):
        return 0
    estimating = 4 * run.tokens.scored.tokens.size + 2 * READING_TOKENS
    measuring = run.tokens.held.tokens.size + READING_TOKENS
    affordable = int(SEARCH_SHARE * estimating / measuring) - 1  # the dense model is measured as well
    return min(wanted, affordable) if affordable >= 2 else 0


def dense_copy(run: Run, target: str, copy: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The dense model for one target to change. copy: of a model in memory. One in files is opened again."""
    if run.loaded.fresh is None:
        return copy(run.loaded.model)
    release(run.loaded.model)
    model: nn.Module = run.loaded.fresh()
    weights = offloaded(model)
    if weights is not None:
        weights.folder, weights.written = _changed_folder(run, target), run.loaded.dtype
    return model


def release(model: nn.Module) -> None:
    """Have no weights of a model in memory that are in files as well: it may outlive its last use."""
    weights = offloaded(model)
    if weights is not None:
        weights.release()


def forget_weights(model: nn.Module) -> None:
    """Give the memory of a model back that something else still holds; it keeps shapes, types and devices."""
    for parameter in model.parameters():
        parameter.data = placeholder(parameter.shape, parameter.dtype, parameter.device)


def forget_changed(run: Run, target: str) -> None:
    """Delete the blocks of a result that has been written."""
    shutil.rmtree(_changed_folder(run, target), ignore_errors=True)


def _changed_folder(run: Run, target: str) -> Path:
    return run.work.file(f"changed-{target}")


def open_result(run: Run, folder: Path) -> nn.Module:
    """Open a written result to compute in the run's type; its weights stay in the files if the dense ones did."""
    compute = next(run.loaded.model.parameters()).dtype
    if run.loaded.fresh is None:
        places = spread_over(run.loaded.model)
        opened: nn.Module = load(folder, device=str(run.device), dtype=compute, device_map=places)
    else:
        opened = load_offloaded(resolve_model(folder), find_blocks, device=run.device, dtype=compute)
    return opened
