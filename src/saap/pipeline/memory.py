"""Keeping a run under a limit of memory: whether the weights must stay in their files, and what then is left out.

The figures are estimates from sizes alone, made before any weight is read. They are meant to be a little too large.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.config import Method, PrunableRole, PruneConfig
from saap.discovery.blocks import find_blocks
from saap.errors import ConfigurationError
from saap.estimation.calibrate import TOKENS_AT_ONCE
from saap.evaluation.perplexity import LOGITS_BYTES
from saap.export.placing import check_place
from saap.models.devices import pick_device, pick_dtype, spread_over, working_dtype
from saap.models.loading import load, load_offloaded, load_tokenizer, model_ref, open_skeleton
from saap.models.offload import offloaded
from saap.models.references import ResolvedModel, resolve_model
from saap.models.spill import Spill
from saap.pipeline.context import Run
from saap.pipeline.inputs import LoadedModel, RunOptions, open_model
from saap.pipeline.targets import Target

RESERVE_BYTES = 500 * 10**6
"""What the process takes without a model once all libraries are loaded, beyond what it takes at the beginning."""
SEARCH_SHARE = 0.2
READING_TOKENS = 256
"""Reading a block takes about as long as passing so many tokens through it."""
WINDOW_TOKENS = 2048
"""Tokens of a batch of windows of a measured text, and of one of the sequences of a restoration."""
DISK_SPARE = 1.05


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights in memory, and lengths. block: of the largest. around: of the modules outside the blocks.

    matrix: bytes of the largest matrix of a block. widest: its longer side. width: of the residual stream.
    vocabulary: 0 where the configuration does not say.
    """

    weights: int
    block: int
    around: int
    matrix: int
    widest: int
    width: int
    blocks: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Sizes of a model, whose weights need no values."""
        blocks = find_blocks(model)
        inside = [list(model.get_submodule(path).parameters()) for path in blocks]
        matrices = [parameter for block in inside for parameter in block if parameter.dim() > 1]
        largest = max(matrices, key=torch.Tensor.numel)
        weights = sum(_size(parameter) for parameter in model.parameters())
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
        return cls(
            weights=weights,
            block=max(sum(map(_size, block)) for block in inside),
            around=weights - sum(sum(map(_size, block)) for block in inside),
            matrix=_size(largest),
            widest=max(largest.shape),
            width=min(largest.shape[-2:]),
            blocks=len(blocks),
            vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
        )


def _size(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def resident_need(sizes: Sizes, config: PruneConfig) -> int:
    """Bytes of memory that a run takes, beyond the empty process, whose weights are all in memory."""
    results = 2 if len(config.pruning_ratios) > 1 or config.target_speedup is not None else 1
    reading = sizes.blocks * TOKENS_AT_ONCE * sizes.width * 4
    restoring = 0
    if config.restore:
        settings = config.effort_settings
        tokens = settings.refit_sequences * settings.refit_length
        restoring = 4 * tokens * (16 * sizes.width + 2 * sizes.widest) + _solving(sizes)
    # A result is read from its file, whose pages count as well, into memory of its own.
    measuring = _passing(sizes, WINDOW_TOKENS) + _logits(sizes) + sizes.weights // 2
    return results * sizes.weights + max(_scoring(sizes, config) + reading, restoring, measuring)


def offloaded_need(sizes: Sizes, config: PruneConfig) -> int:
    """Bytes of memory that a run takes, beyond the empty process, with at most one block in memory."""
    restoring = 0
    if config.restore:
        restoring = _passing(sizes, WINDOW_TOKENS) + _solving(sizes)
    in_block = sizes.block + max(_scoring(sizes, config), restoring, _passing(sizes, WINDOW_TOKENS))
    return max(in_block, sizes.around + _logits(sizes))


def _passing(sizes: Sizes, tokens: int) -> int:
    """Activations of one block."""
    return 4 * tokens * (12 * sizes.width + 4 * sizes.widest)


def _logits(sizes: Sizes) -> int:
    """Logits of the windows that are measured at once, and what is made of them."""
    one = 4 * WINDOW_TOKENS // 4 * sizes.vocabulary
    return 3 * max(one, min(4 * one, LOGITS_BYTES))


def _scoring(sizes: Sizes, config: PruneConfig) -> int:
    """Activations under autograd, two matrices for the gradient of a weight, and some tokens' logits."""
    return _passing(sizes, max(TOKENS_AT_ONCE, config.sample_length)) + 3 * sizes.matrix


