"""The log-probabilities that PEFT's model gives to response tokens."""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from megatron_paint.policy import ScoredSequence


def peft_logprobs(base: PreTrainedModel, adapter: Path, sequences: Iterable[ScoredSequence]) -> list[list[float]]:
    """By sequence and response token."""
    model, found = PeftModel.from_pretrained(base, adapter).eval(), []
    for sequence in sequences:
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(sequence.response_ids)[:, None])[:, 0].tolist())
    return found
