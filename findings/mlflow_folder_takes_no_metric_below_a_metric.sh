#!/bin/bash
# mlflow-skinny 3.17.2: in a local folder, a metric named `eval/avg` excludes one named `eval/avg/low`.
#
# MLflow allows slashes in names of metrics, and its page groups metrics by them. A tracking folder keeps each metric in a
# file of that name. So a value and the lower end of its interval below it cannot both be logged: the second call raises
# NotADirectoryError or IsADirectoryError, no MlflowException, and which one is lost depends on the order. An SQLite store
# takes both. Who logs to either must choose names of which none is a folder of another.
#
# Exits 0 as long as MLflow does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet mlflow-skinny==3.17.2 sqlalchemy alembic
cat > "$folder/probe.py" <<'PROBE'
import os
import sys
from importlib.metadata import version

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow.tracking import MlflowClient

folder = sys.argv[1]
NAMES = ("eval/avg", "eval/avg/low")


def log(uri, names):
    client = MlflowClient(tracking_uri=uri)
    run = client.create_run(client.create_experiment("/".join(names[::-1])))
    found = []
    for name in names:
        try:
            client.log_metric(run.info.run_id, name, 0.5, step=1)
            found.append("logged")
        except Exception as error:
            found.append(f"raises {type(error).__name__}")
    return ", ".join(f"{name} {what}" for name, what in zip(names, found, strict=True))


print("mlflow-skinny", version("mlflow-skinny"))
print("folder:", log(f"file://{folder}/runs", NAMES))
print("folder:", log(f"file://{folder}/runs", NAMES[::-1]))
print("sqlite:", log(f"sqlite:///{folder}/runs.db", NAMES))
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || tail -20 "$folder/errors"
cat > "$folder/expected" <<'SEEN'
mlflow-skinny 3.17.2
folder: eval/avg logged, eval/avg/low raises NotADirectoryError
folder: eval/avg/low logged, eval/avg raises IsADirectoryError
sqlite: eval/avg logged, eval/avg/low logged
SEEN
diff "$folder/expected" "$folder/seen"
