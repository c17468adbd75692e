"""The folder of a Megatron checkpoint: itself, or the iteration that the file above the iterations names."""

import re

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.megatron_folder import megatron_folder


def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    return folder


@pytest.mark.parametrize(
    ("text", "name"), [("5", "iter_0000005"), ("12345678\n", "iter_12345678"), ("release", "release")]
)
def test_the_named_iteration_is_followed(tmp_path, text, name):
    wanted = checkpoint(tmp_path / name)
    checkpoint(tmp_path / "iter_0000009")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert megatron_folder(tmp_path) == wanted


def test_a_checkpoint_is_its_own_folder(tmp_path):
    folder = checkpoint(tmp_path / "iter_0000005")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    assert megatron_folder(str(folder)) == folder


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("6", "names iter_0000006, but {0} has no such folder; give the folder of a checkpoint itself: iter_0000005"),
        ("", "latest_checkpointed_iteration.txt names no iteration"),
        ("five", "latest_checkpointed_iteration.txt names no iteration"),
    ],
)
def test_a_wrong_name_is_refused(tmp_path, text, says):
    checkpoint(tmp_path / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match=re.escape(says.format(tmp_path))):
        megatron_folder(tmp_path)


@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_a_folder_of_checkpoints_names_the_newest(tmp_path, below):
    for number in (2, 10):
        checkpoint(tmp_path / below / f"step_{number:06d}")
    with pytest.raises(UserError, match=r"is a folder of checkpoints: give one of them, such as \S+/step_000010$"):
        megatron_folder(tmp_path)


def test_the_old_format_is_named(tmp_path):
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(
        UserError, match=r"iter_0000005 is a checkpoint of Megatron's old format .* --ckpt-format torch_dist"
    ):
        megatron_folder(tmp_path)
