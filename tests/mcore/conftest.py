"""What several tests of this folder start from, and which layouts `make test` runs."""

from pathlib import Path

import pytest

from tests.mcore import parity_cases as parity
from tests.mcore.layouts import COVERING, EXPERT_LAYOUTS, INSTANCES, LAYOUTS, PIPELINES

HERE = Path(__file__).parent
LEFT_OUT = {*LAYOUTS, *PIPELINES, *INSTANCES, *EXPERT_LAYOUTS}.difference(COVERING)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks a test long if a layout that `make test` leaves out is one of its parameters."""
    for item in items:
        if item.path.parent == HERE and LEFT_OUT.intersection(_texts(item)):
            item.add_marker(pytest.mark.long)


def _texts(item):
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [value for value in parameters if isinstance(value, str)]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The folder of the dense checkpoints (`parity_cases.checkpoint`)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    parity.make_checkpoints(folder)
    return folder
