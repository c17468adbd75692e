"""The undisturbed run of the tiny model, which several files compare their runs with. None may change it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support import forked_ranks, tiny

LAYOUT = "tensor_model_parallel_size: 2, sequence_parallel: true"


@dataclass(frozen=True)
class Undisturbed:
    """Four steps on two ranks, which the launcher started, with checkpoints and evaluations after steps 2 and 4."""

    folder: Path  # holds the model, the problems and the settings
    settings: Path
    run: Path
    ended: forked_ranks.Ended


def make(folder: Path) -> None:
    """Trains in the folder."""
    for file in tiny.make_model(folder / "model").iterdir():
        file.chmod(0o444)  # as in a store of models that many share
    tiny.make_problems(folder / "problems.jsonl")
    settings = tiny.make_settings(folder, folder / "model", folder / "problems.jsonl", layout=LAYOUT)
    ended = forked_ranks.start_command(folder, "train", settings, "--json", "--processes", "2").wait()
    assert ended.statuses == [0], ended
    (folder / "ended.json").write_text(json.dumps(asdict(ended)))


def read(folder: Path) -> Undisturbed:
    """What `make` left in the folder."""
    ended = forked_ranks.Ended(**json.loads((folder / "ended.json").read_text()))
    return Undisturbed(folder, folder / "settings.yaml", folder / "run", ended)
