"""Each check of the preflight alone, with given answers."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.config.objective import ObjectiveSettings
from megatron_paint.config.objective import TeacherSettings as Teacher
from megatron_paint.config.settings import DataSettings, LoraSettings, ModelSettings, RunSettings, Settings
from megatron_paint.launch.preflight import blame, clock, gpus, nvidia, packages, port, shared, space
from megatron_paint.launch.preflight.collective import SumResult, bus_bandwidth
from megatron_paint.launch.preflight.identity import find_node
from megatron_paint.launch.preflight.options import parse
from megatron_paint.launch.preflight.report import failure_lines, summary
from megatron_paint.launch.preflight.result import CheckResult, faulty_nodes
from megatron_paint.models.shape import ModelShape
from megatron_paint.planning.memory import checkpoint_bytes
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
NEEDED = ["--run", "r", "--rendezvous", "h:29500", "--settings", "s.yaml"]
SHAPE = ModelShape(
    source="config.json",
    vocab_size=10,
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    num_groups=1,
    head_dim=2,
    ffn_size=6,
    tied=True,
    qk_norm=True,
    qkv_bias=False,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=64,
    dtype="bfloat16",
)


def settings(*, lora: LoraSettings | None = None, **objective: object) -> Settings:
    return Settings(
        model=ModelSettings(hf_path="m", lora=lora),
        data=DataSettings(train="x"),
        run=RunSettings(dir="r"),
        objective=ObjectiveSettings(**objective),
    )


def bad(node: str, check: str = "GPUs", fault: str = "node") -> CheckResult:
    return CheckResult(check=check, ok=False, seen="broken", advice="mend it", node=node, fault=fault)


def good(node: str, check: str = "GPUs") -> CheckResult:
    return CheckResult(check=check, ok=True, seen="well", node=node)


# Who is left out


def test_a_bad_node_among_good_ones_is_at_fault():
    assert faulty_nodes([good("a"), bad("b"), good("c")], ["a", "b", "c"]) == ["b"]


def test_what_all_fail_is_nobodys_fault():
    assert faulty_nodes([bad("a"), bad("b")], ["a", "b"]) == []


def test_nodes_that_were_not_checked_do_not_count_as_right():
    results = [bad("a"), bad("b"), bad("c", "join"), good("a", "join"), good("b", "join")]
    assert faulty_nodes(results, ["a", "b", "c"]) == ["c"]


def test_a_lone_node_is_at_fault_for_its_gpus_and_not_for_the_settings():
    assert faulty_nodes([bad("a")], ["a"]) == ["a"]
    assert faulty_nodes([bad("a", "settings", "odd")], ["a"]) == []
    assert faulty_nodes([bad("a", "settings", "odd"), good("b", "settings")], ["a", "b"]) == ["a"]
    assert faulty_nodes([bad("a", "space", "job"), good("b", "space")], ["a", "b"]) == []


def test_lines_name_all_nodes_that_fail_alike():
    assert failure_lines([bad("a"), bad("c"), bad("b", "clock")]) == [
        "preflight: nodes a, c: GPUs: broken; mend it",
        "preflight: node b: clock: broken; mend it",
    ]
    assert summary(["a", "b", "c"], [bad("c"), bad("a")], 7.21) == "preflight: 2 of 3 nodes not ok in 7.2 s: a, c"
    assert summary(["a", "b", "c", "d"], [], 7.21) == "preflight: 4 nodes ok in 7.2 s"


# Place and command line


def test_slurm_says_which_node_this_is(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = {"SLURM_NODEID": "1", "SLURM_NNODES": "3", "SLURMD_NODENAME": "n2", "SLURM_JOB_NODELIST": "n[1-3]"}
    node = find_node(environ, rank=None, count=None, name=None, names=None)
    assert (node.rank, node.name, node.names, node.first) == (1, "n2", ("n1", "n2", "n3"), "n1")


def test_options_go_before_slurm_and_labels_stand_for_names():
    environ = {"SLURM_NODEID": "1", "SLURM_NNODES": "3", "SLURMD_NODENAME": "n2"}
    node = find_node(environ, rank=0, count=2, name="x", names=None)
    assert (node.rank, node.names) == (0, ("x", "node 1"))


def test_without_slurm_it_is_the_only_node():
    node = find_node({}, rank=None, count=None, name=None, names=None)
    assert (node.rank, node.names) == (0, (socket.gethostname(),))


@pytest.mark.parametrize(
    ("environ", "given", "message"),
    [
        ({"SLURM_LOCALID": "1"}, {}, "SLURM_LOCALID=1: .*--ntasks-per-node=1"),
        ({"SLURM_NODEID": "x"}, {}, "SLURM_NODEID='x' must be a whole number"),
        ({}, {"rank": 2, "count": 2}, "--node-rank 2 must be from 0 and below the number of nodes, 2"),
        ({}, {"count": 3, "names": "a,b"}, "--node-names has 2 names for 3 nodes"),
    ],
)
def test_places_that_cannot_be(environ, given, message):
    with pytest.raises(UserError, match=message):
        find_node(environ, **{"rank": None, "count": None, "name": None, "names": None, **given})


def test_overrides_stand_among_options():
    options = parse([*NEEDED, "a.b=1", "c.d=2", "--expect-gpus", "8"])
    assert (options.overrides, options.expect_gpus, options.limit_seconds) == (("a.b=1", "c.d=2"), 8, 60)
    assert (options.rendezvous.host, options.rendezvous.port) == ("h", 29500)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rendezvous", "h"], "--rendezvous 'h' must be HOST:PORT"),
        (["--rendezvous", "h:70000"], "--rendezvous 'h:70000' must be HOST:PORT"),
        (["stray"], "unknown argument 'stray'"),
        (["--limit-seconds", "1"], "--limit-seconds 1 must be at least 5"),
        (["--bandwidth-floor", "0"], "--bandwidth-floor 0 must be above 0"),
        (["--expect-gpus", "-1"], "--expect-gpus -1 must be 0 or more"),
        (["--nodes", "two"], "argument --nodes: invalid int value: 'two'"),
    ],
)
def test_arguments_that_cannot_be(more, message):
    with pytest.raises(UserError, match=message):
        parse([*NEEDED, *more])


def test_a_mistake_ends_with_2_and_one_line():
    command = [sys.executable, "-m", "megatron_paint.launch.preflight", *NEEDED, "--node-rank", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 2
    assert done.stderr == (
        "preflight: error: --node-rank 3 must be from 0 and below the number of nodes, 1 (--nodes)\n"
    )


def test_importing_it_imports_no_torch():
    code = "import sys, megatron_paint.launch.preflight.command; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)


# Packages, GPUs


def test_the_odd_one_out_is_named_and_blamed():
    seen = {"a": {"torch": "2"}, "b": {"torch": "1"}, "c": {"torch": "2"}}
    results = {f.node: f for f in packages.compare_nodes("packages", seen, "install")}
    assert [node for node, f in results.items() if not f.ok] == ["b"]
    assert (results["b"].seen, results["b"].fault) == ("torch is 1, but 2 on 2 of 3 nodes", "node")


def test_without_a_majority_nobody_is_blamed():
    results = packages.compare_nodes("packages", {"a": {"torch": "2"}, "b": {"torch": "1"}}, "install")
    assert [(f.ok, f.fault, f.seen) for f in results] == [(False, "job", "torch differs: 2 on a, 1 on b")] * 2


def test_versions_name_what_is_absent():
    versions = packages.versions()
    assert list(versions) == [*packages.DISTRIBUTIONS, "megatron_paint", "CUDA driver"]
    assert all(versions.values())


def test_gpus_against_their_expected_number():
    result, count = gpus.check_gpus(lambda: 7, 8)
    assert (result.ok, result.seen, count) == (False, "7 visible, 8 expected", 7)
    result, count = gpus.check_gpus(lambda: 0, 0)
    assert (result.ok, result.seen, count) == (True, "none, and none expected", 0)


def test_a_product_has_its_value():
    assert gpus.multiplies_correctly("cpu")


def test_nvidia_smi_is_read():
    assert nvidia.read_health(nvidia.HEALTH, ["0", "No", "Not Active", "[N/A]", "Not Active"]) == []
    assert nvidia.read_health(nvidia.HEALTH, ["3", "Yes", "Not Active", "Active", "[N/A]"]) == [
        "(uncorrected ECC errors since the last reset: 3; reset the GPU)",
        "(memory pages are waiting to be retired: Yes; reboot the node)",
        "(it is too hot: Active; check its cooling)",
    ]
    assert nvidia.read_health(nvidia.ROWS, ["0", "1"]) == [
        "(a memory row could not be remapped: 1; have the GPU replaced)"
    ]


def test_only_the_jobs_own_gpus_are_asked_for_their_health(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase $1 in\n--query-gpu=index,uuid) printf '0, GPU-aa\\n1, GPU-bb\\n';;\n"
        "--query-gpu=driver_version) printf '580.1\\n580.1\\n';;\n"
        "--query-gpu=uuid,*) printf 'GPU-aa, 2, No, Not Active, Not Active, Not Active\\n"
        "GPU-bb, 0, No, Not Active, Not Active, Not Active\\n';;\n*) exit 1;;\nesac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    errors = "GPU 0 (uncorrected ECC errors since the last reset: 2; reset the GPU)"
    assert nvidia.health_problems({}) == [errors]
    assert nvidia.health_problems({"CUDA_VISIBLE_DEVICES": "0,1"}) == [errors]
    assert nvidia.health_problems({"CUDA_VISIBLE_DEVICES": "1"}) == []
    assert nvidia.health_problems({"CUDA_VISIBLE_DEVICES": "GPU-aa"}) == [errors]
    assert nvidia.driver_version() == "580.1"


# Disk


def disk(free: int, inodes: int = 1000, all_inodes: int = 1000):
    return lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_files=all_inodes, f_favail=inodes)


def test_bytes_of_a_checkpoint():
    # By hand: a layer has 4*2*(2*2+2*1) + 2*2 attention, 3*4*6 feed-forward and 2*4 norms: 132; embedding 40, norm 4.
    weights = 2 * 132 + 40 + 4
    assert SHAPE.num_parameters == weights
    assert checkpoint_bytes(settings(teacher=Teacher(weights="current")), SHAPE) == weights * (2 + 12)
    assert checkpoint_bytes(settings(), SHAPE) == weights * (2 + 12 + 2)
    anchored = Teacher(weights="ema", ema_anchor=0.1)
    assert checkpoint_bytes(settings(teacher=anchored), SHAPE) == weights * (2 + 12 + 4 + 2)
    # Rank 1 on q, k, v, o, gate, up, down: (4+4) + (4+2) + (4+2) + (4+4) + 3*(4+6), in each of two layers.
    adapters = 2 * 58
    adapted = checkpoint_bytes(settings(lora=LoraSettings(rank=1)), SHAPE)
    assert adapted == weights * 2 + adapters * (2 + 12)


def test_room_for_two_checkpoints(tmp_path):
    run = tmp_path / "not_yet" / "run"
    assert space.room(run, 100_000_000, 10, disk(100_000_000)).ok
    short = space.room(run, 100_000_001, 10, disk(100_000_000))
    assert (short.ok, short.fault) == (False, "job")
    assert short.seen == f"0.1 GB free at {tmp_path}, but two checkpoints need about 0.2 GB and 10 files"
    assert space.room(run, 1, 10, disk(100, inodes=9)).seen.startswith(f"9 inodes free at {tmp_path}")
    assert space.room(run, 1, 10, disk(100, inodes=0, all_inodes=0)).ok  # a file system that counts none


def test_settings_that_cannot_be_read(tmp_path):
    (result,) = space.check_space(tmp_path, tmp_path / "none.yaml", [], ranks=1, statvfs=os.statvfs)
    assert (result.check, result.ok, result.fault) == ("settings", False, "odd")
    assert result.seen == f"settings file {tmp_path / 'none.yaml'} does not exist"


def test_a_token_goes_there_and_back(tmp_path):
    assert shared.write_token(tmp_path, "x", "secret").ok
    assert shared.answer(tmp_path, "x", "secret", rank=1, node="b", first="a").ok
    assert shared.missing_answers(tmp_path, "x", "secret", {1: "b"}, first="a") == {}
    shared.remove_token(tmp_path, "x")
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_token_that_reads_otherwise_and_an_answer_that_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "PATIENCE", 0.2)
    shared.write_token(tmp_path, "x", "secret")
    other = shared.answer(tmp_path, "x", "secreT", rank=1, node="b", first="a", patience=0.2)
    assert "a file of 6 bytes in " in other.seen
    assert "differs from what a wrote" in other.seen
    missing = shared.missing_answers(tmp_path, "x", "secret", {1: "b"}, first="a")
    assert list(missing) == ["b"]


def test_what_killed_preflights_left_is_removed_when_it_is_old(tmp_path):
    for name, age in (("old", 7200), ("young", 60)):
        folder = shared.canary_folder(tmp_path, name)
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    shared.write_token(tmp_path, "x", "secret")
    assert sorted(entry.name for entry in (tmp_path / "logs").iterdir()) == [".preflight_x", ".preflight_young"]


# Clocks, address


def test_a_clock_beyond_a_second_and_its_uncertainty():
    def offset(seconds: float, trip: float = 0.0) -> clock.Offset:
        return clock.Offset(seconds=seconds, round_trip=trip)

    def late(**offsets: clock.Offset) -> list[str]:
        return [result.node for result in clock.compare(offsets) if not result.ok]

    assert late(a=offset(0), b=offset(0.9), c=offset(1.1)) == []  # from the median, 0.9
    assert late(a=offset(0), b=offset(1.2), c=offset(0.1)) == ["b"]
    assert late(a=offset(0), b=offset(5), c=offset(5.1)) == ["a"]
    assert late(a=offset(0), b=offset(-1.2)) == ["b"]
    assert late(a=offset(0), b=offset(1.2, trip=0.5)) == []
    assert late(a=offset(0)) == []


def test_a_port_that_is_taken_says_by_whom():
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(port.Unusable, match=rf"port {number} is taken by process {os.getpid()} \("):
            port.listen(port.Rendezvous(host="127.0.0.1", port=number))


def test_an_address_that_is_not_the_first_nodes():
    with pytest.raises(port.Unusable, match=r"192\.0\.2\.1 is not an address of the first node"):
        port.listen(port.Rendezvous(host="192.0.2.1", port=29500))


def test_nobody_listens():
    number = free_port()
    with pytest.raises(port.Unusable, match=f"cannot reach the first node at 127.0.0.1:{number} within"):
        port.reach(port.Rendezvous(host="127.0.0.1", port=number), time.monotonic() + 0.5)


# Who is to blame for a sum


def blamed(
    results: dict[str, SumResult], silent: tuple[str, ...] = (), floor: float | None = None
) -> list[CheckResult]:
    ranks = {node: [rank] for rank, node in enumerate(results)}
    return [f for f in blame.blame_nodes(results, ranks, silent=silent, floor=floor) if not f.ok]


def stalled(progress: int, kind: str = "stalled") -> SumResult:
    return SumResult(problem="it did not end in time", kind=kind, progress=progress)


def test_of_those_that_stalled_the_one_that_came_least_far_is_named():
    found = blamed({"a": stalled(2), "b": stalled(1), "c": stalled(2)})
    assert [(f.node, f.fault) for f in found] == [("b", "node")]


def test_a_process_that_died_goes_before_those_that_waited_for_it():
    found = blamed({"a": stalled(2), "b": stalled(2, "killed"), "c": stalled(2, "error")})
    assert [(f.node, f.fault) for f in found] == [("b", "node")]


def test_where_all_wait_alike_nobody_is_blamed():
    found = blamed({"a": stalled(0), "b": stalled(0)})
    assert [(f.node, f.fault) for f in found] == [("a", "job"), ("b", "job")]


def test_who_waited_for_a_silent_node_is_not_named():
    assert blamed({"a": stalled(2), "b": stalled(2)}, silent=("c",)) == []


def test_a_wrong_sum_is_blamed_on_the_node_whose_part_is_wrong():
    wrong = SumResult(wrong_sum=True, wrong_ranks=(1,))
    assert [f.node for f in blamed({"a": wrong, "b": wrong, "c": wrong})] == ["b"]
    assert [f.node for f in blamed({"a": SumResult(), "b": SumResult(), "c": SumResult(wrong_sum=True)})] == ["c"]


def test_the_floor():
    results = {"a": SumResult(bandwidth=10.0), "b": SumResult(bandwidth=9.0)}
    assert blamed(results, floor=9.0) == []
    assert [f.seen for f in blamed(results, floor=9.5)] == ["9 GB/s, below the floor of 9.5 GB/s"] * 2


def test_bus_bandwidth():
    assert bus_bandwidth(8_000_000_000, 4, 2.0) == pytest.approx(6.0)  # 2 * 3/4 of 4 GB/s
