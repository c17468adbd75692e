#!/bin/bash
# pygments 2.21.0: the Kotlin lexer makes one token of each digit of a whole number.
#
# `val x = 1234` has the number tokens 1, 2, 3 and 4, where the lexers of Java and Python have 1234. Whoever compares
# numbers by tokens finds 12 in 21. Adjoining number tokens have to be joined.
#
# Exits 0 as long as pygments does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pygments==2.21.0
cat > "$folder/probe.py" <<'PROBE'
from importlib.metadata import version

from pygments import lex
from pygments.lexers import get_lexer_by_name
from pygments.token import Number

print("pygments", version("pygments"))
for name, line in (("kotlin", "val x = 1234"), ("java", "int x = 1234;"), ("python", "x = 1234")):
    print(name, [text for kind, text in lex(line, get_lexer_by_name(name)) if kind in Number])
PROBE
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/seen"
cat > "$folder/expected" <<'SEEN'
pygments 2.21.0
kotlin ['1', '2', '3', '4']
java ['1234']
python ['1234']
SEEN
diff "$folder/expected" "$folder/seen"
