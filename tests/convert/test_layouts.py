"""Every member of the family at every layout: loading from Hugging Face and from a conversion, saving, and logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_paint.convert.check import compare
from megatron_paint.convert.to_hf import ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import convert
from tests.convert.family import LAYOUTS, MEMBERS, PROCESSES, TOKENS, make_member
from tests.support import forked_ranks
from tests.support.exports import same, weights
from tests.support.marks import long_if_in


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Returns a folder with a float32 model of each member and its conversion."""
    folder = tmp_path_factory.mktemp("family")
    for member in MEMBERS:
        make_member(folder / member, member, dtype=torch.float32)
        job = ToMegatron(source=folder / member)
        convert(job, folder / f"{member}-megatron", processes=1, overwrite=False)
    return folder


# `make test` leaves out layouts whose kinds of parallelism other layouts have, in other pairs or with more ranks.
LONG = ("tp2", "pp2", "tp4", "ep2", "tp2-ep2")
MARKED = long_if_in(LONG, LAYOUTS)


@pytest.fixture(scope="module", params=MARKED)
def layout(request, family, tmp_path_factory):
    """Returns the results of one layout."""
    out = tmp_path_factory.mktemp(request.param)
    ended = forked_ranks.run(
        out, request.param, family, out, target="tests.convert.convert_worker:main", processes=PROCESSES[request.param]
    )
    assert ended.statuses == [0] * PROCESSES[request.param], "\n".join(text[-3000:] for text in ended.err)
    return out


@pytest.mark.parametrize("member", MEMBERS)
def test_logits_equal_transformers(member, layout, family):
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(family / member)(torch.tensor([TOKENS])).logits[0]
    found = torch.load(layout / f"{member}.pt")
    assert (found - wanted).abs().max() / wanted.abs().max() < 2e-5


@pytest.mark.parametrize("member", MEMBERS)
def test_a_checkpoint_of_this_layout_is_the_model(member, layout, family, tmp_path):
    """A checkpoint saved at this layout equals the Hugging Face folder, and its conversion is the same to the bit."""
    saved = layout / f"{member}-saved"
    found = compare(family / member, saved)
    assert found.equal, found
    job = ToHuggingFace(source=saved, base=family / member)
    convert(job, tmp_path / "back", processes=1, overwrite=False)
    assert same(weights(tmp_path / "back"), weights(family / member))
