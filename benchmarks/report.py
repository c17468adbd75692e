"""Measures writing a report, and opening it in headless Chromium.

    python benchmarks/report.py [RUN ...] [--steps 1000] [--samples 32] [--tokens 256] [--likely] [--rounds 3]

Without RUN it makes a run folder of that size, with the tokenizer of the quickstart and values of every token. Opening
is the time from the start of the navigation until all curves of the first view are drawn. The second time is that from
a key until its sample is shown. Memory is the PSS of the page's process, and its JavaScript heap. The programs
are of Debian's packages chromium and chromium-driver; selenium drives them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from megatron_paint.report.build import Written, write_report  # noqa: E402
from megatron_paint.run.folder import RunFolder  # noqa: E402
from tests.report.browser import Browser, chromium, missing  # noqa: E402
from tests.report.made_run import END, make_run, metrics, sample  # noqa: E402

DRAWN = (
    "const count = (selector) => document.querySelectorAll(selector).length;"
    "return count('#curves .u-wrap') === count('#curves > .grid .plot');"
)
SHOWN = "return Boolean(document.querySelector('#sample .token, #sample .text'))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of a response")
    parser.add_argument("--likely", action="store_true", help="with five likeliest tokens of both sides")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if reason := missing():
        parser.error(f"missing: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or [large_run(Path(folder) / "run", options)]
        begun = time.process_time()
        written = write_report(runs, Path(folder) / "report.html")
        print_written(written, cpu_seconds=time.process_time() - begun)
        measure(written.file, rounds=options.rounds)


def large_run(path: Path, options: argparse.Namespace) -> Path:
    """A run folder of the size that is asked for."""
    make_run(path, steps=0)
    folder = RunFolder(path)
    lines = [long_sample(number, options.tokens, likely=options.likely) for number in range(options.samples)]
    folder.metrics_file.write_text("".join(json.dumps(metrics(step)) + "\n" for step in range(1, options.steps + 1)))
    for step in range(1, options.steps + 1):
        for number, line in enumerate(lines):
            line |= {"step": step, "loss": (step * 31 + number) % 97 / 97, "overlap": (step + number) % 9 / 8}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        folder.samples_file(step).parent.mkdir(exist_ok=True)
        folder.samples_file(step).write_text(text)
    return path


def long_sample(number: int, tokens: int, *, likely: bool) -> dict:
    """A sample of so many tokens; its values repeat nowhere, so that they compress as measured ones do."""
    ids = [15 + (index * index + number) % 10 for index in range(tokens - 1)] + [END]
    value = [(index * 2654435761 + number * 40503) % 10007 / 10007 for index in range(tokens)]
    own = {"response_ids": ids, "response_text": "".join(str(token - 15) for token in ids[:-1])}
    top = (
        {}
        if not likely
        else {
            "ids": [[15, 16, 17, 18, 19]] * tokens,
            "probabilities": [[round(share / rank, 4) for rank in range(1, 6)] for share in value],
        }
    )
    values = {"divergence": value, "student_entropy": value[::-1], "teacher_entropy": value}
    rounded = {name: [round(one, 4) for one in found] for name, found in values.items()}
    return sample(1, number % 10) | own | rounded | {"id": f"problem-{number}", "student_top": top, "teacher_top": top}


def print_written(written: Written, *, cpu_seconds: float) -> None:
    beside = 0 if written.folder is None else len(list(written.folder.iterdir()))
    size = written.file.stat().st_size
    print(f"written in {written.seconds:.2f} s ({cpu_seconds:.2f} s of the CPU): {written.samples:,} samples", end="")
    print(f"; report.html {size / 1e6:.2f} MB", end="")
    print(f", {beside} files beside it, {written.bytes / 1e6:.0f} MB in all")


def measure(file: Path, *, rounds: int) -> None:
    opened, shown, heap, memory = [], [], [], []
    for _ in range(rounds):
        with chromium() as browser:
            opened.append(time_to_open(browser, file))
            shown.append(time_to_sample(browser))
            heap.append(browser.run("return performance.memory.usedJSHeapSize") / 1e6)
            memory.append(page_memory(browser) / 1e6)
    print(f"opened in {spread(opened)} s; the first sample {spread(shown)} s after the key")
    print(f"page's process {spread(memory)} MB (PSS), JavaScript heap {spread(heap)} MB")


def time_to_open(browser: Browser, file: Path) -> float:
    """Seconds from the start of the navigation until the last curve is drawn, by the clock of the page."""
    browser.open(file)
    browser.wait(DRAWN)
    return browser.run("return performance.now()") / 1e3


def time_to_sample(browser: Browser) -> float:
    start = time.monotonic()
    browser.press("j")
    browser.wait(SHOWN)
    return time.monotonic() - start


def page_memory(browser: Browser) -> int:
    """Proportional set size in bytes of the largest process of a page below the driver."""
    sizes = []
    for pid in descendants(browser.driver.service.process.pid):
        try:
            if b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                sizes += [1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")]
        except OSError:
            continue  # it has ended
    return max(sizes)


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        below.setdefault(int(after_name[1]), []).append(int(entry.parent.name))
    found, left = [], [pid]
    while left:
        own = below.get(left.pop(), [])
        found += own
        left += own
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
