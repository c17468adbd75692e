"""The engine `offline` of transfer.py: vLLM's own `LLM.generate`, in the environment of vLLM.

The first line of standard input describes the work. Each further line asks for one round. Each line is answered by one
line of JSON.
"""

import json
import os
import sys
import time


def main() -> None:
    # vLLM and its worker print to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = json.loads(sys.stdin.readline())
    from vllm import LLM, SamplingParams

    llm = LLM(
        work["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=True,
        enable_chunked_prefill=False,
        logprobs_mode="raw_logprobs",
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
    sampling = [
        SamplingParams(
            max_tokens=work["tokens"], temperature=1.0, seed=seed, ignore_eos=True, detokenize=False, logprobs=0
        )
        for seed in range(len(prompts))
    ]
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "responses": responses}), file=answers, flush=True)


if __name__ == "__main__":
    main()
