"""What is missing on this machine for a Slurm cluster."""

import os
import shutil
import subprocess
from collections.abc import Sequence

from tests.slurm.host import NAMESPACES

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # daemons are often not on a user's path
CABLE = "ip link add br0 type bridge && ip link add cable0 type veth peer name cable1"


def what_is_missing() -> str | None:
    """Why no cluster can start here, with a remedy; None if one can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces: run the tests as root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found: {INSTALL}"
    if why := _refused(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"]):
        return f"the kernel gives no namespaces ({why}): run on a machine, or in a container that has CAP_SYS_ADMIN"
    if why := _refused(["unshare", "--net", "sh", "-c", CABLE]):
        return f"the kernel gives no bridge and no virtual cables ({why}): it needs its modules bridge and veth"
    return None


def _refused(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"
