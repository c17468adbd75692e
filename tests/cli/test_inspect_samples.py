"""One sample shown, with marks and with colours."""

import io
import shutil

import pytest
from rich.console import Console

from megatron_paint.base.errors import UserError
from megatron_paint.cli.inspect_samples import inspect_sample, pieces
from megatron_paint.cli.main import main
from megatron_paint.config.saved import read_config, to_yaml
from megatron_paint.run.folder import RunFolder
from tests.report.made_run import make_run

WORDS = {1: "The", 2: " sum", 3: " is", 4: " 17"}
BYTES = {7: b"\xe2", 8: b"\x88", 9: b"\x91"}  # the three bytes of a summation sign


def decode(ids):
    return b"".join(BYTES.get(i, WORDS.get(i, "").encode()) for i in ids).decode("utf-8", "replace")


def line(problem, **changes):
    return {
        "id": problem,
        "step": 3,
        "student_prompt_ids": [1],
        "teacher_prompt_ids": [1],
        "response_ids": [1, 2, 3, 4],
        "response_text": "The sum is 17",
        "overlap": 0.5,
        "anchors": [{"text": "12", "kind": "number", "found": False}, {"text": "17", "kind": "boxed", "found": True}],
        "reveal": {
            "share": 0.65,
            "shown_tokens": 3,
            "total_tokens": 9,
            "shown_text": "Add [5] and 12.",
            "reference_text": "Add [5] and 12. So \\boxed{17}.",
        },
        "loss": 0.25,
        "selected": [2, 3],
        **changes,
    }


@pytest.fixture
def run_dir(tmp_path):
    RunFolder(tmp_path).write_samples(
        3, [line("a"), line("b", overlap=None, reveal=None, anchors=[]), line("a", loss=0.75)]
    )
    return tmp_path


def show(run_dir, **options):
    console = Console(file=io.StringIO(), force_terminal=options.pop("terminal", False), width=60)
    options.setdefault("tokenizer_decode", decode)
    return inspect_sample(run_dir, options.pop("step", 3), console=console, **options), console.file.getvalue()


def test_plain_text_has_marks(run_dir):
    text, printed = show(run_dir)
    assert printed == text + "\n"
    assert "\x1b" not in printed
    assert text.splitlines() == [
        "problem a, step 3: overlap 0.50, reveal 0.65, loss 0.2500 nats a token, 4 response tokens, 2 selected",
        "",
        "== Solution: 3 of 9 tokens shown",
        "Add [5] and 12.",
        "[hidden:  So \\boxed{17}.]",
        "",
        "== Anchors: 1 of 2 found in the response",
        "  + boxed    17",
        "  - number   12",
        "",
        "== Response, selected positions marked",
        "The sum[[ is]][[ 17]]",
    ]


def test_the_most_mass_outside_a_support_is_listed_first(tmp_path):
    sample = line("a", outside_mass=[0.0, 0.5, 0.1, 0.25], support_size=[1, 3, 2, 1])
    RunFolder(tmp_path).write_samples(3, [sample])
    _, printed = show(tmp_path)
    assert printed.splitlines()[-5:] == [
        "== Target's mass outside the support: mean 0.212",
        "  0.500 at position 1, 3 plausible; sampled: ' sum'",
        "  0.250 at position 3, 1 plausible; sampled: ' 17'",
        "  0.100 at position 2, 2 plausible; sampled: ' is'",
        "  0.000 at position 0, 1 plausible; sampled: 'The'",
    ]


def test_a_terminal_gets_colours_and_no_marks(run_dir):
    _, printed = show(run_dir, terminal=True)
    assert "\x1b[" in printed
    assert "[[" not in printed
    assert "[hidden" not in printed


def test_choice_by_index_and_by_problem(run_dir):
    assert show(run_dir, index=2)[0].startswith("problem a, step 3: overlap 0.50, reveal 0.65, loss 0.7500")
    assert show(run_dir, id="a", index=1)[0].startswith("problem a, step 3: overlap 0.50, reveal 0.65, loss 0.7500")
    assert "the teacher saw none" in show(run_dir, id="b")[0]


