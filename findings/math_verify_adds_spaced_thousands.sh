#!/bin/bash
# math-verify 0.9.0: a thin space between digits becomes a sum, and bases and repeating digits are dropped.
#
# * `12\,345` is how LaTeX separates thousands. It becomes 12 + 345 = 357. So it is wrong beside 12345 and right beside
#   357. `12,345` and `12{,}345` are 12345.
# * The base of a number is dropped: 10110 in base 2 is right beside 10110 in base 3.
# * `0.\overline{36}` becomes 0: it is wrong beside 4/11 and right beside 0.
#
# Exits 0 as long as math-verify does so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
cat > "$folder/probe.py" <<'PROBE'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"))
for text in (r"$12\,345$", r"$12,345$", r"$12{,}345$", r"$0.\overline{36}$"):
    print(text, "becomes", parse(text)[0])
for gold, answer in (
    (r"$12345$", r"$12\,345$"),
    (r"$357$", r"$12\,345$"),
    (r"$10110_2$", r"$10110_3$"),
    (r"$\frac{4}{11}$", r"$0.\overline{36}$"),
    (r"$0$", r"$0.\overline{36}$"),
):
    print("gold", gold, "answer", answer, verify(parse(gold), parse(answer)))
PROBE
"$folder/venv/bin/python" "$folder/probe.py" | tee "$folder/seen"
cat > "$folder/expected" <<'SEEN'
math-verify 0.9.0
$12\,345$ becomes 357
$12,345$ becomes 12345
$12{,}345$ becomes 12345
$0.\overline{36}$ becomes 0
gold $12345$ answer $12\,345$ False
gold $357$ answer $12\,345$ True
gold $10110_2$ answer $10110_3$ True
gold $\frac{4}{11}$ answer $0.\overline{36}$ False
gold $0$ answer $0.\overline{36}$ True
SEEN
diff "$folder/expected" "$folder/seen"