def _solving(sizes: Sizes) -> int:
    """Gram matrices of what a consumer reads, their factors in double precision, and what it should give."""
    return 36 * sizes.widest**2 + 28 * sizes.widest * sizes.width


def open_within(
    source: str | Path | nn.Module, config: PruneConfig, options: RunOptions, tokenizer: Any
) -> LoadedModel:
    """As `open_model`; with `options.max_memory` the weights stay in their files if they would not fit.

    Raises ConfigurationError if the limit is too small for the model, or for what `config` asks.
    """
    if options.max_memory is None:
        return open_model(source, options, tokenizer)
    if isinstance(source, nn.Module):
        raise ConfigurationError(
            "--max-memory cannot hold for a model that is in memory already", "Give the folder that it came from"
        )
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    device = pick_device(options.device)
    dtype = working_dtype(device, resolved.dtype)
    least, whole = limits(resolved, config, dtype)
    if whole <= options.max_memory:
        return open_model(source, options, tokenizer)
    if least > options.max_memory:
        raise ConfigurationError(_too_small(options.max_memory, least, config), f"Use --max-memory {_gigabytes(least)}")
    _check_possible(config, options.max_memory, whole)
    return _open_offloaded(resolved, options, tokenizer, device, dtype)


def limits(resolved: ResolvedModel, config: PruneConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of memory that a run needs at least, and from which on all weights can be in memory.

    dtype: to compute in. Raises ModelError if the files cannot be read part by part.
    """
    sizes = Sizes.of(open_skeleton(resolved, dtype)[0])
    empty = _process_bytes() + RESERVE_BYTES
    return empty + offloaded_need(sizes, config), empty + resident_need(sizes, config)


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


def _too_small(limit: int, least: int, config: PruneConfig) -> str:
    also = ", or less with --no-restore" if config.restore else ""
    return f"--max-memory {_gigabytes(limit)} is too small for this model, which needs {_gigabytes(least)}{also}"


def _check_possible(config: PruneConfig, limit: int, whole: int) -> None:
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
                f"{name} needs the whole model in memory, for which --max-memory {_gigabytes(limit)} is too small",
                f"Leave it out, or use --max-memory {_gigabytes(whole)}",
            )


def refuse_offloaded(loaded: LoadedModel, what: str) -> None:
    """Raise ConfigurationError if the weights stay in their files, with which `what` cannot be done."""
    if loaded.fresh is not None:
        raise ConfigurationError(
            f"{what} tries the stages with all weights in memory, for which --max-memory is too small",
            f"Leave out {what}; a limit that is too small for the run itself is refused at once",
        )


def _gigabytes(count: int) -> str:
    """Rounded up, as the flag takes it."""
    return f"{-(-count // 10**8) / 10:g}GB"


def _process_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def check_disk(run: Run, targets: Sequence[Target]) -> None:
    """Raise OutputError if the disk cannot hold the results, the changed blocks and the spilled activations."""
    if run.loaded.fresh is None or run.options.out is None:
        return
    itemsize, sizes = run.loaded.dtype.itemsize, Sizes.of(run.loaded.model)
    left = [run.graph.parameters - (target.budget.removal if target.budget is not None else 0) for target in targets]
    settings = run.config.effort_settings
    spilled = 4 * run.tokens.scored.tokens.size * sizes.width * (sizes.blocks + 2)
    if run.config.restore:
        refit = settings.refit_sequences * settings.refit_length
        spilled = max(spilled, 4 * refit * (16 * sizes.width + 2 * sizes.widest))
    check_place(run.options.out, int(DISK_SPARE * (sum(left) + max(left)) * itemsize) + spilled)


def spill_of(run: Run) -> Spill | None:
    """Where a run keeps activations: in its work folder if the weights are in their files, else in memory."""
    return Spill(run.work.file("spill")) if offloaded(run.loaded.model) is not None else None


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
