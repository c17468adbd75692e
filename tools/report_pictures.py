"""Takes the pictures of docs/report.md from the report of a run: `python tools/report_pictures.py RUN`.

It needs Debian's packages chromium and chromium-driver, and selenium. A run of examples/quickstart/paint.yaml with
`run.keep_top_tokens=5` shows everything.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from megatron_paint.report.build import write_report  # noqa: E402
from tests.report.browser import Browser, chromium, missing  # noqa: E402

DRAWN = "return document.querySelectorAll('#curves .u-wrap').length > 0"
WIDE, NARROW = (1280, 860), (360, 760)
MOST_BYTES = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report")
    parser.add_argument("--sample", default="0/3_0/16", help="run / page / place of the sample to show")
    options = parser.parse_args()
    if reason := missing():
        parser.error(f"missing: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        file = write_report([options.run], Path(folder) / "report.html").file
        overview(browser, file, options.out / "overview.png")
        sample(browser, file, options.sample, options.out / "sample.png", scheme="light", size=WIDE)
        sample(browser, file, options.sample, options.out / "sample_dark.png", scheme="dark", size=WIDE)
        sample(browser, file, options.sample, options.out / "sample_phone.png", scheme="light", size=NARROW)
        answers(browser, file, options.out / "answers.png")
    for picture in sorted(options.out.glob("*.png")):
        size = picture.stat().st_size
        print(f"{picture}: {size / 1e3:.0f} kB{', too large for the repository' if size > MOST_BYTES else ''}")


def overview(browser: Browser, file: Path, picture: Path) -> None:
    browser.prefer("light")
    browser.resize(*WIDE)
    browser.open(file).wait(DRAWN)
    browser.picture(picture)


def sample(browser: Browser, file: Path, name: str, picture: Path, *, scheme: str, size: tuple[int, int]) -> None:
    """A sample with the cursor on its first selected token."""
    browser.prefer(scheme)
    browser.resize(*size)
    browser.open(file)
    browser.run("location.hash = `#samples/${arguments[0]}`", name)
    browser.wait("return document.querySelector('#sample .tokens')")
    browser.run("document.querySelector('#sample .tokens').focus({preventScroll: true})")
    browser.press("m")
    browser.run("document.querySelector('#sample').scrollTop = 0; scrollTo(0, 0)")
    if size == NARROW:
        browser.run("document.querySelector('#sample section').scrollIntoView()")
    browser.picture(picture)


def answers(browser: Browser, file: Path, picture: Path) -> None:
    """The first problem of the list, with its answers."""
    browser.prefer("light")
    browser.resize(*WIDE)
    browser.open(file)
    browser.run("location.hash = '#answers'")
    browser.wait("return document.querySelector('#view-answers .row')")
    browser.run("document.querySelector('#view-answers .row').click()")
    browser.wait("return document.querySelector('#answer details')")
    browser.picture(picture)


if __name__ == "__main__":
    main()
