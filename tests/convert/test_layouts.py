"""Every member of the family at every layout: loading from Hugging Face and from a conversion, saving, and logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_paint.convert.check import compare
from megatron_paint.convert.to_hf import ToHuggingFace
from megatron_paint.convert.to_megatron import ToMegatron
from megatron_paint.convert.work import convert
from tests.convert.family import LAYOUTS, MEMBERS, PROCESSES, TOKENS, make_member

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Returns a folder with a float32 model of each member and its conversion."""
    folder = tmp_path_factory.mktemp("family")
    for member in MEMBERS:
        make_member(folder / member, member, dtype=torch.float32)
        job = ToMegatron(source=folder / member)
        convert(job, folder / f"{member}-megatron", processes=1, overwrite=False)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, family, tmp_path_factory):
    """Returns the results of one layout."""
    out = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(PROCESSES[request.param]), "-m", "tests.convert.convert_worker", request.param, family, out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(lines[-60:] or done.stderr.splitlines()[-25:])
    return out


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


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
    ours, theirs = weights(tmp_path / "back"), weights(family / member)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
