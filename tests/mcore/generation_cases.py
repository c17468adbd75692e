"""What every layout samples: greedy and sampled, prompts of different lengths, stop tokens, small batches."""

import torch

from megatron_paint.rollouts.engine import GenerationRequest, SamplingParameters

STOP = 7
LENGTHS = (3, 11, 6, 3, 9, 1, 14)
SAMPLING = {
    "greedy": SamplingParameters(max_new_tokens=12, temperature=0.0, top_p=1.0, top_k=0, stop_ids=frozenset({STOP})),
    "plain": SamplingParameters(max_new_tokens=12, temperature=1.3, top_p=1.0, top_k=0, stop_ids=frozenset({STOP})),
    "nucleus": SamplingParameters(max_new_tokens=10, temperature=1.1, top_p=0.8, top_k=0, stop_ids=frozenset({STOP})),
    "top-k": SamplingParameters(max_new_tokens=10, temperature=1.1, top_p=0.95, top_k=5, stop_ids=frozenset({STOP})),
}
# By name: rows that are decoded together, and the tokens between two looks at which rows are finished.
BATCHES = {"64": (64, 1), "2": (2, 1), "64 seldom": (64, 5)}


def requests() -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(3)
    return [
        GenerationRequest(
            problem_id=str(i),
            sample_index=0,
            prompt_ids=tuple(torch.randint(8, 48, (n,), generator=generator).tolist()),
            key=1000 + i,
        )
        for i, n in enumerate(LENGTHS)
    ]
