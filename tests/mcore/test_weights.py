"""`model.megatron_path`: one line that names file and reason, and what is loaded from other programs' checkpoints."""

import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_paint.convert.folders import convert_to_megatron
from tests.mcore import parity_cases as parity
from tests.support import forked_ranks
from tests.support.exports import same, weights

SIZES = {"small": {}, "wide": {"hidden_size": 64}, "padded": {"vocab_size": 256}, "fewer": {"vocab_size": 40}}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(models, output folder, what each rank reported, by case)."""
    models, checkpoints, out = (tmp_path_factory.mktemp(name) for name in ("models", "checkpoints", "out"))
    for name, sizes in SIZES.items():
        torch.manual_seed(3)
        model = Qwen3ForCausalLM(Qwen3Config(**parity.SIZES | sizes, tie_word_embeddings=False))
        if name == "padded":  # the small model's rows first
            small = Qwen3ForCausalLM.from_pretrained(models / "small").state_dict()
            large = model.state_dict()
            for key, value in small.items():
                large[key][: len(value)] = value
        model.save_pretrained(models / name)
        convert_to_megatron(models / name, checkpoints / name, processes=1)
    ended = forked_ranks.run(
        out, models, checkpoints, out, target="tests.mcore.weights_worker:main", processes=2, limit=300
    )
    assert ended.statuses == [0, 0], "\n".join(text[-3000:] for text in ended.err)
    return models, out, [json.loads((out / f"told{rank}.json").read_text()) for rank in (0, 1)]


ERRORS = {
    "metadata empty": ("/.metadata cannot be read", "copy the checkpoint again"),
    "metadata cut": ("/.metadata cannot be read", "copy the checkpoint again"),
    "metadata garbage": ("/.metadata cannot be read", "copy the checkpoint again"),
    "metadata missing": ("has no .metadata", "not a Megatron checkpoint"),
    "backend cut": ("/metadata.json cannot be read", "copy the checkpoint again"),
    "backend missing": ("has no metadata.json", "not a Megatron checkpoint"),
    "pieces empty": ("/__0_0.distcp is truncated", "copy it again"),
    "pieces cut": ("/__0_0.distcp is truncated", "copy it again"),
    "pieces garbage": ("/__0_0.distcp: the piece of", "torch.save did not write this"),
    "pieces zeros": ("/__0_0.distcp: the piece of", "torch.save did not write this"),
    "pieces missing": ("/__0_0.distcp is missing", "copy the checkpoint again"),
    "another model": ("small/config.json", "has shape (48, 64), but the config expects (48, 32)"),
    "fewer rows": ("small/config.json", "has shape (40, 32), but the config expects (48, 32)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_line_names_file_and_reason(loaded, case):
    _, out, told = loaded
    assert told[0][case] == told[1][case]
    message = told[0][case]["error"]
    assert message.startswith("model.megatron_path: ")
    assert "\n" not in message
    for part in ERRORS[case]:
        assert part in message
    assert case.startswith(("another", "fewer")) or str(out / case.replace(" ", "-")) in message


@pytest.mark.parametrize("case", ["nothing", "common part of another program", "common part missing", "padded"])
def test_weights_are_loaded(loaded, case):
    """The weights need nothing of the common part. Rows beyond the vocabulary are left out, and a line says so."""
    models, out, told = loaded
    assert same(weights(out / f"{case.replace(' ', '-')}-hf"), weights(models / "small"))
    notes = told[0][case]["notes"]
    assert len(notes) == (2 if case == "padded" else 0)
    assert all("the 208 rows beyond it are padding and are left out" in note for note in notes)
