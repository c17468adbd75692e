"""Views: a text of a problem takes the place of its solution. It comes from a further column, or is the answer."""

import pandas as pd
import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.settings import ColumnSettings, DataSettings
from megatron_paint.data.problems import load_problems
from tests.data.problem_files import row, write

GIST = {"gist": "views.short"}


def load(source, *, view="gist", needed_by=None, views=GIST, **options):
    columns = ColumnSettings(views=views)
    settings = DataSettings(train=str(source), problems_per_step=1, columns=columns, **options)
    return load_problems(settings, solution_needed_by=needed_by, view=view)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.jsonl"


def with_gist(number, text=..., **changes):
    return row(number, views={"short": f"Add {number}." if text is ... else text}, **changes)


class TestColumn:
    def test_the_chosen_view_is_the_reference(self, file):
        problems = load(write(file, [with_gist(1), with_gist(2)])).problems
        assert [problem.reference for problem in problems] == ["Add 1.", "Add 2."]
        assert [problem.solution for problem in problems] == ["It is \\boxed{2}.", "It is \\boxed{4}."]

    def test_the_solution_is_the_reference_of_the_full_view(self, file):
        problems = load(write(file, [with_gist(1), row(2)]), view="full", needed_by="training").problems
        assert [problem.reference for problem in problems] == ["It is \\boxed{2}.", "It is \\boxed{4}."]
        assert [problem.view for problem in problems] == ["", ""]

    def test_without_solutions(self, file):
        problems = load(write(file, [with_gist(1, solution=...), with_gist(2, solution=None)])).problems
        assert [(problem.solution, problem.reference) for problem in problems] == [("", "Add 1."), ("", "Add 2.")]

    def test_parquet_reads_the_column(self, tmp_path):
        path = tmp_path / "train.parquet"
        pd.DataFrame([row(1, gist="Add.")]).to_parquet(path)
        assert load(path, views={"gist": "gist"}).problems[0].reference == "Add."

    @pytest.mark.parametrize(
        ("text", "fault"),
        [("", "is empty"), ("  ", "is empty"), (None, "is missing"), ([1], "holds a list, not text")],
    )
    def test_a_row_without_the_view(self, file, text, fault):
        source = write(file, [with_gist(1), with_gist(2, text), with_gist(3)])
        message = rf"train\.jsonl:2: column 'views\.short' {fault}; objective\.reveal\.view: gist needs it; correct"
        with pytest.raises(UserError, match=message):
            load(source)
        loaded = load(source, on_bad_row="skip")
        assert [problem.id for problem in loaded.problems] == ["p1", "p3"]
        assert len(loaded.bad_rows) == 1
        # A view that is not shown may be missing.
        assert len(load(source, view="full", needed_by="training")) == 3

    def test_no_row_has_the_column(self, file):
        source = write(file, [row(1, gits="Add 1."), row(2)])
        message = (
            r"data\.columns\.views\.gist: no row of .* has a column 'gist'\. The columns are answer, gits, id, "
            r"problem, solution\. Did you mean 'gits'\? objective\.reveal\.view: gist needs it\.$"
        )
        with pytest.raises(UserError, match=message):
            load(source, views={"gist": "gist"})
        with pytest.raises(UserError, match=r"data\.columns\.views\.gist: no row of .* has a column 'gist'\."):
            load(source, views={"gist": "gist"}, view="full")

    def test_every_row_is_empty(self, file):
        source = write(file, [with_gist(1, ""), with_gist(2, "")])
        message = (
            r"data\.columns\.views\.gist: in each of the 2 rows of .*, column 'views\.short' is empty\. "
            r"objective\.reveal\.view: gist needs it\."
        )
        for on_bad_row in ("error", "skip"):
            with pytest.raises(UserError, match=message):
                load(source, on_bad_row=on_bad_row)

    def test_every_row_has_an_object(self, file):
        source = write(file, [with_gist(1), with_gist(2)])
        message = (
            r"data\.columns\.views\.gist: .*'views' holds an object, not text\..* Name one of its fields: views\.short"
        )
        with pytest.raises(UserError, match=message):
            load(source, views={"gist": "views"})


class TestAnswer:
    def test_the_boxed_answer_needs_no_column(self, file):
        source = write(file, [row(1, solution=...), row(2, answer="\\frac{1}{2}", solution="")])
        problems = load(source, view="answer", views={}).problems
        assert [problem.reference for problem in problems] == ["\\boxed{2}", "\\boxed{\\frac{1}{2}}"]

    def test_the_answer_is_the_one_that_is_graded(self, file):
        problems = load(write(file, [row(1, answer="So 1 + 1 = 2.\n#### 2")]), view="answer", views={}).problems
        assert problems[0].reference == "\\boxed{2}"

    def test_a_row_without_an_answer(self, file):
        with pytest.raises(UserError, match=r"train\.jsonl:2: column 'answer' is missing"):
            load(write(file, [row(1), row(2, answer=None)]), view="answer", views={})
