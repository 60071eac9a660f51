"""Tools for training open the folder as they open any model with code of its own, where saap is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.export.gguf_models import EMPTY, adaptive_folder
from transformers import AutoTokenizer

from saap.models.loading.pretrained import load

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 120, 64]])
START = """
import sys
sys.modules["saap"] = None  # not installed where these tools run
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
trusted = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
config = AutoConfig.from_pretrained(folder, **trusted)
model = AutoModelForCausalLM.from_pretrained(folder, config=config, **trusted)
"""
# The order of LLaMA-Factory: train an adapter, keep it, then put it into the reopened model and export that.
ADAPTER = """
from peft import LoraConfig, PeftModel, get_peft_model
adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
batch = tokenizer(["Once upon a time"], return_tensors="pt").input_ids
for _ in range(2):  # B starts at zero, so the first step changes nothing of A
    adapted(batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
adapted.save_pretrained(out + "/adapter")
base = AutoModelForCausalLM.from_pretrained(folder, **trusted)
merged = PeftModel.from_pretrained(base, out + "/adapter").merge_and_unload()
merged.save_pretrained(out + "/whole")
tokenizer.save_pretrained(out + "/whole")
"""
SUPERVISED = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
rows = Dataset.from_list([{"text": "Once upon a time there was a fox."}] * 4)
settings = SFTConfig(
    output_dir=out + "/steps", max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
    use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False,
)
trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model(out + "/whole")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = {0: tuple(range(0, 80, 2)), 2: EMPTY}
    return adaptive_folder(tmp_path_factory.mktemp("model"), "llama", ffn=kept, attention={1: (0, 2)})


@pytest.mark.parametrize(
    "tool",
    [
        "peft",
        pytest.param("trl", marks=pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not here")),
    ],
)
def test_the_trained_model_is_a_folder_that_opens_again(tool: str, folder: Path, tmp_path: Path) -> None:
    code = START + {"peft": ADAPTER, "trl": SUPERVISED}[tool]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = load(folder, device="cpu"), load(tmp_path / "whole", device="cpu")
    with torch.no_grad():
        one, two = (model(IDS, use_cache=False).logits for model in (before, after))
    assert torch.isfinite(two).all()
    assert not torch.allclose(one, two)
    shapes = [{name: tuple(value.shape) for name, value in model.named_parameters()} for model in (before, after)]
    assert shapes[0] == shapes[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole", trust_remote_code=False)
    assert tokenizer("Once")["input_ids"] == AutoTokenizer.from_pretrained(folder)("Once")["input_ids"]