def test_a_solution_shown_whole_has_no_mark(run_dir):
    whole = {**line("a")["reveal"], "shown_text": "all", "reference_text": "all"}
    RunFolder(run_dir).write_samples(4, [line("a", reveal=whole)])
    assert "hidden" not in show(run_dir, step=4)[0]


@pytest.mark.parametrize(
    ("reveal", "title"),
    [
        ({"view": "gist"}, "== Solution (view gist): 3 of 9 tokens shown"),
        ({"solution": "wrong", "of": "p7"}, "== Solution of problem p7: 3 of 9 tokens shown"),
        ({"solution": "wrong"}, "== Solution: 3 of 9 tokens shown"),  # of a folder of an earlier version
        ({"solution": "peer_rollout", "peer": 2}, "== Response 2 to this problem, in place of the solution: 3 of 9"),
    ],
)
def test_whose_the_reference_is(run_dir, reveal, title):
    RunFolder(run_dir).write_samples(4, [line("a", reveal={**line("a")["reveal"], **reveal})])
    text, _ = show(run_dir, step=4)
    assert title in text
    assert "[hidden:  So \\boxed{17}.]" in text


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("none", "== Solution\nthe teacher saw none\n"),
        ("reference_free", "== Solution\nthe teacher saw none; its prompt was in thinking mode\n"),
    ],
)
def test_a_teacher_without_a_reference(run_dir, solution, text):
    nothing = {"share": 0.0, "shown_tokens": 0, "total_tokens": 0, "shown_text": "", "reference_text": ""}
    RunFolder(run_dir).write_samples(4, [line("a", reveal={**nothing, "solution": solution})])
    printed, _ = show(run_dir, step=4)
    assert text in printed
    assert "0 of 0" not in printed


def test_a_worked_example(run_dir):
    shown = {
        "share": 1.0,
        "shown_tokens": 9,
        "total_tokens": 9,
        "shown_text": "All of it.",
        "reference_text": "All of it.",
    }
    example = {**shown, "solution": "other_example", "of": "p7", "example": "What is it?"}
    RunFolder(run_dir).write_samples(4, [line("a", reveal=example)])
    lines = show(run_dir, step=4)[0].splitlines()
    start = lines.index("== Worked example, problem p7: 9 of 9 tokens shown")
    assert lines[start : start + 4] == [lines[start], "What is it?", "All of it.", ""]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"correct": True}, "2 selected, right\n"),
        ({"correct": False}, "2 selected, wrong\n"),
        ({"correct": False, "left_out": "wrong"}, "2 selected, wrong, left out: its answer is not right\n"),
        ({"correct": True, "left_out": "not_shortest"}, "2 selected, right, left out: a shorter response is right\n"),
        (
            {"correct": True, "left_out": "no_peer"},
            "2 selected, right, left out: no other right response can be shown\n",
        ),
    ],
)
def test_the_verdict(run_dir, changes, says):
    RunFolder(run_dir).write_samples(4, [line("a", **changes)])
    assert says in show(run_dir, step=4)[0]


def test_without_a_decoder_the_text_is_shown(run_dir):
    assert show(run_dir, tokenizer_decode=None)[0].endswith("\nThe sum is 17")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 9}, "no samples of step 9"),
        ({"index": 3}, "3 samples, 0 to 2; there is no index 3"),
        ({"index": -1}, "there is no index -1"),
        ({"id": "zz"}, "no sample of problem 'zz'; its problems begin with a, b"),
        ({"id": "b", "index": 1}, "problem 'b' in step 3 has 1 sample,"),
    ],
)
def test_what_is_not_there_is_a_user_error(run_dir, options, message):
    with pytest.raises(UserError, match=message):
        show(run_dir, **options)


def test_damaged_lines_are_counted_and_left_out(run_dir):
    file = RunFolder(run_dir).samples_file(3)
    with file.open("a") as stream:
        stream.write('[1]\n{"id": "c", "st')
    first, *rest = show(run_dir, index=1)[0].splitlines()
    assert first == f"{file}: 2 of 5 lines cannot be read and are left out"
    assert rest[1].startswith("problem b, step 3")
    file.write_text('{"id"')
    with pytest.raises(UserError, match=r"step_000003\.jsonl is damaged: none of its 1 line is a sample"):
        show(run_dir)


