#!/bin/bash
# torch 2.13.0: `export_chrome_trace` returns without an error if the file system refuses the file.
#
# Here a limit on the size of files refuses it, as a full disk or a quota would. The call returns None. The path does not
# exist afterwards; `path.tmp` has the beginning of the trace. With a path that ends in .gz it leaves a valid, empty gzip
# file. Look at the file after the call.
#
# Exits 0 as long as torch does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat > "$folder/probe.py" <<'PROBE'
import gzip
import os
import resource
import sys

import torch
from torch.profiler import ProfilerActivity, profile

folder, names, profiles = sys.argv[1], ("trace.json", "trace.json.gz"), []
for _ in names:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(200):
            torch.ones(10).sum()
    profiles.append(profiled)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
print("torch", torch.__version__.split("+")[0])
for name, profiled in zip(names, profiles):
    path = os.path.join(folder, name)
    print(name, "returned", profiled.export_chrome_trace(path), "exists", os.path.exists(path), flush=True)
    if name.endswith(".gz"):
        print("content", gzip.open(path).read())
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
cat > "$folder/expected" <<'SEEN'
torch 2.13.0
trace.json returned None exists False
trace.json.gz returned None exists True
content b''
SEEN
diff "$folder/expected" "$folder/seen"
