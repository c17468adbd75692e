#!/bin/bash
# optuna 5.0.0: a study whose journal file ends in an incomplete line is lost two records later.
#
# A full disk or a power cut can leave half a record at the end of a journal. Optuna then reads all complete records. But
# its next record continues the half one on the same line, and after one more record every writer and reader raises
# JSONDecodeError: no trial of the study can be read any more. Who keeps a journal must cut such a line off first.
#
# Exits 0 as long as Optuna does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet optuna==5.0.0
cat > "$folder/probe.py" <<'PROBE'
import sys
from importlib.metadata import version
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

optuna.logging.set_verbosity(optuna.logging.ERROR)
journal = Path(sys.argv[1], "study.log")


def opened():
    backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
    return optuna.load_study(study_name="study", storage=JournalStorage(backend))


def readable(when):
    try:
        print(f"{when}: {len(opened().trials)} trials are read")
    except Exception as error:
        print(f"{when}: {type(error).__name__}")


print("optuna", version("optuna"))
backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
study = optuna.create_study(study_name="study", storage=JournalStorage(backend))
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
complete = journal.read_bytes()
last = complete.rstrip(b"\n").rpartition(b"\n")[2]
journal.write_bytes(complete + last[: len(last) // 2])
readable("half a record at the end")
study = opened()
study.set_user_attr("first", 1)
readable("one more record")
try:
    study.set_user_attr("second", 2)
except Exception as error:
    print("the next record:", type(error).__name__)
readable("from then on")
PROBE
"$folder/venv/bin/python" "$folder/probe.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
cat > "$folder/expected" <<'SEEN'
optuna 5.0.0
half a record at the end: 3 trials are read
one more record: 3 trials are read
the next record: JSONDecodeError
from then on: JSONDecodeError
SEEN
diff "$folder/expected" "$folder/seen"