def test_a_loss_that_was_not_finite_is_none(run_dir):
    gap = {"largest": None, "position": 0, "above": 0}
    RunFolder(run_dir).write_samples(4, [line("a", loss=None, sampler_gap=gap)])
    text = show(run_dir, step=4)[0]
    assert text.startswith("problem a, step 3: overlap 0.50, reveal 0.65, loss none, 4 response tokens")
    assert "Largest differences" not in text


@pytest.mark.parametrize(
    "changes", [{"loss": "x"}, {"selected": 3}, {"reveal": {}}, {"anchors": [1]}, {"left_out": "odd"}, {"overlap": []}]
)
def test_a_damaged_sample_is_one_line(run_dir, changes):
    RunFolder(run_dir).write_samples(4, [line("a", **changes), line("b")])
    with pytest.raises(UserError, match=r"step_000004\.jsonl: the sample of problem 'a' is damaged \(.*choose another"):
        show(run_dir, step=4)
    assert show(run_dir, step=4, index=1)[0].startswith("problem b")


def made(path):
    """A run of the report's tests, and the model that its config.yaml names."""
    return make_run(path), yaml_of(path)["model"]["hf_path"]


def yaml_of(path, **changes):
    """What config.yaml has, with other sections if they are given."""
    file = path / "config.yaml"
    tree = {**read_config(file), **changes}
    file.write_text(to_yaml(tree))
    return tree


def test_a_config_of_another_version_still_marks(tmp_path, capsys):
    run, model = made(tmp_path / "run")
    yaml_of(run, model={"hf_path": model, "new_key": 1}, unknown=5)
    assert main(["inspect", "samples", str(run), "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("problem problem-0, step 1: ")
    assert "[[" in said


def test_a_model_that_moved_is_one_line_and_no_marks(tmp_path, capsys):
    run, model = made(tmp_path / "run")
    yaml_of(run, model={"hf_path": str(tmp_path / "gone")})
    assert main(["inspect", "samples", str(run), "1"]) == 0
    first, _, head, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("selected tokens are not marked: model.hf_path: there is no folder")
    assert head.startswith("problem problem-0, step 1: ")
    assert not [text for text in rest if "[[" in text]
    shutil.copytree(model, run / "hf" / "step_000003")  # an export has the tokenizer too
    assert main(["inspect", "samples", str(run), "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("problem problem-0")
    assert "[[" in said


@pytest.mark.parametrize("config", [None, "a: [", "model: 3"])
def test_without_settings_there_are_no_marks(tmp_path, capsys, config):
    run, _ = made(tmp_path / "run")
    (run / "config.yaml").unlink() if config is None else (run / "config.yaml").write_text(config)
    assert main(["inspect", "samples", str(run), "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("selected tokens are not marked: ")
    assert said.splitlines()[2].startswith("problem problem-0")
    assert main(["inspect", "samples", str(run), "9"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_folder_without_samples(tmp_path):
    with pytest.raises(UserError, match="it has no samples"):
        show(tmp_path)


def test_a_character_of_several_tokens_is_one_piece():
    assert pieces([1, 7, 8, 9, 2], {8}, decode) == [("The", False), ("∑", False), (" sum", False)]
    assert pieces([1, 7, 8, 9, 2], {2}, decode) == [("The", False), ("∑", True), (" sum", False)]


def test_bytes_that_are_no_character_do_not_swallow_the_rest():
    found = pieces([7, 7, 7, 7, 1, 7], {4}, decode)
    assert "".join(text for text, _ in found).startswith("�")
    assert ("The", True) in found


def test_the_real_tokenizer_gives_back_its_text():
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "qwen3_tokenizer"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside the repository")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Let ∀ y ∑ xᵢ = 你好 🧮. \\boxed{\\frac{1}{2}}"
    ids = tokenizer.encode(text).ids
    found = pieces(ids, set(), lambda part: tokenizer.decode(part, skip_special_tokens=False))
    assert "".join(piece for piece, _ in found) == text
