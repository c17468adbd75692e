"""The file of a trace: parts become one, and a disk that refuses leaves nothing."""

import errno
import gzip
import json
import os
from dataclasses import dataclass

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.run.trace import Operator
from megatron_paint.training import trace_file
from megatron_paint.training.trace_file import write_trace


@dataclass
class Part:
    """What torch's profiler would write: the text, or as much of it as the disk takes."""

    text: str
    taken: int | None = None

    def export_chrome_trace(self, path):
        whole = self.taken is None
        with open(path if whole else f"{path}.tmp", "w") as file:
            file.write(self.text[: self.taken])


def part(base, *events):
    return Part(json.dumps({"baseTimeNanoseconds": base, "deviceProperties": [], "traceEvents": list(events), "x": 1}))


def op(name, start, took):
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": took, "tid": 1}


def phase(name, start, took):
    return {**op(name, start, took), "cat": "user_annotation"}


def arrow(kind, number, at):
    return {"ph": kind, "cat": "fwdbwd", "id": number, "ts": at}


FIRST = (phase("mask", 0.0, 100.0), op("mm", 10.0, 60.0), arrow("s", 7, 11.0), arrow("f", 7, 12.0))
SECOND = (phase("student", 5.0, 50.0), op("mm", 15.0, 20.0), arrow("s", 7, 16.0), {"ph": "M", "name": "process_name"})


def read(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def test_a_single_trace_is_kept_as_it_is(tmp_path):
    only = part(3, *FIRST)
    summary = write_trace([only], tmp_path / "profile" / "t.json.gz", phases=["mask"])
    assert gzip.decompress((tmp_path / "profile" / "t.json.gz").read_bytes()).decode() == only.text
    assert summary.cpu["mask"] == [
        Operator(name="mm", calls=1, seconds=6e-5),
        Operator(name="(no operator)", calls=1, seconds=4e-5),
    ]


def test_parts_become_one_trace(tmp_path):
    """The second one counts from 2 ms later."""
    summary = write_trace(
        [part(0, *FIRST), part(2_000_000, *SECOND)], tmp_path / "t.json.gz", phases=["mask", "student"]
    )
    found = read(tmp_path / "t.json.gz")
    assert {key: value for key, value in found.items() if key != "traceEvents"} == {
        "baseTimeNanoseconds": 0,
        "deviceProperties": [],
    }
    later = [{**event, "ts": event["ts"] + 2000.0} if "ts" in event else event for event in SECOND]
    later[2]["id"] = 7 + 2**32
    assert found["traceEvents"] == [*FIRST, *later]
    assert {name: [(one.name, one.calls) for one in of] for name, of in summary.cpu.items()} == {
        "mask": [("mm", 1), ("(no operator)", 1)],
        "student": [("(no operator)", 1), ("mm", 1)],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["t.json.gz"]


@pytest.mark.parametrize("taken", [0, 50])
def test_a_disk_that_is_full_when_torch_writes(tmp_path, taken):
    """torch then leaves a part of the file under another name, and reports nothing."""
    cut = part(0, *SECOND)
    cut.taken = taken
    with pytest.raises(
        UserError, match=r"^Cannot write .*/t\.json\.gz: torch's profiler wrote no complete trace, .*disk"
    ):
        write_trace([part(0, *FIRST), cut], tmp_path / "t.json.gz", phases=[])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_it_is_compressed(tmp_path, monkeypatch):
    def full(source, target, length):
        target.write(source.read(20))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "t.json.gz").write_text("an earlier one")
    monkeypatch.setattr(trace_file.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"^Cannot write .*/t\.json\.gz: No space left on device; free space there"):
        write_trace([part(0, *FIRST)], tmp_path / "t.json.gz", phases=[])
    assert [file.name for file in tmp_path.iterdir()] == ["t.json.gz"]
    assert (tmp_path / "t.json.gz").read_text() == "an earlier one"
