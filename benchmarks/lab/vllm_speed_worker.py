"""A model in vLLM that is timed on request; started by the Python of vLLM's environment, which has no saap.

Arguments: folder, model implementation, prompt tokens. Prints `@ready`, then for each line "SEQUENCES TOKENS" the
seconds in which vLLM writes so many tokens for so many prompts at once.
"""

import sys
import time

import vllm


def main() -> None:
    folder, implementation, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = vllm.LLM(
        model=folder, model_impl=implementation, trust_remote_code=True, dtype="float32", max_model_len=512,
        max_num_seqs=64, skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    print("@ready", flush=True)
    for line in sys.stdin:
        sequences, tokens = map(int, line.split())
        settings = vllm.SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        prompts = [{"prompt_token_ids": list(range(10 + one, 10 + one + length))} for one in range(sequences)]
        start = time.perf_counter()
        model.generate(prompts, settings, use_tqdm=False)
        print(f"@took {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    main()
