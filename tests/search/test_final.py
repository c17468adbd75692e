"""The problems of a search, and the final comparison."""

import json

from megatron_paint.search.final import load_problems
from megatron_paint.search.space import read_space
from tests.search.spaces import given, write_space


def test_problems_of_other_domains(tmp_path):
    """`evaluation.domain` and a column of domains name those of the section `domains`."""
    rows = [{"id": id, "solution": "abc", "answer": "abc"} for id in "ab"]
    rows[1]["kind"] = "strings"
    for name in ("validation", "test"):
        text = "\n".join(json.dumps(row | {"problem": f"Say abc in the {name}."}) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = write_space(tmp_path, validation={"problems": f"{tmp_path}/validation.jsonl"})
    for override, domains in (
        ("evaluation.domain=strings", ["strings", "strings"]),
        ("evaluation.columns={domain: kind}", ["math", "strings"]),
    ):
        settings = given("domains={strings: {grader: exact}}", f"evaluation.problems={tmp_path}/test.jsonl", override)
        found = load_problems(read_space(path, settings))
        for benchmark in (found.validation, found.test):
            assert [problem.domain for problem in benchmark.problems] == domains
