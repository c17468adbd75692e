"""The environment of a job: its file of variables, modules and prologue, and the caches on the node."""

import os
from pathlib import Path

import pytest

from tests.slurm.fake_job import FakeJob
from tests.slurm.scripts import script

TRAIN = ["--nodes=2", "--gpus-per-node=2"]


def test_file_of_variables(tmp_path):
    """Its values reach training and no argument, script or record; a file that others can read is refused."""
    fake = FakeJob(tmp_path)
    file = fake.folder / "secrets.env"
    file.write_text("HF_TOKEN='hf do not tell'\n")
    file.chmod(0o600)
    os.chdir(fake.folder)
    text = script(*TRAIN, "--env-file=secrets.env")
    status, output = fake.job(text, "checkpoint=1 exit=1")
    assert (status, "hello from training hf do not tell\n" in output) == (0, True)
    assert "hf do not tell" not in text + (fake.fakes / "calls").read_text() + (fake.run / "attempts.jsonl").read_text()
    file.chmod(0o640)
    status, output = fake.job(text, "exit=0")
    assert (status, output) == (2, "./secrets.env can be read or written by other users: run chmod 600 ./secrets.env\n")


PRINTS = ("CUDA_DEVICE_MAX_CONNECTIONS", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE")


def variables_of(fake: FakeJob, text: str, **environ: str) -> dict[str, str]:
    """What a rank finds in its environment."""
    python = fake.folder / ".venv/bin/python"
    prints = "".join(f"print('{name}=' + os.environ.get('{name}', ''), flush=True)\n" for name in PRINTS)
    python.write_text(python.read_text().replace('print("hello', f'{prints}print("hello'))
    status, output = fake.job(text, "exit=1", **environ)
    assert status == 0, output
    pairs = [line.partition("=") for line in output.splitlines()]
    return {name: value for name, _, value in pairs if name in PRINTS}


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_caches_are_on_the_node_and_downloads_where_they_were(tmp_path, launcher):
    fake = FakeJob(tmp_path)
    found = variables_of(fake, script(*TRAIN, "--no-preflight", f"--launcher={launcher}"))
    node = fake.folder / "node" / f"megatron_paint-{os.getuid()}"
    assert found == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TRITON_CACHE_DIR": f"{node}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{node}/inductor",
        "HF_HOME": f"{node}/huggingface",
        "HF_HUB_CACHE": f"{fake.folder}/.cache/huggingface/hub",
    }
    assert node.stat().st_mode & 0o777 == 0o700  # others on the node must not place kernels there


