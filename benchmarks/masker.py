"""Measures the overlap masker: pairs a second on one core, growth with the text length, and the gain of a pool.

    python benchmarks/masker.py [--rollouts FILE.jsonl] [--seconds 3]

A pair is a rollout of 1,024 tokens and a solution of 500 tokens. They are cut from real ones if a file with the columns
problem, solution and rollout is given. Otherwise they are generated. The first figure is measured without the cache,
because in training every pair is new.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from megatron_paint.masker import overlap
from megatron_paint.masker.overlap import MaskerPool, Pair, measure_overlaps

# Qwen3's tokenizer takes 2.98 characters a token in these rollouts and 2.73 in their solutions.
ROLLOUT_CHARACTERS = 3051
SOLUTION_CHARACTERS = 1363


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=Path, help="JSON lines with problem, solution and rollout")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each measurement")
    options = parser.parse_args()
    pairs = read_pairs(options.rollouts) if options.rollouts else generated_pairs()
    anchors = statistics.mean(len(measured.anchors) for measured in measure_overlaps(pairs))
    print(f"{len(pairs)} pairs from {options.rollouts.name if options.rollouts else 'a generator'}")
    print(f"{ROLLOUT_CHARACTERS} + {SOLUTION_CHARACTERS} characters, {anchors:.1f} anchors a solution\n")

    def uncached() -> None:
        overlap._extract.cache_clear()
        measure_overlaps(pairs)

    cold = rate(uncached, len(pairs), options.seconds)
    warm = rate(lambda: measure_overlaps(pairs), len(pairs), options.seconds)
    print("pairs a second of one core (median and best of the rounds)")
    print(f"  every pair new              {cold[0]:8,.0f} {cold[1]:8,.0f}")
    print(f"  anchors of solutions cached {warm[0]:8,.0f} {warm[1]:8,.0f}\n")
    print_growth(pairs)
    print_pool(pairs)


def rate(work: Callable[[], None], count: int, seconds: float) -> tuple[float, float]:
    """Returns the median and best number of pairs a second of processor time, which a busy machine changes little."""
    rounds = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 3:
        started = time.process_time()
        work()
        rounds.append(count / (time.process_time() - started))
    return statistics.median(rounds), max(rounds)


def print_growth(pairs: list[Pair]) -> None:
    print("one pair, both texts made longer    ms    us / 1,000 characters")
    for factor in (1, 4, 16, 64, 256):
        group = [pairs[index % len(pairs)] for index in range(factor)]
        pair = Pair(pairs[0].problem, "\n".join(p.solution for p in group), "\n".join(p.rollout for p in group))
        best = min(timed(lambda pair=pair: fresh([pair]), time.process_time) for _ in range(5))
        size = total(pair)
        print(f"{size:12,} characters {1e3 * best:16,.2f} {1e9 * best / size:13,.1f}")
    print()


def print_pool(pairs: list[Pair]) -> None:
    """Measures the pool. Its cost is processor time of this process; workers on idle cores do the rest in parallel."""
    workers = min(4, os.cpu_count() or 1)
    print(f"one step, best of 7     alone: wall ms   {workers} workers: wall ms   of which this process works ms")
    with MaskerPool(workers, from_characters=0) as pool:
        measure_overlaps(pairs, pool=pool)  # starts the workers
        for count in (8, 32, 128, 512, 2048):
            # Each repeat of a pair gets a new text. Otherwise it would come from the cache.
            step = [pairs[index % len(pairs)] for index in range(count)]
            step = [Pair(f"{pair.problem} {index}", *pair[1:]) for index, pair in enumerate(step)]
            repeats = [renamed(step, repeat) for repeat in range(14)]
            alone = min(timed(lambda step=step: fresh(step)) for _ in range(7))
            wall = min(timed(lambda new=new: measure_overlaps(new, pool=pool)) for new in repeats[:7])
            own = min(timed(lambda new=new: measure_overlaps(new, pool=pool), time.process_time) for new in repeats[7:])
            times = f"{1e3 * alone:11.1f} {1e3 * wall:19.1f} {1e3 * own:23.1f}"
            print(f"{count:6} pairs {sum(map(total, step)):10,} chars {times}")


def total(pair: Pair) -> int:
    return sum(map(len, pair))


def fresh(step: list[Pair]) -> None:
    overlap._extract.cache_clear()
    measure_overlaps(step)


def renamed(step: list[Pair], repeat: int) -> list[Pair]:
    return [Pair(f"{pair.problem} {repeat}", *pair[1:]) for pair in step]


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


def read_pairs(path: Path) -> list[Pair]:
    """Makes one pair a problem: its rollouts one after another, and its solution followed by other solutions."""
    rows_of: dict[str, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows_of.setdefault(row["problem"], []).append(row)
    solutions = [rows[0]["solution"] for rows in rows_of.values()]
    pairs = []
    for number, (problem, rows) in enumerate(rows_of.items()):
        solution = filled(solutions[number:] + solutions[:number], SOLUTION_CHARACTERS)
        pairs.append(Pair(problem, solution, filled([row["rollout"] for row in rows], ROLLOUT_CHARACTERS)))
    return pairs


def generated_pairs() -> list[Pair]:
    """Makes chains of formulas with about as many anchors as real solutions. The rollout repeats half of them."""
    prose = "This follows from what was shown above, since each of the two sides is bounded by the other one, and "
    pairs = []
    for number in range(100):
        steps = [
            f"{prose} so $x_{{{i}}} = {7 * i + number}$. {prose} hence \\[y = \\frac{{{13 * i}}}{{{number + 3}}}.\\] "
            for i in range(60)
        ]
        solution = filled(steps, SOLUTION_CHARACTERS - 20) + " Thus \\boxed{12345}."
        pairs.append(Pair(f"Problem {number}: find $y$.", solution, filled(steps[::2], ROLLOUT_CHARACTERS)))
    return pairs


def filled(texts: list[str], characters: int) -> str:
    """Repeats the texts up to this number of characters."""
    text = "\n".join(texts)
    return (text * (characters // len(text) + 1))[:characters]


if __name__ == "__main__":
    main()
