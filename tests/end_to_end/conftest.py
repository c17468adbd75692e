"""A trained run of the tiny model that several files look into; none may change it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import forked_ranks, tiny


@dataclass(frozen=True)
class Trained:
    """Four unbroken steps, with checkpoints and evaluations after 2 and 4."""

    folder: Path  # holds the model, the problems and the settings
    settings: Path
    run: Path
    ended: forked_ranks.Ended


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    for file in tiny.make_model(folder / "model").iterdir():
        file.chmod(0o444)  # as in a store of models that many share
    tiny.make_problems(folder / "problems.jsonl")
    layout = "tensor_model_parallel_size: 2, sequence_parallel: true"
    settings = tiny.make_settings(folder, folder / "model", folder / "problems.jsonl", layout=layout)
    ended = forked_ranks.train(folder, settings)
    assert ended.statuses == [0, 0], ended
    return Trained(folder, settings, folder / "run", ended)
