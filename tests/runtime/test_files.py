"""Files and folders are complete or absent, and a write that fails gives one clear error."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.hf_writer import copy_companions
from megatron_paint.run.folder import RunFolder
from megatron_paint.runtime.files import (
    COMPLETE,
    NewFolder,
    append_line,
    clear_left_overs,
    disk_errors,
    write_atomically,
)

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def fill(path, content, *, mark=False):
    """Replaces `path` by a folder with one file."""
    folder = NewFolder(path)
    folder.begin()
    (folder.unfinished / "weights").write_text(content)
    folder.finish(mark=mark)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EFBIG, "ulimit"),
        (errno.EIO, "check that"),
    ],
)
def test_a_failed_write_gives_one_clear_error(tmp_path, monkeypatch, code, advice):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    settings = {"run": {"resume": "never", "steps": 1}}
    with pytest.raises(UserError, match=advice):
        RunFolder(tmp_path / "x").prepare(settings)
    with pytest.raises(UserError, match=advice):
        append_line(tmp_path / "metrics.jsonl", "{}")
    with pytest.raises(UserError, match=advice):
        NewFolder(tmp_path / "hf").begin()
    assert names(tmp_path) == ["metrics.jsonl", "x"]


def test_a_run_dir_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/x"):
        RunFolder(tmp_path / "file" / "x").prepare({"run": {"resume": "never", "steps": 1}})


def test_a_new_line_starts_after_an_incomplete_one(tmp_path):
    """A power cut leaves an incomplete line."""
    file = tmp_path / "metrics.jsonl"
    append_line(file, "{}")
    file.write_bytes(file.read_bytes() + b'{"st')
    append_line(file, "[]")
    append_line(file, "[1]")
    assert file.read_text() == '{}\n{"st\n[]\n[1]\n'


@FULL
def test_a_full_disk_while_appending(tmp_path):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="No space left"):
        append_line(tmp_path / "metrics.jsonl", "{}")


@FULL
@pytest.mark.parametrize("tensors", [1, 100_000])
def test_the_error_of_torch_on_a_full_disk(tensors):
    message = r"Cannot write here: a write failed .* because the disk is full; free space"
    with pytest.raises(UserError, match=message), disk_errors("here"):
        torch.save(torch.zeros(tensors), "/dev/full")


def test_the_error_of_safetensors_on_a_missing_folder(tmp_path):
    message = "Cannot write here: No such file or directory; check that"
    with pytest.raises(UserError, match=message), disk_errors("here"):
        save_file({"a": torch.zeros(3)}, tmp_path / "nowhere" / "x.safetensors")


def test_an_export_names_the_missing_model(tmp_path):
    with pytest.raises(UserError, match=r"nowhere cannot be read .*an export copies from it"):
        copy_companions(tmp_path / "nowhere", tmp_path, dtype=torch.float32)


def test_other_errors_stay_what_they_are():
    for error in (KeyError("a"), RuntimeError("CUDA out of memory"), UserError("inline_container")):
        with pytest.raises(type(error)) as caught, disk_errors("here"):
            raise error
        assert caught.value is error


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_atomically(file, "old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="free space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["config.yaml"]


def test_a_finished_folder_replaces_the_old_one(tmp_path):
    fill(tmp_path / "a" / "hf", "old")
    assert names(tmp_path / "a" / "hf") == ["weights"]
    fill(tmp_path / "a" / "hf", "new", mark=True)
    assert names(tmp_path / "a") == ["hf"]
    assert names(tmp_path / "a" / "hf") == [COMPLETE, "weights"]
    assert (tmp_path / "a" / "hf" / "weights").read_text() == "new"


def test_all_files_of_a_folder_are_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"{b} has its name"), real_replace(a, b)))
    folder = NewFolder(tmp_path / "step")
    folder.begin()
    (folder.unfinished / "inner").mkdir()
    (folder.unfinished / "inner" / "weights").write_text("x")
    folder.finish(mark=True)
    inside = [str(folder.unfinished / name) for name in ("inner", "inner/weights", "")]
    marker, named = done.index(str(folder.unfinished / COMPLETE)), done.index(f"{folder.path} has its name")
    assert all(done.index(path.rstrip("/")) < marker for path in inside)
    assert marker < len(done) - 1 - done[::-1].index(str(folder.unfinished)) < named
    assert done[named + 1] == str(tmp_path)


@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("how", ["error", "crash"])
def test_an_end_between_the_renames_leaves_the_old_folder(tmp_path, monkeypatch, renames, how):
    fill(tmp_path / "hf", "old")
    real, done = os.replace, []

    def replace(source, target):
        if len(done) == renames:
            raise OSError(errno.EIO, "the disk is gone")
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(UserError, match="Cannot write"):
            fill(tmp_path / "hf", "new")
    if how == "error":
        NewFolder(tmp_path / "hf").discard()
    else:
        clear_left_overs(tmp_path)
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "weights").read_text() == "old"


def test_only_the_left_overs_of_a_crash_are_removed(tmp_path):
    fill(tmp_path / "step_000002", "old")
    NewFolder(tmp_path / "step_000004").begin()
    (tmp_path / ".config.yaml.123.unfinished").write_text("half")
    (tmp_path / ".hidden").write_text("mine")
    clear_left_overs(tmp_path)
    clear_left_overs(tmp_path / "nowhere")
    assert names(tmp_path) == [".hidden", "step_000002"]
