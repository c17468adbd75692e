"""The engine `old` of rollout.py: it samples with an older checkout, which PYTHONPATH names.

The checkout has the interface of commit 868de36. The first line of standard input describes the work. Each further line
asks for one round. Each line is answered by one line of JSON.
"""

import json
import sys
import time

import torch

from megatron_paint.config import DataSettings, MegatronSettings, ModelSettings, RolloutSettings, RunSettings, Settings
from megatron_paint.mcore.world import start_world
from megatron_paint.policy import GenerationRequest, SamplingParameters
from megatron_paint.qwen3 import read_shape

NEVER = 151_935


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    work = json.loads(sys.stdin.readline())
    settings = Settings(
        model=ModelSettings(hf_path=work["model"], dtype="float32"),
        data=DataSettings(train="none"),
        run=RunSettings(dir="none"),
        rollout=RolloutSettings(batch_size=len(work["prompts"])),
        megatron=MegatronSettings(use_distributed_optimizer=False),
    )
    world = start_world(settings.megatron)
    from megatron_paint.mcore.policy import MegatronPolicy

    torch.set_num_threads(work["threads"])
    policy = MegatronPolicy(settings, read_shape(work["model"]), world, trained=False)
    sampling = SamplingParameters(
        max_new_tokens=work["tokens"],
        temperature=work["temperature"],
        top_p=work["top_p"],
        top_k=work["top_k"],
        stop_ids=frozenset({NEVER}),
    )
    requests = [
        GenerationRequest(problem_id=str(i), sample_index=0, prompt_ids=tuple(prompt), key=i)
        for i, prompt in enumerate(work["prompts"])
    ]
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        responses = [list(rollout.response_ids) for rollout in policy.generate(requests, sampling)]
        found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        print(json.dumps(found | {"responses": responses}), file=answers, flush=True)


if __name__ == "__main__":
    main()
