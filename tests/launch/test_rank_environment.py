"""The rank environment of a process, from the variables that torchrun and Slurm 22.05 set."""

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.launch.rank_environment import (
    PORTS,
    RankEnvironment,
    export_rank_environment,
    find_rank_environment,
    first_host,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29400"}
BATCH = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
}
SALLOC = {name: BATCH[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")}
STEP = BATCH | {
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
}
LONE_STEP = STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}
SHELL = LONE_STEP | {"SLURM_PTY_PORT": "46505"}


def test_torchrun():
    assert find_rank_environment(TORCHRUN) == RankEnvironment(rank=3, size=8, local_rank=1, address="h", port=29400)


def test_srun():
    environment = find_rank_environment(STEP)
    assert environment == RankEnvironment(
        rank=2, size=4, local_rank=0, address="n1", port=15000 + 11
    )  # 10 x job 1 + step 1
    assert find_rank_environment(STEP | {"SLURM_PROCID": "3"}).port == environment.port
    assert find_rank_environment(STEP | {"SLURM_STEP_ID": "2"}).port != environment.port
    assert find_rank_environment(STEP | {"SLURM_JOB_ID": "123456789"}).port in PORTS


def test_a_given_address_is_taken():
    environment = find_rank_environment(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "29500", "WORLD_SIZE": "4"})
    assert (environment.address, environment.port) == ("head", 29500)


NO_RANKS = {"nothing": {}, "batch script": BATCH, "salloc": SALLOC, "srun of one task": LONE_STEP, "srun --pty": SHELL}


@pytest.mark.parametrize("inside", NO_RANKS)
def test_no_ranks(inside):
    assert find_rank_environment(NO_RANKS[inside]) is None


def test_torchrun_wins_over_srun():
    assert find_rank_environment(STEP | TORCHRUN).size == 8
    assert find_rank_environment(SHELL | TORCHRUN).size == 8
    assert find_rank_environment({"RANK": "0", "WORLD_SIZE": "1"}).size == 1


def test_a_script_that_sets_ranks_may_leave_the_local_rank_to_srun():
    by_hand = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    assert find_rank_environment(STEP | by_hand | {"SLURM_LOCALID": "5"}).local_rank == 5


def test_export_sets_what_torch_reads():
    environ = STEP | {"MASTER_PORT": "29500", "MASTER_ADDR": ""}
    export_rank_environment(find_rank_environment(environ), environ)
    wanted = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert environ == STEP | wanted
    assert find_rank_environment(environ).rank == 2  # a second call finds the same ranks


def without(environ, name):
    return {key: value for key, value in environ.items() if key != name}


CONTRADICTIONS = {
    "rank without a size": ({"RANK": "0"}, "WORLD_SIZE is not set"),
    "size without a rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not"),
    "no local rank": (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
    "no address": (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set"),
    "no port": (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set"),
    "rank beyond the size": (TORCHRUN | {"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
    "rank is text": (TORCHRUN | {"RANK": "one"}, "RANK='one' must be an integer"),
    "not a port number": (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    "no number of tasks": (without(STEP, "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS is not set"),
    "no task number": (without(STEP, "SLURM_PROCID"), "SLURM_PROCID is not set"),
    "task beyond the step": (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be below SLURM_STEP_NUM_TASKS=4"),
    "no local task number": (without(STEP, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
    "no hosts": (without(STEP, "SLURM_STEP_NODELIST"), "set MASTER_ADDR"),
    "no job": (without(STEP, "SLURM_JOB_ID"), "SLURM_JOB_ID is not set"),
    "another size": (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, but srun started"),
    "a shell of several tasks": (STEP | {"SLURM_PTY_PORT": "46505"}, "srun --pty"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_one_clear_line(case):
    environ, says = CONTRADICTIONS[case]
    with pytest.raises(UserError) as error:
        find_rank_environment(environ)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# The first host that `scontrol show hostnames` prints.
HOSTS = {
    "node[01-03,7],x": "node01",
    "n[7,1-3]": "n7",
    "rack[1-2]node[1-3]": "rack1node1",
    "a,b[1-2]": "a",
    "x001": "x001",
}


@pytest.mark.parametrize("nodes", HOSTS)
def test_first_host(nodes):
    assert first_host(nodes) == HOSTS[nodes]
