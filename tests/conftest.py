"""What all tests share: the undisturbed run, repeatable examples, the order of the files, the check for slow tests.

docs/testing.md describes the markers and what each make target runs.
"""

from collections import Counter
from contextlib import suppress

import pytest

with suppress(ModuleNotFoundError):  # tests/gpu does without it
    import hypothesis

    # The same examples in each run. `--hypothesis-profile=default` draws new ones.
    hypothesis.settings.register_profile("repeatable", derandomize=True)
    hypothesis.settings.load_profile("repeatable")

# Longest first, so that the workers of pytest-xdist end together. Files that are not named follow in their usual order.
LONGEST = (
    "mcore/test_parity.py",
    "reliability/test_faults.py",
    "end_to_end/test_quickstart.py",
    "convert/test_layouts.py",
    "mcore/test_checkpoint.py",
    "end_to_end/test_launch.py",
    "reliability/test_exactness.py",
    "end_to_end/test_profile.py",
    "end_to_end/test_vllm.py",
    "end_to_end/test_vllm_devices.py",
    "rollouts/test_device_transfer.py",
    "search/test_search.py",
    "reliability/test_preflight.py",
    "mcore/test_vocabulary.py",
    "losses/test_losses_triton.py",
    "end_to_end/test_run.py",
    "end_to_end/test_shown.py",
    "report/test_browser.py",
    "tools/test_run_notebooks.py",
    "planning/test_measured.py",
    "mcore/test_generation.py",
    "end_to_end/test_resume.py",
    "grading/test_grading.py",
    "grading/test_graders.py",
    "slurm/test_scripts.py",
    "end_to_end/test_domains.py",
    "convert/test_convert.py",
    "masker/test_code_anchors.py",
    "run/test_lock.py",
    "grading/test_cases.py",
    "end_to_end/test_disk.py",
    "mcore/test_main_grad.py",
    "convert/test_strict.py",
    "convert/test_kill.py",
    "reliability/test_soak.py",
    "end_to_end/test_grpo.py",
    "losses/test_losses_parallel.py",
    "end_to_end/test_mistakes.py",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The undisturbed run, trained once for all files."""
    from tests.support import undisturbed
    from tests.support.once import once

    return undisturbed.read(once(tmp_path_factory, "undisturbed", undisturbed.make))


def pytest_addoption(parser):
    parser.addoption(
        "--slow-limit",
        type=float,
        metavar="SECONDS",
        help="fail if a test without the marker `long` takes longer, its fixtures included",
    )


def pytest_configure(config):
    config.pluginmanager.register(SlowTests(config), "slow-tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Puts the longest files first, and marks what needs the Slurm cluster of tests/slurm."""
    ranks = {f"tests/{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
    for item in items:
        if "shared_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)


class SlowTests:
    """Adds up the seconds of each test and, with --slow-limit, fails the session because of those that are too slow."""

    def __init__(self, config: pytest.Config) -> None:
        self._limit = None if hasattr(config, "workerinput") else config.getoption("--slow-limit")
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "long" not in report.keywords:
            self._seconds[report.nodeid] += report.duration

    @property
    def _slow(self) -> list[str]:
        if self._limit is None:
            return []
        return [f"{test}: {n:.0f} s" for test, n in self._seconds.most_common() if n > self._limit]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._slow and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._slow:
            terminalreporter.section(f"slower than {self._limit:g} s and not marked long", red=True)
            for line in self._slow:
                terminalreporter.line(line)
