"""The preflight over several processes that act as nodes: it names each faulty node, and every process ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a preflight."""

    status: dict[str, int | str]  # by node; "stopped" for one that stopped itself
    output: dict[str, str]
    report: dict | None
    excluded: list[str] | None
    seconds: float

    def failed(self) -> set[tuple[str, str]]:
        """Node and check of each result that is not ok."""
        return {(f["node"], f["check"]) for f in self.report["results"] if not f["ok"]}

    def seen(self, node: str, check: str) -> str:
        """What a failed check saw on a node."""
        (seen,) = [
            f["seen"] for f in self.report["results"] if (f["node"], f["check"], f["ok"]) == (node, check, False)
        ]
        return seen


def arguments(folder: Path, port: int, *, limit: int, run: str = "run") -> list[str]:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "settings.yaml").write_text(f"model: {{hf_path: {folder}}}\ndata: {{train: x.jsonl}}\n")
    given = {"run": folder / run, "rendezvous": f"127.0.0.1:{port}", "settings": folder / "settings.yaml"}
    given |= {"report": folder / "report.json", "exclude-bad": folder / "bad", "limit-seconds": limit}
    return [f"run.dir={folder / run}", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def preflight(folder: Path, *faults: dict | None, limit: int = 120, port: int | None = None) -> Ended:
    """Runs a node for each of `faults`, named n0, n1, ...; None never starts."""
    port = port or free_port()
    names = [f"n{rank}" for rank in range(len(faults))]
    nodes = []
    for rank, wrong in enumerate(faults):
        if wrong is not None:
            given = arguments(folder, port, limit=limit, run=wrong.get("run", "run"))
            given += ["--node-rank", str(rank), "--nodes", str(len(faults)), "--node-names", ",".join(names)]
            nodes.append({"name": names[rank], "arguments": given + wrong.get("arguments", []), "faults": wrong})
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.reliability.preflight_nodes", json.dumps({"nodes": nodes})]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert not left_processes(folder), "an orphan is left"
    assert not list((folder / "run" / "logs").glob("*")) or any(node["status"] == "stopped" for node in ended)
    report, bad = folder / "report.json", folder / "bad"
    return Ended(
        status={node["name"]: node["status"] for node in ended},
        output={node["name"]: node["output"] for node in ended},
        report=json.loads(report.read_text()) if report.exists() else None,
        excluded=bad.read_text().splitlines() if bad.exists() else None,
        seconds=time.monotonic() - began,
    )


def left_processes(folder: Path) -> list[str]:
    """Processes that still have this test's folder on their command line 20 s after its end."""
    deadline = time.monotonic() + 20
    while True:
        left = [line for line in command_lines() if str(folder) in line]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def command_lines() -> list[str]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_text(errors="replace"))
        except OSError:
            continue
    return lines


def test_every_check_passes(tmp_path):
    """One node reads the status late; the first node keeps the store open until then."""
    port = free_port()
    ended = preflight(tmp_path, {}, {"held_up": {"status": 1.0}}, {}, port=port)
    assert ended.status == {"n0": 0, "n1": 0, "n2": 0}
    assert ended.output["n0"].splitlines()[-1].startswith("preflight: 3 nodes ok in ")
    assert "preflight: all-reduce over the nodes: " in ended.output["n0"]
    assert ended.output["n1"] == ended.output["n2"] == ""
    assert ended.failed() == set()
    assert ended.excluded == []
    assert ended.report["bandwidth_gb_s"] > 0
    with socket.create_server(("", port)):  # free for training
        pass


