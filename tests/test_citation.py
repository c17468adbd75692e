"""CITATION.cff: that it agrees with the package and the README. `.ci/run` checks its schema with cffconvert."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import megatron_paint

ROOT = Path(__file__).parents[1]
FILE = ROOT / "CITATION.cff"


@pytest.fixture(scope="module")
def citation():
    return YAML(typ="safe", pure=True).load(FILE.read_text())


def test_the_software(citation):
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"].startswith("megatron_paint")
    assert (citation["version"], citation["license"]) == (megatron_paint.__version__, "Apache-2.0")
    assert citation["message"]
    assert citation["authors"] == [{"name": "The megatron_paint authors"}]
    assert set(citation) <= {
        *("cff-version", "message", "title", "type", "abstract", "authors", "version", "license", "keywords"),
        "references",
    }


def test_the_papers_are_those_of_the_readme(citation):
    entries = re.findall(r"@article\{.*?^\}", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(entries) == len(citation["references"]) == 2
    for entry, reference in zip(entries, citation["references"], strict=True):
        fields = dict(re.findall(r"^  (\w+) += \{(.*)\}", entry, re.MULTILINE))
        names = [f"{one['family-names']}, {one['given-names']}" for one in reference["authors"]]
        assert reference["type"] == "article"
        assert reference["title"].lower() == fields["title"].lower()
        assert " and ".join(names) == fields["author"]
        assert (reference["journal"], str(reference["year"])) == (fields["journal"], fields["year"])
        assert reference["url"] == f"https://arxiv.org/abs/{fields['journal'].rpartition(':')[2]}"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2604.26573"
