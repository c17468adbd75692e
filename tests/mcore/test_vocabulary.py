"""A vocabulary that tensor parallelism does not divide: the same tokens, numbers and weights as on one rank."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_paint.cli.main import main
from tests.mcore import parity_cases as parity
from tests.mcore.vocabulary_worker import CASES, sequences_of
from tests.support import forked_ranks
from tests.support.exports import same, weights


@dataclass(frozen=True)
class Split:
    """A vocabulary over the ranks of a layout."""

    vocab_size: int
    rows: int  # with padding, over all tensor-parallel ranks
    layout: dict
    processes: int


SPLITS = {
    "49 over 2": Split(
        49,
        50,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
        4,
    ),
    "9 over 4, one rank has none": Split(9, 12, {"tensor_model_parallel_size": 4}, 4),
}


def run(folder: Path, layout: dict, processes: int, part: str, *paths: Path) -> Path:
    out = folder / f"{part}-{processes}"
    out.mkdir()
    ended = forked_ranks.run(
        out,
        json.dumps(layout),
        part,
        *paths,
        out,
        target="tests.mcore.vocabulary_worker:main",
        processes=processes,
        limit=600,
    )
    assert ended.statuses == [0] * processes, "\n".join(text[-3000:] for text in ended.err)
    return out


EASY, HARD = SPLITS  # `make test` runs the second


@pytest.fixture(scope="module", params=[pytest.param(EASY, marks=pytest.mark.long), HARD])
def trained(request, tmp_path_factory):
    """(split, models, output on one rank, output at the layout)."""
    split, folder = SPLITS[request.param], tmp_path_factory.mktemp("vocabulary")
    for tied in (True, False):
        torch.manual_seed(int(tied))
        config = Qwen3Config(**parity.SIZES | {"vocab_size": split.vocab_size}, tie_word_embeddings=tied)
        Qwen3ForCausalLM(config).save_pretrained(parity.checkpoint(folder, "start", tied))
    alone = run(folder, {}, 1, "first", folder, folder)
    return split, folder, alone, run(folder, split.layout, split.processes, "first", folder, folder)


def result(out: Path) -> dict:
    return torch.load(out / "result.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_rank(trained, case):
    _, _, alone, split = trained
    wanted, found = result(alone)[case.name], result(split)[case.name]
    for name, rollouts in wanted["rollouts"].items():
        assert [r.response_ids for r in found["rollouts"][name]] == [r.response_ids for r in rollouts], name
        for one, other in zip(found["rollouts"][name], rollouts, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-6)
    for one, other in zip(found["logprobs"], wanted["logprobs"], strict=True):
        assert one == pytest.approx(other, abs=2e-6)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(wanted["norms"]), rtol=1e-5, atol=1e-6)
    ours, theirs = weights(split / f"{case.name}-trained"), weights(alone / f"{case.name}-trained")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logprobs_are_the_models(trained, case):
    split, folder, _, out = trained
    model = Qwen3ForCausalLM.from_pretrained(parity.checkpoint(folder, "start", case.tied))
    sequences = sequences_of(case, split.vocab_size)
    for sequence, found in zip(sequences, result(out)[case.name]["logprobs"], strict=True):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(sequence.response_ids)[:, None])[:, 0]
        assert found == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_export_of_the_unchanged_model_is_the_model(trained, case):
    _, folder, _, out = trained
    assert same(weights(out / f"{case.name}-unchanged"), weights(parity.checkpoint(folder, "start", case.tied)))


def test_checkpoints_load_at_the_other_layout(trained, tmp_path):
    """From padded rows to none and back: the optimiser's next step, and the weights alone as the start of a run."""
    split, folder, alone, out = trained
    resumed = {
        "alone": run(tmp_path, {}, 1, "rest", folder, out),
        "split": run(tmp_path, split.layout, split.processes, "rest", folder, alone),
    }
    for case in CASES:
        wanted, saved = result(alone)[case.name], tmp_path / case.name
        assert (
            main(
                [
                    "convert",
                    "to-hf",
                    str(out / case.name),
                    str(saved),
                    "--quiet",
                    "--base",
                    str(folder / ("start-tied" if case.tied else "start-untied")),
                ]
            )
            == 0
        )
        for name, folder_of in resumed.items():
            found = result(folder_of)[case.name]
            torch.testing.assert_close(
                torch.tensor(found["losses"]), torch.tensor(wanted["losses"][1:]), rtol=1e-5, atol=1e-6
            )
            ours, theirs = weights(folder_of / f"{case.name}-trained"), weights(alone / f"{case.name}-trained")
            for key in theirs:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
        assert same(weights(resumed["alone"] / f"{case.name}-warm"), weights(saved))
