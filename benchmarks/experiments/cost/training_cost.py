"""Cost of a step of `saap recover` and of TRL's trainer on the same batch: time, and memory above the imports."""

import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import in_own_process
from lab.memory import Peak

import saap
from saap.data.training import training_data
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import resolve_model
from saap.pipeline.shared.stages import MEASURE_BEFORE, MERGE

OURS, THEIRS = "saap", "TRL"
COMPARED = {"full": "full", "lora": "lora", "groupwise": "lora"}
"""Our tuning, and TRL's that it is compared with: it has no group-wise one."""
CELLS = [*(f"{OURS}/{tuning}" for tuning in COMPARED), *(f"{THEIRS}/{one}" for one in dict.fromkeys(COMPARED.values()))]
RANK = 16
SMOKE = False
SETTINGS = {
    "model": "{model}", "length": Scaled(64, 512), "sequences a step": 1, "steps": Scaled(4, 8), "rounds": Scaled(1, 3),
    "rank of adapters": RANK,
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    """Each round in a process of its own on one thread; medians over the rounds and their steps."""
    chosen = request.settings
    for cell in wanted:
        trainer, _, tuning = cell.partition("/")
        run = of_saap if trainer == OURS else of_trl
        rounds = [in_own_process(run, chosen, tuning) for _ in range(chosen["rounds"])]
        seconds = statistics.median(value for one in rounds for value in one["step_seconds"])
        yield cell, {"seconds_a_step": seconds, "peak_bytes": statistics.median(one["peak_bytes"] for one in rounds)}


def of_saap(chosen: Values, tuning: str) -> Values:
    torch.set_num_threads(1)
    adapters = {} if tuning == "full" else {"rank": RANK, "alpha": RANK}
    return train(
        chosen["model"], chosen["length"], chosen["steps"], tuning=tuning, gradient_checkpointing=True,
        batch_size=chosen["sequences a step"], **adapters,
    )[1]  # fmt: skip


def train(model: str, length: int, steps: int, **chosen: Any) -> tuple[saap.RecoverResult, Values]:
    """One tuning without a teacher, its additional peak memory, and the seconds of its steps but the first and last."""
    fixed: dict[str, Any] = {"validation_samples": 1, "patience": 0, "distillation": 0.0, "device": "cpu"}
    with Peak() as peak:
        done = saap.recover(
            model, max_seq_length=length, **{"validate_every": steps, "max_steps": steps, **fixed, **chosen}
        )
    stages = [stage for stage in done.report.stages if stage.name not in (MEASURE_BEFORE.title, MERGE.title)]
    return done, {
        "peak_bytes": max(stage.peak_resident_bytes for stage in stages) - peak.before,
        "step_seconds": [later.seconds - earlier.seconds for earlier, later in pairwise(done.training.points)][:-1],
    }  # fmt: skip


def of_trl(chosen: Values, tuning: str) -> Values:
    """SFTTrainer on the same text, with its defaults: AdamW, bfloat16 products, activations recomputed."""
    from datasets import Dataset  # what no other experiment needs
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *given: Any, **others: Any) -> None:
            ends.append(time.perf_counter())

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(resolve_model(chosen["model"]))
    examples = training_data(["mixed"], tokenizer, length=chosen["length"], held_out=1, seed=0).train
    rows = Dataset.from_list([{"input_ids": one.tokens.tolist()} for one in examples])
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with Peak() as peak, tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=saap.load(chosen["model"], device="cpu", dtype=torch.float32), train_dataset=rows,
            processing_class=tokenizer, callbacks=[Clock()], peft_config=adapters if tuning == "lora" else None,
            args=SFTConfig(
                output_dir=folder, max_steps=chosen["steps"], max_length=chosen["length"], use_cpu=True, report_to=[],
                per_device_train_batch_size=chosen["sequences a step"], save_strategy="no", disable_tqdm=True,
            ),
        )  # fmt: skip
        trainer.train()
    steps = [later - earlier for earlier, later in pairwise(ends)]
    return {"peak_bytes": peak.bytes - peak.before, "step_seconds": steps[:-1]}


def summarise(cells: Cells) -> Values:
    rows = []
    for tuning, other in COMPARED.items():
        ours, theirs = cells[f"{OURS}/{tuning}"], cells[f"{THEIRS}/{other}"]
        ratios = {name: ours[name] / theirs[name] for name in ("seconds_a_step", "peak_bytes")}
        rows.append({"tuning": tuning, "other": other, "ours": ours, "theirs": theirs, "ratios": ratios})
    return {"rows": rows, "of": {row["tuning"]: row["ratios"] for row in rows}}