def test_one_machine_by_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "megatron_paint.launch.preflight", *arguments(tmp_path, free_port(), limit=120)]
    done = subprocess.run([*command, "--expect-gpus", "0"], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("preflight: 1 node ok in ")


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five nodes; four of them have one or two faults."""
    return preflight(
        tmp_path_factory.mktemp("five"),
        {},
        {"run": "elsewhere"},
        {"versions": {"torch": "2.12.0", "triton": "absent"}, "free": 1000},
        {"ahead": 5.0},
        {"gpus": 0, "arguments": ["--expect-gpus", "2"]},
    )


def test_each_fault_is_found_where_it_is_and_nowhere_else(five):
    assert five.failed() == {
        ("n1", "shared folder"),
        ("n2", "packages"),
        ("n2", "space"),
        ("n3", "clock"),
        ("n4", "GPUs"),
    }
    assert set(five.status.values()) == {3}
    assert len(five.status) == 5


def test_a_fault_of_the_job_excludes_no_node(five):
    assert five.excluded == ["n1", "n2", "n3", "n4"]
    (space,) = [f for f in five.report["results"] if f["check"] == "space" and not f["ok"]]
    assert space["fault"] == "job"


def test_a_line_for_each_fault_shows_what_was_seen(five):
    lines = five.output["n0"].splitlines()
    assert len([line for line in lines if line.startswith("preflight: node n")]) == 5
    assert "n0 wrote into it: it is another folder" in five.seen("n1", "shared folder")
    assert five.seen("n2", "packages") == "torch is 2.12.0, but 2.13.0 on 4 of 5 nodes"
    assert five.seen("n2", "space").startswith("0.0 GB free at ")
    assert five.seen("n3", "clock").startswith("5.0 s ahead of the other nodes")
    assert five.seen("n4", "GPUs") == "0 visible, 2 expected"
    assert lines[-1].startswith("preflight: 4 of 5 nodes not ok in ")
    assert lines[-1].endswith(": n1, n2, n3, n4")


def test_a_node_that_stops_in_the_sum(tmp_path):
    """In real time: the two other nodes are well, although their sums hang until their time is up.

    tests/launch/test_preflight_protocol.py has this and other waits on a simulated clock.
    """
    ended = preflight(tmp_path, {}, {}, {"stops": True}, limit=30)
    assert ended.status == {"n0": 3, "n1": 3, "n2": "stopped"}
    assert ended.failed() == {("n2", "answers")}
    assert ended.seen("n2", "answers") == "stopped answering in the all-reduce over all nodes"
    assert ended.excluded == ["n2"]
    assert ended.report["seconds"] < 30


@pytest.fixture(scope="module")
def waits(tmp_path_factory):
    """Preflights that wait in real time until their time is up, side by side; and the port that was taken."""
    folder = {name: tmp_path_factory.mktemp(name) for name in ("absent", "first_stops", "taken")}
    with socket.socket() as taken, ThreadPoolExecutor() as pool:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        runs = {
            "absent": pool.submit(preflight, folder["absent"], {}, {}, None, limit=60),
            "first_stops": pool.submit(preflight, folder["first_stops"], {"stops": True}, {}, limit=60),
            "taken": pool.submit(preflight, folder["taken"], {}, {}, limit=20, port=port),
        }
        return {name: run.result() for name, run in runs.items()} | {"port": port}


@pytest.mark.long
def test_a_node_that_never_starts(waits):
    ended = waits["absent"]
    assert ended.status == {"n0": 3, "n1": 3}
    assert ended.failed() == {("n2", "join")}
    assert "preflight: node n2: join: did not join within 24 s; check that it was started" in ended.output["n0"]
    assert ended.excluded == ["n2"]
    assert ended.report["seconds"] < 60


@pytest.mark.long
def test_the_first_node_stops(waits):
    ended = waits["first_stops"]
    assert ended.status == {"n0": "stopped", "n1": 3}
    assert ended.output["n1"] == "preflight: node n1: time is up after 60 s, in the wait for the status of n0\n"


@pytest.mark.long
def test_a_port_that_is_taken(waits):
    ended, port = waits["taken"], waits["port"]
    assert ended.status == {"n0": 3, "n1": 3}
    assert ended.seen("n0", "rendezvous").startswith(f"port {port} is taken by process {os.getpid()} (")
    assert ended.output["n1"] == (
        f"preflight: node n1: rendezvous: the listener at 127.0.0.1:{port} is not the preflight of the first node (it "
        "does not answer); read the first node's message\n"
    )


def test_a_node_that_adds_another_number(tmp_path):
    ended = preflight(tmp_path, {}, {"adds": 7.0}, {})
    assert set(ended.status.values()) == {3}
    assert ended.failed() == {("n1", "all-reduce over all nodes")}
    assert ended.seen("n1", "all-reduce over all nodes").startswith("the sum is wrong on 3 of 3 nodes")


def test_the_token_is_removed_if_a_signal_ends_it(tmp_path):
    port = free_port()
    given = arguments(tmp_path, port, limit=120)
    command = [sys.executable, "-m", "megatron_paint.launch.preflight", *given]
    lone = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run" / "logs").glob(".preflight_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    lone.send_signal(signal.SIGTERM)
    assert lone.wait(60) == 128 + signal.SIGTERM
    assert list((tmp_path / "run" / "logs").iterdir()) == []
    assert not left_processes(tmp_path)
