"""One group-wise or plain LoRA training, for a process of its own: its memory, time and perplexities."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - both kinds start with the same imports
import torch

from lab.memory import Peak
from lab.texts import TEXTS
from saap.data.samples import leading_ids, token_stream
from saap.data.texts import read_documents
from saap.data.training import training_data
from saap.discovery.blocks import find_blocks
from saap.evaluation.perplexity import perplexity
from saap.evaluation.zero_shot import evaluate_tasks
from saap.models.checkpoint.groupwise import GroupwiseLinear, linears_inside
from saap.models.loading.devices import rounded_products
from saap.models.loading.pretrained import load_groupwise, load_model, load_tokenizer
from saap.models.loading.references import resolve_model
from saap.models.walk.processes import Processes
from saap.models.walk.walker import BlockWalker
from saap.recovery.adapter import adapt, add_lora, merge
from saap.recovery.quantise import quantise
from saap.recovery.train import Report, Trainer
from saap.settings.recover import RecoverConfig, Tuning

TASKS = ("arc_easy", "piqa")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained and how. plain: LoRA on the weights as they are. tasks: folder of task files, or none."""

    model: str
    plain: bool
    steps: int
    length: int
    group_size: int = 32
    scales: bool = True
    threads: int = 2
    evaluation_tokens: int = 0
    tasks: str | None = None
    questions: int = 500

    @property
    def config(self) -> RecoverConfig:
        """The settings of `saap recover`."""
        return RecoverConfig(
            tuning=Tuning.LORA if self.plain else Tuning.GROUPWISE, length=self.length, batch=1, micro_batch=1,
            max_steps=self.steps, validate_every=self.steps, group_size=self.group_size, scales=self.scales,
            patience=0,
        )  # fmt: skip


def train(of: Training) -> dict[str, Any]:
    """Load, quantise unless plain LoRA is trained, train, merge; no teacher on either side."""
    torch.set_num_threads(of.threads)
    resolved = resolve_model(of.model)
    tokenizer = load_tokenizer(resolved)
    data = training_data(["mixed"], tokenizer, length=of.length, held_out=1, seed=0)
    text = token_stream(read_documents(TEXTS["wikitext2"]), tokenizer)[: of.evaluation_tokens]

    def measured(model: Any) -> float | None:
        return perplexity(model, text, batch=1, leading=leading_ids(tokenizer)).value if len(text) > 1 else None

    with Peak() as loading:
        model, handle, parameters, packed = prepared(resolved, of.config)
    quantised = None if of.plain else measured(model)
    with Peak() as training, rounded_products(CPU), tempfile.TemporaryDirectory() as folder:
        done = Trainer(
            BlockWalker(model, find_blocks(model)), parameters, data, of.config, folder=Path(folder),
            processes=Processes(), report=Report(step=lambda done, total: None, line=lambda text: None),
        ).run()  # fmt: skip
    steps = [later - earlier for earlier, later in pairwise(point.seconds for point in done.points)]
    if of.plain:
        model = handle.merge_and_unload()
    else:
        merge(model)
    answered = evaluate_tasks(model, tokenizer, TASKS, data=Path(of.tasks), limit=of.questions) if of.tasks else {}
    return {
        "peak_bytes": max(loading.bytes, training.bytes) - loading.before,
        "step_seconds": steps[:-1],
        "weight_bytes": packed,
        "trained_parameters": sum(value.numel() for value in parameters.values()),
        "perplexity_quantised": quantised,
        "perplexity": measured(model),
        "tasks": {name: {"acc": one.acc, "acc_stderr": one.acc_stderr} for name, one in answered.items()},
    }


def prepared(resolved: Any, config: RecoverConfig) -> tuple[Any, Any, Any, int]:
    """The model, the handle of plain LoRA or None, what is trained, and the bytes of the blocks' linear layers."""

    def paths(model: Any) -> Any:
        return linears_inside(model, find_blocks(model))

    if config.tuning == "lora":
        model = load_model(resolved, device=CPU)
        names = paths(model)
        size = sum(model.get_submodule(name).weight.nbytes for name in names)
        handle, parameters = add_lora(model, names, rank=config.rank, alpha=config.alpha, seed=0)
        return model, handle, parameters, size
    model = load_groupwise(
        resolved, paths, lambda path, read: quantise(read(), group_size=config.group_size, bits=config.bits),
        device=CPU,
    )  # fmt: skip
    size = sum(module.quantised.nbytes for module in model.modules() if isinstance(module, GroupwiseLinear))
    parameters = adapt(model, rank=config.rank, alpha=config.alpha, seed=0, scales=config.scales)
    return model, None, parameters, size
