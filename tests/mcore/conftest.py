"""What several tests of this folder start from."""

import pytest

from tests.mcore import parity_cases as parity


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of the dense checkpoints (`parity_cases.checkpoint`)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    parity.make_checkpoints(folder)
    return folder
