"""Which of several failures is reported as the end of a run, and how many ranks may be started."""

import signal

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.launch.exit_status import ended_by, reason
from megatron_paint.launch.failure_notes import NOTES_FOLDER, FailureNote, leave_failure_note, read_failure_notes
from megatron_paint.launch.local import number_of_processes

MISTAKE = FailureNote(text="megatron-paint: error: no such file", mistake=True, time_ns=2)
BUG = FailureNote(text="Traceback ...", mistake=False, time_ns=3)


def test_a_good_end():
    assert reason([0, 0], []) == ("", 0)


def test_the_earliest_note_decides():
    assert reason([2, 1], [MISTAKE, BUG]) == (MISTAKE.text, 2)
    assert reason([1, 2], [BUG, MISTAKE]) == (BUG.text, 1)


def test_a_killed_rank_is_the_cause_of_what_the_others_say():
    message, status = reason([1, -9], [BUG])
    assert status == 1
    assert message.startswith(
        "megatron-paint: error: rank 1 died of SIGKILL (signal 9): most often the kernel's out-of"
    )
    assert reason([None, -11, -9], [])[0].startswith("megatron-paint: error: ranks 1, 2 died of SIGSEGV (signal 11)")


def test_a_rank_that_aborts_has_rarely_begun():
    assert reason([-6, 1], [BUG]) == (BUG.text, 1)
    assert "rank 0 died of SIGABRT" in reason([-6, None], [])[0]
    assert "rank 1 died of SIGBUS" in reason([-6, -7], [])[0]


def test_other_ends():
    assert reason([0, 3], []) == ("megatron-paint: error: rank 1 ended with exit status 3", 1)
    assert reason([-34, 0], [])[0] == "megatron-paint: error: rank 0 died of SIGRTMIN (signal 34)"
    assert reason([-40, 0], [])[0] == "megatron-paint: error: rank 0 died of signal 40"
    assert ended_by(signal.SIGTERM) == ("megatron-paint: ended by SIGTERM", 143)
    assert ended_by(signal.SIGINT)[1] == 130


def test_notes_come_back_in_order(tmp_path, monkeypatch):
    monkeypatch.delenv(NOTES_FOLDER, raising=False)
    assert not leave_failure_note("nobody listens", mistake=True)
    monkeypatch.setenv(NOTES_FOLDER, str(tmp_path))
    for process, text in ((11, "first"), (10, "second")):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        assert leave_failure_note(text, mistake=text == "first")
    notes = read_failure_notes(tmp_path)
    assert [(note.text, note.mistake) for note in notes] == [("first", True), ("second", False)]


def test_one_process_a_gpu(monkeypatch):
    megatron = MegatronSettings(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert number_of_processes(megatron, None) == 4
    assert number_of_processes(megatron, 4) == 4
    with pytest.raises(UserError, match=r"--processes=5 is above the number of GPUs here, 4, .* give at most 4"):
        number_of_processes(megatron, 5)
    with pytest.raises(UserError, match="at least 1, got 0"):
        number_of_processes(megatron, 0)


def test_any_number_without_gpus(monkeypatch):
    megatron = MegatronSettings(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert number_of_processes(megatron, None) == 6
    assert number_of_processes(megatron, 64) == 64
