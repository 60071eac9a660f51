"""One training in a process of its own, for benchmarks/recovery.py: its memory, time and perplexities as JSON."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

WIKITEXT2 = Path(__file__).resolve().parent / "data" / "wikitext2" / "test.jsonl.gz"
TASKS = ("arc_easy", "piqa")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The largest resident size of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.value, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.value = max(self.value, resident())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.value


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, quantise unless plain LoRA is asked for, train, merge; no teacher on either side."""
    import peft  # noqa: F401 - both sides start with the same imports
    import torch

    from saap.data.samples import leading_ids, token_stream
    from saap.data.texts import read_documents
    from saap.data.training import training_data
    from saap.discovery.blocks import find_blocks
    from saap.evaluation.perplexity import perplexity
    from saap.evaluation.zero_shot import evaluate_tasks
    from saap.models.loading.devices import rounded_products
    from saap.models.loading.pretrained import load_tokenizer
    from saap.models.loading.references import resolve_model
    from saap.models.walk.processes import Processes
    from saap.models.walk.walker import BlockWalker
    from saap.recovery.prepare import merge
    from saap.recovery.train import Report, Trainer
    from saap.settings.recover import RecoverConfig

    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    processes = Processes()
    resolved = resolve_model(options.model)
    tokenizer = load_tokenizer(resolved)
    data = training_data(options.data, tokenizer, length=options.length, held_out=1, seed=0)
    evaluation = token_stream(read_documents(WIKITEXT2), tokenizer)[: options.evaluation_tokens]
    config = RecoverConfig(
        tuning=options.kind, length=options.length, batch=options.batch, micro_batch=options.micro_batch,
        max_steps=options.steps, validate_every=options.steps, group_size=options.group_size, scales=options.scales,
        patience=0,
    )  # fmt: skip

    def of(model: Any) -> float | None:
        if len(evaluation) < 2:
            return None
        return perplexity(model, evaluation, batch=1, leading=leading_ids(tokenizer)).value

    imports, peak = resident(), Peak()
    model, handle, parameters, packed = prepared(resolved, config, cpu)
    most = peak.stop()
    quantised = None if handle is not None else of(model)
    peak = Peak()
    with rounded_products(cpu), tempfile.TemporaryDirectory() as folder:
        done = Trainer(
            BlockWalker(model, find_blocks(model)), parameters, data, config, folder=Path(folder), processes=processes,
            report=Report(step=lambda done, total: None, line=lambda text: None),
        ).run()  # fmt: skip
    most = max(most, peak.stop())
    ends = [point.seconds for point in done.points]
    steps = [later - earlier for earlier, later in pairwise(ends)]
    if handle is None:
        merge(model)
    else:
        model = handle.merge_and_unload()
    answered = {}
    if options.task_data is not None:
        answered = evaluate_tasks(model, tokenizer, TASKS, data=options.task_data, limit=options.questions)
    return {
        "peak_bytes": most - imports, "step_seconds": steps[:-1], "weight_bytes": packed,
        "trained_parameters": sum(value.numel() for value in parameters.values()),
        "perplexity_quantised": quantised, "perplexity": of(model),
        "tasks": {
            name: {"acc": one.acc, "acc_stderr": one.acc_stderr, "questions": one.questions}
            for name, one in answered.items()
        },
    }  # fmt: skip


def prepared(resolved: Any, config: Any, device: Any) -> tuple[Any, Any, Any, int]:
    """The model, the handle of plain LoRA or None, what is trained, and the bytes of the blocks' linear layers."""
    from saap.discovery.blocks import find_blocks
    from saap.models.checkpoint.groupwise import GroupwiseLinear
    from saap.models.checkpoint.groupwise_files import linears_inside
    from saap.models.loading.pretrained import load_groupwise, load_model
    from saap.recovery.prepare import adapt, add_lora
    from saap.recovery.quantise import quantise

    def paths(model: Any) -> Any:
        return linears_inside(model, find_blocks(model))

    if config.tuning == "lora":
        model = load_model(resolved, device=device)
        names = paths(model)
        size = sum(model.get_submodule(name).weight.nbytes for name in names)
        handle, parameters = add_lora(model, names, rank=config.rank, alpha=config.alpha, seed=0)
        return model, handle, parameters, size
    model = load_groupwise(
        resolved, paths, lambda path, read: quantise(read(), group_size=config.group_size, bits=config.bits),
        device=device,
    )  # fmt: skip
    size = sum(module.quantised.nbytes for module in model.modules() if isinstance(module, GroupwiseLinear))
    parameters = adapt(model, rank=config.rank, alpha=config.alpha, seed=0, scales=config.scales)
    return model, None, parameters, size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kind", choices=["groupwise", "lora"], default="groupwise")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--no-scales", dest="scales", action="store_false")
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="also answer questions, from these files")
    parser.add_argument("--questions", type=int, default=500)
    for flag, value in (
        ("steps", 6), ("batch", 1), ("micro-batch", 1), ("length", 512), ("threads", 2), ("group-size", 32),
        ("evaluation-tokens", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=value)
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
