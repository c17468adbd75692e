"""The section `domains`: what is refused, the saved settings of a run, and the descriptions of its keys."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config import describe
from megatron_paint.config.domains import DomainSettings, domain_of, known_domains
from megatron_paint.config.load import domains_of, evaluate_settings_of, load_settings, settings_of
from megatron_paint.config.saved import forbidden_changes, to_yaml
from megatron_paint.config.tree import settings_tree

SMALLEST = {"model": {"hf_path": "m"}, "data": {"train": "p.jsonl"}, "run": {"dir": "r", "resume": "auto"}}


def test_domains_of_a_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(
        "model: {hf_path: m}\ndata: {train: p, domain: code, columns: {domain: kind}}\nrun: {dir: r}\n"
        "domains:\n  code: {anchors: code, grader: 'my_tests:run'}\n  words: {grader: exact, ignore_case: true}\n"
    )
    settings = load_settings(file, ["domains.words.white_space=remove"])
    assert settings.domains == {
        "code": DomainSettings(anchors="code", grader="my_tests:run"),
        "words": DomainSettings(grader="exact", ignore_case=True, white_space="remove"),
    }
    assert settings.domains["code"].function == "my_tests:run"
    assert settings.domains["words"].function is None
    assert known_domains(settings.domains) == ("code", "words", "math")


def test_mathematics_is_known_without_settings_and_may_have_some():
    assert domain_of({}, "math") == DomainSettings()
    assert domain_of({"math": DomainSettings(grader="exact")}, "math").grader == "exact"
    with pytest.raises(KeyError):
        domain_of({}, "code")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": {"a b": {}}}, r"^domains\.a b: 'a b' is no name of a domain: use letters, digits, - and _$"),
        (
            {"domains": {"x": {"grader": "mathe"}}},
            r"^domains\.x\.grader=mathe is no grader: the graders are math, exact",
        ),
        ({"domains": {"x": {"grader": "a:b:c"}}}, r"domains\.x\.grader=a:b:c is no grader: .* and module:function for"),
        ({"domains": {"x": {"grader": "a.py:b"}}}, None),
        ({"domains": {"x": {"grader": "./a:b"}}}, r"is no grader"),
        ({"domains": {"x": {"grader": "regex"}}}, r"^domains\.x\.pattern is not set: grader=regex searches for it"),
        ({"domains": {"x": {"grader": "regex", "pattern": "("}}}, r"domains\.x\.pattern=\( is no regular expression"),
        (
            {"domains": {"x": {"grader": "regex", "pattern": "a"}}},
            r"has 0 groups; it must have one, which is the answer",
        ),
        ({"domains": {"x": {"grader": "regex", "pattern": "(a)(b)"}}}, r"has 2 groups; it must have one"),
        ({"domains": {"x": {"pattern": "(a)"}}}, r"domains\.x\.pattern belongs to grader=regex, but grader=math"),
        ({"domains": {"x": {"ignore_case": True}}}, r"domains\.x\.ignore_case=true belongs to grader=exact and regex"),
        (
            {"domains": {"x": {"grader": "m:f", "white_space": "remove"}}},
            r"domains\.x\.white_space=remove belongs to grader=exact and regex, but grader=m:f; leave white_space out",
        ),
        (
            {"domains": {"x": {"graders": "exact"}}},
            r"^unknown setting domains\.x\.graders: did you mean domains\.x\.grader",
        ),
        ({"domains": {"x": "exact"}}, r"domains\.x is a section of settings, got 'exact'"),
        (
            {"domains": {"x": {"white_space": "all"}}},
            r"domains\.x\.white_space \(grader=exact, regex: strip: .*got 'all'",
        ),
        (
            {"data": {"train": "p", "domain": "code"}},
            r"^data\.domain=code is no domain: the domains are math; add it to",
        ),
        ({"evaluation": {"domain": "code"}}, r"^evaluation\.domain=code is no domain: the domains are math"),
    ],
)
def test_contradictions(changes, message):
    if message is None:
        settings_of(SMALLEST | changes)
        return
    for read in (settings_of, evaluate_settings_of) if "data" not in changes else (settings_of,):
        with pytest.raises(UserError, match=message):
            read(SMALLEST | changes)


def test_the_evaluation_has_them_too():
    tree = {"model": {"hf_path": "m"}, "domains": {"x": {"grader": "choice"}}, "evaluation": {"domain": "x"}}
    assert evaluate_settings_of(tree).domains == domains_of(tree) == {"x": DomainSettings(grader="choice")}


WITH_CODE = {"domains": {"code": {"grader": "exact"}}}


class TestSavedRuns:
    def trees(self, old, new):
        trees = [settings_tree(settings_of(SMALLEST | changes)) for changes in (old, new)]
        return {"old": trees[0], "new": trees[1]}

    def test_a_run_of_a_version_without_domains_resumes(self):
        trees = self.trees({}, {})
        old = {key: value for key, value in trees["old"].items() if key != "domains"}
        old["data"] = {key: value for key, value in old["data"].items() if key != "domain"}
        old["data"]["columns"] = {"id": "id", "problem": "problem", "solution": "solution", "answer": "answer"}
        assert forbidden_changes(old=old, new=trees["new"]) == []

    def test_another_grader_needs_permission(self):
        trees = self.trees(WITH_CODE, {"domains": {"code": {"grader": "choice"}}})
        assert forbidden_changes(**trees) == ["domains.code.grader: 'exact' -> 'choice'"]
        trees["new"]["run"]["allow_changes"] = ["domains.code.grader"]
        assert forbidden_changes(**trees) == []

    def test_the_setting_may_be_named_in_allow_changes(self):
        run = SMALLEST["run"] | {"allow_changes": ["domains.code.grader"]}
        assert settings_of(SMALLEST | WITH_CODE | {"run": run}).run.allow_changes == ("domains.code.grader",)
        for name, message in (("domains.code", "is a section"), ("domains.code.grade", "unknown setting")):
            with pytest.raises(UserError, match=message):
                settings_of(SMALLEST | WITH_CODE | {"run": SMALLEST["run"] | {"allow_changes": [name]}})

    def test_they_are_written_and_read(self, tmp_path):
        settings = settings_of(SMALLEST | {"domains": {"x": {"grader": "regex", "pattern": "=(.*)"}, "y": {}}})
        (tmp_path / "config.yaml").write_text(to_yaml(settings))
        assert load_settings(tmp_path / "config.yaml") == settings


def test_descriptions_have_a_name_in_place_of_the_users():
    (section,) = describe.find("domains")
    assert section.key == "domains.NAME"
    assert describe.find("domains.code") == (section,)
    (one,) = describe.find("domains.code.grader")
    assert [setting.key for setting in one.settings] == ["domains.NAME.grader"]
    with pytest.raises(UserError, match="unknown setting"):
        describe.find("domains.code.grade")
