#!/bin/bash
# transformers 5.24.0: a config.json with both `rope_parameters` and `rope_scaling` gets rope_theta 10000.
#
# transformers 5 writes the base of the rotary embedding into `rope_parameters`; transformers 4 wrote `rope_theta` and
# `rope_scaling`. A file that passed through both can have `rope_parameters` with its own rope_theta and a `rope_scaling`.
# Then `rope_scaling` replaces `rope_parameters`, and the base becomes the default 10000, without a warning. The model
# computes other attention than the one that was trained. `rope_scaling: null` has no such effect.
#
# Exits 0 as long as transformers does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.24.0
cat > "$folder/probe.py" <<'PROBE'
import json
import sys
from pathlib import Path

import transformers

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
BASE = {"rope_type": "default", "rope_theta": 1000000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def theta(**keys) -> float:
    Path(sys.argv[1], "config.json").write_text(json.dumps(SHAPE | keys))
    return transformers.AutoConfig.from_pretrained(sys.argv[1]).rope_parameters["rope_theta"]


print("transformers", transformers.__version__)
print("rope_parameters alone:", theta(rope_parameters=BASE))
print("beside rope_scaling null:", theta(rope_parameters=BASE, rope_scaling=None))
print("beside rope_scaling default:", theta(rope_parameters=BASE, rope_scaling={"rope_type": "default"}))
print("beside rope_scaling yarn:", theta(rope_parameters=BASE, rope_scaling=YARN))
print("rope_theta beside rope_scaling yarn:", theta(rope_theta=1000000.0, rope_scaling=YARN))
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/warnings" | tee "$folder/seen"
cat > "$folder/expected" <<'SEEN'
transformers 5.24.0
rope_parameters alone: 1000000.0
beside rope_scaling null: 1000000.0
beside rope_scaling default: 10000.0
beside rope_scaling yarn: 10000.0
rope_theta beside rope_scaling yarn: 1000000.0
SEEN
diff "$folder/expected" "$folder/seen"
! grep -i "theta" "$folder/warnings"
