"""A job without Slurm: srun, scontrol, scancel and Python are stand-ins that record how they were called.

What runs is the rendered script itself, and the real attempts.py.
"""

import os
import subprocess
import sys
from pathlib import Path

# Each call is the command's name, its arguments and a newline, all ended by NUL; a single write, as some run at once.
RECORD = """printf '%s\\0' "${0##*/}" "$@" $'\\n' >> "$FAKES/calls"\n"""
STUBS = {
    "scancel": "",
    "scontrol": """
case $1-${2-} in
    show-job)
        [ ! -e "$FAKES/away" ] || { rm "$FAKES/away"; echo "Unable to contact slurm controller" >&2; exit 1; }
        restarts=${RESTARTS-$SLURM_RESTART_COUNT}
        echo "JobId=1 JobState=${STATE-RUNNING} Restarts=$restarts PreemptTime=${PREEMPTED-None}" \
            "ExcNodeList=${STAYS_OFF-(null)} NodeList=n[1-2]"
        ;;
    show-*) printf "n1\\nn2\\n" ;;
esac
""",
    "sleep": "exec /bin/sleep 0.1\n",
    # WAITING: "1235\n", a job of this run; OTHERS: jobs of other runs.
    "squeue": """
case "$*" in
    *--jobs=*) echo /work/launch.sbatch ;;
    *)
        printf "%s" "${WAITING-}" | sed 's|$| /work/launch.sbatch|'
        printf "%s" "${OTHERS-}" | sed 's|$| /elsewhere/launch.sbatch|'
        ;;
esac
""",
    "srun": f"""
while [ "${{1#--}}" != "$1" ]; do shift; done
export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
exec {sys.executable} "$FAKES/srun.py" "$@"
""",
    "module": "",
}
# One task, the first; Slurm sends USR1 to all processes of a step.
SRUN = """
import os, signal, subprocess, sys
received, group = [], []

def pass_on(*_):
    received.append(1)
    try:
        for one in group:
            os.killpg(one, signal.SIGUSR1)
    except ProcessLookupError:
        pass

signal.signal(signal.SIGUSR1, pass_on)
task = subprocess.Popen(sys.argv[1:], start_new_session=True)
group.append(task.pid)
if received:  # it came before the task had a number
    pass_on()
status = task.wait()
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
sys.exit(status if status >= 0 else 128 - status)
"""
# Training does what $TRAINING lists. The preflight is a stand-in too; everything else is real.
PYTHON = """#!{python}
import os, pathlib, signal, sys, time
if sys.argv[1:3] == ["-m", "megatron_paint.launch.slurm.attempts"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
fakes = pathlib.Path(os.environ["FAKES"])
with open(fakes / "calls", "a") as calls:
    calls.write("\\0".join(["python", *sys.argv[1:], "\\n", ""]))
if "megatron_paint.launch.preflight" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--exclude-bad") + 1]).write_text(os.environ.get("BAD_NODES", ""))
    sys.exit(int(os.environ.get("PREFLIGHT", "0")))
(fakes / "started").touch()
while os.environ.get("DEAF") and not (fakes / "listen").exists():
    time.sleep(0.01)
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
(fakes / "listening").touch()
print("hello from training", os.environ.get("HF_TOKEN", "no token"), flush=True)
for action in os.environ["TRAINING"].split():
    name, _, value = action.partition("=")
    if name == "checkpoint":
        step = pathlib.Path(os.environ["RUN"]) / "checkpoints" / f"step_{{int(value):06d}}"
        step.mkdir(parents=True, exist_ok=True)
        (step / "complete").touch()
        with open(fakes / "calls", "a") as calls:
            calls.write("checkpoint\\0\\n\\0")
    elif name == "export":
        (pathlib.Path(os.environ["RUN"]) / "hf" / f"step_{{int(value):06d}}").mkdir(parents=True)
    elif name == "until_told":
        end = time.monotonic() + 300
        while not received and time.monotonic() < end:
            time.sleep(0.01)
        if not received:
            sys.exit(99)
    elif name == "take":
        time.sleep(float(value))
    elif name == "exit":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        sys.exit(int(value))
"""


class FakeJob:
    """A folder with stand-ins and a run; `start` runs a script there."""

    def __init__(self, folder: Path, *, run: str = "runs/paint", python: str = ".venv/bin/python") -> None:
        self.folder = folder
        self.run = folder / run
        self.fakes = folder / "fakes"
        self.fakes.mkdir(parents=True)
        self.restart = 0
        for name, text in STUBS.items():
            self.executable(self.fakes / name, f"#!/bin/bash\n{RECORD}{text}")
        (self.fakes / "srun.py").write_text(SRUN)
        self.executable(folder / python, PYTHON.format(python=sys.executable))
        self.run.mkdir(parents=True)
        (folder / "node").mkdir()

    @staticmethod
    def executable(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def configure(self, *, steps: int = 100, problems: str = "null") -> None:
        """Writes config.yaml as training does when it begins."""
        self.run.joinpath("config.yaml").write_text(
            f"model: {{hf_path: m}}\ndata: {{train: t}}\nevaluation: {{problems: {problems}}}\n"
            f"run: {{dir: r, steps: {steps}, save_every: 25}}\n"
        )

    def start(self, script: str, training: str, **environ: str) -> subprocess.Popen:
        """Begins the job; its output is in a pipe."""
        file = self.folder / "job.sbatch"
        file.write_text(script)
        variables = {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "node"),
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(Path(__file__).parents[2])),
            "FAKES": str(self.fakes),
            "RUN": str(self.run),
            "TRAINING": training,
            "SLURM_JOB_ID": "1234",
            "SLURM_RESTART_COUNT": str(self.restart),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_ON_NODE": "4",
            **environ,
        }
        return subprocess.Popen(
            ["bash", str(file)],
            cwd=self.folder,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def job(self, script: str, training: str, **environ: str) -> tuple[int, str]:
        """One attempt of the job; exit status and output. The next one has a higher restart count."""
        job = self.start(script, training, **environ)
        output, _ = job.communicate(timeout=600)
        self.restart += 1
        return job.returncode, output

    def calls(self) -> list[list[str]]:
        """What was called, in order."""
        records = (self.fakes / "calls").read_text().split("\0\n\0")
        return [record.split("\0") for record in records if record]

    def called(self, name: str) -> list[list[str]]:
        """The arguments of each call of one command."""
        return [call[1:] for call in self.calls() if call[0] == name]
