"""Tables and a plot of the figures of benchmarks/loss.py. A row is a dictionary of a job's settings and its figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PEERS = ("dense", "modelopt", "swift", "liger")
# With a larger relative error of the gradient, the variant computes another loss.
EXACT = 1e-2


def fill_fits(rows: list[dict], found: list[dict]) -> list[dict]:
    """Returns the rows, and a linear fit of the memory of peers that were not run at this size."""
    present = {row["variant"] for row in rows}
    base = next((row for row in rows if "wall_s" in row), None)
    filled = list(rows)
    for variant in PEERS if base is not None and base["tokens"] > 2048 else ():
        same = ("tp", "hidden", "dtype", "device", "frozen")
        smaller = [r for r in found if r["variant"] == variant and "peak" in r and all(r[k] == base[k] for k in same)]
        if variant in present or len({row["tokens"] for row in smaller}) < 2:
            continue
        slope, start = np.polyfit([row["tokens"] for row in smaller], [row["peak"] for row in smaller], 1)
        filled.append(base | {"variant": variant, "fit": True, "peak": slope * base["tokens"] + start})
    return filled


def print_table(rows: list[dict]) -> None:
    """Prints the Markdown table of one size, with ratios to the bare products and to the fastest exact peer."""
    measured = [row for row in rows if "wall_s" in row and not row.get("fit")]
    if measured:
        first = measured[0]
        basis = "cpu_s" if first["device"] == "cpu" else "wall_s"
        gemms = next((row[basis] for row in measured if row["variant"] == "gemms"), None)
        exact = [row for row in measured if row["variant"] in PEERS and row["gradient_error"] < EXACT]
        fastest = min((row[basis] for row in exact), default=None)
        thing = "frozen weight" if first["frozen"] else "with dW"
        print(f"\nN = {first['tokens']:,}, H = {first['hidden']:,}, TP {first['tp']}, {first['dtype']}, {thing}\n")
        print("| variant | wall s | CPU s | / products | / fastest exact peer | extra GB | bytes a token | error |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        name = row["variant"] if row["chunk_bytes"] == 1e9 else f"{row['variant']}, chunk {row['chunk_bytes']:.2g} B"
        if "missing" in row:
            print(f"(left out: {name}: {row['missing']})" if not measured else f"| {name} | {row['missing']} |||||||")
        elif row.get("fit"):
            print(f"| {name} | - | - | - | - | {row['peak'] / 1e9:.2f} (linear fit) | - | - |")
        else:
            print(
                f"| {name} | {row['wall_s']:.3f} | {row['cpu_s']:.3f} | {_ratio(row[basis], gemms)} "
                f"| {_ratio(row[basis], fastest)} | {row['peak'] / 1e9:.2f} | {row['bytes_per_token']:.0f} "
                f"| {row['gradient_error']:.1e} |"
            )


def plot(found: list[dict], path: Path) -> None:
    """Draws relative time and peak memory against tokens, one line a variant, at the largest measured rank count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [row for row in found if "wall_s" in row and row["chunk_bytes"] == 1e9]
    first = max(found, key=lambda row: (row["tp"], row["hidden"]))
    found = [row for row in found if all(row[key] == first[key] for key in ("tp", "hidden", "frozen"))]
    basis = "cpu_s" if first["device"] == "cpu" else "wall_s"
    gemms = {row["tokens"]: row[basis] for row in found if row["variant"] == "gemms"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for variant in dict.fromkeys(row["variant"] for row in found if row["variant"] != "gemms"):
        rows = sorted((row for row in found if row["variant"] == variant), key=lambda row: row["tokens"])
        rows = [row for row in rows if row["tokens"] in gemms]
        ours = variant in ("fused", "triton")
        style = {"marker": "o", "linewidth": 2.5 if ours else 1.2, "linestyle": "-" if ours else "--", "label": variant}
        tokens = [row["tokens"] for row in rows]
        left.plot(tokens, [row[basis] / gemms[row["tokens"]] for row in rows], **style)
        right.plot(tokens, [row["peak"] / 1e9 for row in rows], **style)
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set(xlabel="response tokens", ylabel="time / bare products", xscale="log", ylim=(0, None))
    right.set(xlabel="response tokens", ylabel="extra memory a rank, GB", xscale="log", yscale="log")
    for axes in (left, right):
        axes.set_xticks(sorted(gemms), [f"{tokens:,}" for tokens in sorted(gemms)])
        axes.minorticks_off()
    right.set_yticks(*zip(*[(10.0**e, f"{10.0**e:g}") for e in range(-1, 3)], strict=True))
    left.legend()
    figure.suptitle(
        f"V = {first['vocab']:,}, H = {first['hidden']:,}, TP {first['tp']}, {first['dtype']}, {first['device']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}" if base else "-"