def test_a_node_without_a_place_for_caches_is_no_error(tmp_path):
    fake = FakeJob(tmp_path)
    (fake.folder / "node").rmdir()
    (fake.folder / "node").touch()
    found = variables_of(fake, script(*TRAIN, "--no-preflight"))
    assert {found[name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME")} == {""}
    assert found["HF_HUB_CACHE"] == f"{fake.folder}/.cache/huggingface/hub"


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_node_without_a_place_for_caches_keeps_the_users_variables(tmp_path, launcher):
    fake = FakeJob(tmp_path)
    (fake.folder / "node").rmdir()
    (fake.folder / "node").touch()
    given = {"TRITON_CACHE_DIR": "/t", "HF_HOME": "/h"}
    found = variables_of(fake, script(*TRAIN, "--no-preflight", f"--launcher={launcher}"), **given)
    assert {name: found[name] for name in given} == given
    assert (found["TORCHINDUCTOR_CACHE_DIR"], found["HF_HUB_CACHE"]) == ("", "")


@pytest.mark.parametrize("source", ["env_file", "module", "prologue"])
def test_variables_of_caches_that_the_job_sets_itself_win(tmp_path, source):
    """Also over the places of downloads that the script would derive from HF_HOME."""
    fake = FakeJob(tmp_path)
    file = fake.folder / "set.sh"
    file.write_text("export HF_HOME=/shared/hf TRITON_CACHE_DIR=/shared/triton\n")
    file.chmod(0o600)
    option = {"env_file": f"--env-file={file}", "module": "--module=hf", "prologue": f"--prologue={file}"}[source]
    environ = {"BASH_FUNC_module%%": f"() {{ source {file}; }}"} if source == "module" else {}
    found = variables_of(fake, script(*TRAIN, "--no-preflight", option), **environ)
    assert (found["HF_HOME"], found["HF_HUB_CACHE"], found["TRITON_CACHE_DIR"]) == ("/shared/hf", "", "/shared/triton")


def test_the_earlier_name_of_the_hub_cache_counts(tmp_path):
    """huggingface_hub reads HUGGINGFACE_HUB_CACHE if HF_HUB_CACHE is not set."""
    found = variables_of(FakeJob(tmp_path), script(*TRAIN, "--no-preflight"), HUGGINGFACE_HUB_CACHE="/hub")
    assert found["HF_HUB_CACHE"] == "/hub"


def test_the_copy_of_the_code_is_before_what_the_job_adds_to_the_search_path(tmp_path):
    fake = FakeJob(tmp_path)
    file = fake.folder / "prologue.sh"
    file.write_text("export PYTHONPATH=/elsewhere${PYTHONPATH:+:$PYTHONPATH}\n")
    head, _, _ = script(*TRAIN, "--copy-code", f"--prologue={file}").partition("\n# Slurm sends USR1 before ")
    found = fake.job(f'{head}\necho "$PYTHONPATH"\n', "exit=0", PYTHONPATH="/first")[1]
    assert found == "/work/runs/paint/logs/launch/code-01234567:/elsewhere:/first\n"


def test_variables_of_the_users_win(tmp_path):
    fake = FakeJob(tmp_path)
    text = script(*TRAIN, "--no-preflight", "--env=CUDA_DEVICE_MAX_CONNECTIONS")
    given = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TRITON_CACHE_DIR": "/t", "HF_HOME": "/h"}
    found = variables_of(fake, text, **given)
    assert {name: found[name] for name in given} == given
    assert found["HF_HUB_CACHE"] == ""


def test_the_prologue_runs_before_everything_else(tmp_path):
    """With unset variables allowed, as the shell functions of clusters need it; it cannot switch the checks off."""
    fake = FakeJob(tmp_path)
    file = fake.folder / "prologue.sh"
    file.write_text("set +e\necho prologue of $NOT_SET $SLURM_JOB_ID\nexport HF_TOKEN=from_prologue")
    text = script(*TRAIN, f"--prologue={file}", "--no-preflight")
    status, output = fake.job(text, "exit=1")
    assert (status, output.splitlines()[0]) == (0, "prologue of 1234")
    assert "hello from training from_prologue\n" in output
    assert "\nset -euo pipefail\n\nexport OMP_NUM_THREADS" in text
    file.write_text("false\n")
    assert fake.job(script(*TRAIN, f"--prologue={file}"), "exit=1")[0] == 1


def test_an_empty_line_ends_a_here_document_of_the_prologue(tmp_path):
    """The script keeps the empty lines at the end of a prologue."""
    fake = FakeJob(tmp_path)
    file = fake.folder / "prologue.sh"
    file.write_text("cat <<''\nhere\n\n")
    status, output = fake.job(script(*TRAIN, f"--prologue={file}", "--no-preflight"), "exit=1")
    assert (status, output.splitlines()[:2]) == (0, ["here", "attempt: go from step 0"])


def test_messages_about_the_language_are_no_mistake_of_the_prologue(tmp_path, monkeypatch):
    """bash warns of a language that the machine does not have."""
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    (tmp_path / "prologue.sh").write_text("echo é \\\\\n", encoding="utf-8")
    assert "\necho é \\\\\nset -euo pipefail\n" in script(*TRAIN, f"--prologue={tmp_path / 'prologue.sh'}")


def test_modules_are_loaded_first(tmp_path):
    fake = FakeJob(tmp_path)
    fake.job(script(*TRAIN, "--module=cuda/12.8", "--module=gcc/13", "--no-preflight"), "exit=1")
    assert fake.calls()[:2] == [["module", "load", "cuda/12.8"], ["module", "load", "gcc/13"]]


@pytest.fixture(autouse=True)
def _stay_here():
    before = Path.cwd()
    yield
    os.chdir(before)
