"""slurm.conf, gres.conf and the hosts file of a cluster whose files are in one folder."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

LOGIN = "login"
NETWORK = "10.77.0"  # in namespaces without a way out, so that it cannot clash with a real one


def address(host: str) -> str:
    """10.77.0.1 of the login host, 10.77.0.11 and on of n1 and on."""
    return f"{NETWORK}.1" if host == LOGIN else f"{NETWORK}.{10 + int(host.removeprefix('n'))}"


def write_configuration(folder: Path, nodes: Sequence[str], *, gpus: int, cpus: int, memory_mb: int) -> None:
    """Writes the files and the GPUs' devices into an empty folder."""
    for name in ("state", "log", "devices", "jobs"):
        (folder / name).mkdir()
    for gpu in range(gpus):  # copies of /dev/null: Slurm counts and assigns them, and never opens them
        os.mknod(folder / f"devices/nvidia{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    devices = f"Name=gpu File={folder}/devices/nvidia[0-{gpus - 1}]\n" if gpus else ""
    (folder / "gres.conf").write_text(devices)
    lines = ["127.0.0.1 localhost", *(f"{address(host)} {host}" for host in (LOGIN, *nodes))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    hardware = f"CPUs={cpus} CoresPerSocket={cpus} RealMemory={memory_mb}" + (f" Gres=gpu:{gpus}" if gpus else "")
    text = SLURM_CONF.format(login=f"{LOGIN}({address(LOGIN)})", folder=folder, cpus=cpus, hardware=hardware)
    (folder / "slurm.conf").write_text(text + "".join(f"NodeName={node} {hardware}\n" for node in nodes))


# A job of the partition `urgent` takes the nodes of those in `lent`, which have GraceTime seconds to end on their own.
# config_overrides: nodes are as large as they claim. cred_expire: how long a requeued job waits, 120 s by default.
# The time-outs let a dead node be noticed in about 10 s. Jobs run at their submitter's priority, not at the daemons'.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={login}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
PropagatePrioProcess=1
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=3
KillWait=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 PreemptMode=OFF
PartitionName=lent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=2 PreemptMode=OFF
"""
