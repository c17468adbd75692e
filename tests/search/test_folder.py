"""search.yaml: no secrets in it, also not in the message about another search; a start that was killed."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.secrets import recorded_tree
from megatron_paint.search.folder import open_folder, read_folder


def tree(token, lr=1.0e-5):
    settings = {"optimizer": {"lr": lr}, "rollout": {"vllm": {"environment": {"HF_TOKEN": token}}}}
    return {"seed": 0, "space": {}, "settings": recorded_tree(settings)}


def test_a_search_of_an_earlier_version_which_has_secrets_continues(tmp_path):
    out = tmp_path / "search"
    open_folder(out, tree("hf_abc"))
    file = out / "search.yaml"
    assert "hf_abc" not in file.read_text()
    file.write_text(file.read_text().replace("(hidden)", "hf_abc"))
    read_folder(out, tree("hf_def"))
    with pytest.raises(UserError, match=r"optimizer\.lr: 1e-05 -> 0\.1") as error:
        read_folder(out, tree("hf_def", lr=0.1))
    assert "hf_" not in str(error.value)


def test_a_search_that_was_killed_in_its_first_write_can_be_repeated(tmp_path):
    (tmp_path / ".search.yaml.4711.unfinished").write_text("seed: ")
    open_folder(tmp_path, tree("hf_abc"))
    read_folder(tmp_path, tree("hf_abc"))
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*file is a file: give a folder"):
        open_folder(tmp_path / "file", tree("hf_abc"))


def test_a_damaged_file_is_named_with_what_it_is_for(tmp_path):
    (tmp_path / "search.yaml").write_text("seed: [1")
    with pytest.raises(UserError, match=r"^Cannot read .*search\.yaml: .*; a search keeps its settings, .*--out$"):
        read_folder(tmp_path, tree("hf_abc"))
