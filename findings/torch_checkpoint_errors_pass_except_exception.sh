#!/bin/bash
# torch 2.13.0: an error of torch.distributed.checkpoint passes every `except Exception`.
#
# dcp.load raises CheckpointException if a tensor has another shape than the checkpoint, or if the checkpoint does not
# have it. CheckpointException derives from BaseException, as KeyboardInterrupt does. So a loader that turns errors into
# messages with `except Exception` ends in a traceback. The reason is not an argument of the error either: it is in the
# dictionary `failures`, one entry per rank.
#
# Exits 0 as long as torch does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/probe.py" <<'PROBE'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.filterwarnings("ignore")
print("torch", torch.__version__)
dcp.save({"weight": torch.zeros(4)}, checkpoint_id=sys.argv[1], no_dist=True)
for wanted in ({"weight": torch.zeros(5)}, {"bias": torch.zeros(4)}):
    try:
        dcp.load(wanted, checkpoint_id=sys.argv[1], no_dist=True)
    except Exception as error:
        sys.exit(f"`except Exception` catches {type(error).__name__} now")
    except BaseException as error:
        reason, _ = error.failures[0]
        print(f"{type(error).__name__} is {type(error).__bases__[0].__name__}, failures[0]: {reason!r}")
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder/checkpoint" | tee "$folder/seen"
# Seen:
#   torch 2.13.0+cpu
#   CheckpointException is BaseException, failures[0]: ValueError('Size mismatch between saved torch.Size([4]) and current: torch.Size([5]) for weight')
#   CheckpointException is BaseException, failures[0]: RuntimeError('Missing key in checkpoint state_dict: bias.')
test "$(grep -c '^CheckpointException is BaseException' "$folder/seen")" = 2
