"""What doctor finds, with modules that are there, absent, broken, or someone else's."""

import io
import json
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from megatron_paint.cli import doctor

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_real_apex(monkeypatch):
    for name in ("apex", "apex.optimizers", "amp_C", "fused_weight_gradient_mlp_cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def module(monkeypatch, tmp_path, name, content=""):
    """A module or package file on the path; forgotten after the test."""
    file = tmp_path / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)


def find(findings, name):
    return next(finding for finding in findings if finding.name == name)


def package(name, **options):
    return doctor.Package(name=name, module=name, distribution=name, cost="much", **options)


def test_a_package_that_is_there(monkeypatch, tmp_path):
    module(monkeypatch, tmp_path, "fakepack", "__version__ = '1.2.3'")
    found = doctor.examine_package(package("fakepack"))
    assert (found.status, found.found, found.cost, found.fatal) == ("ok", "1.2.3", "", False)
    monkeypatch.delitem(sys.modules, "fakepack")


def test_a_package_that_is_absent_costs_something(monkeypatch):
    found = doctor.examine_package(package("surely_not_installed"))
    assert (found.status, found.found, found.cost, found.fatal) == ("missing", "not installed", "much", False)
    assert doctor.examine_package(package("surely_not_installed", required=True)).fatal
    assert doctor.examine_package(package("surely_not_installed", imported=False)).status == "missing"
    assert doctor.examine_package(package("surely.not_installed")).status == "missing"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("raise ImportError('libfoo.so: undefined symbol')", "ImportError: libfoo.so: undefined symbol"),
        ("raise OSError('wrong ABI\\nmore')", "OSError: wrong ABI"),
        ("import another_absent_one", "needs another_absent_one, which is not installed"),
    ],
)
def test_a_package_that_is_broken_is_fatal_where_training_imports_it(monkeypatch, tmp_path, content, found):
    module(monkeypatch, tmp_path, "brokenpack", content)
    finding = doctor.examine_package(package("brokenpack"))
    assert (finding.status, finding.found, finding.fatal) == ("broken", found, True)
    assert not doctor.examine_package(package("brokenpack", imported=False)).fatal


def test_no_apex(monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "apex").exists()])
    findings = doctor.examine_apex()
    assert [finding.status for finding in findings] == ["missing"] * 3
    assert not any(finding.fatal for finding in findings)


def test_the_apex_of_pypi_is_called_out(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('it must not be run to be found out')")
    monkeypatch.syspath_prepend(tmp_path)
    apex = doctor.examine_apex()[0]
    assert apex.status == "broken"
    assert apex.fatal
    assert "not NVIDIA's" in apex.found
    assert "pip uninstall apex" in apex.cost


def test_the_apex_of_pypi_is_called_out_when_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    assert doctor.examine_apex()[0].status == "broken"


def test_the_apex_of_nvidia_with_and_without_extensions(monkeypatch, tmp_path):
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    findings = doctor.examine_apex()
    assert [finding.status for finding in findings] == ["ok", "ok", "missing"]
    assert "gradient_accumulation_fusion" in findings[2].cost


def fake_torch(gpus, *, nccl):
    device = types.SimpleNamespace(name="NVIDIA H200", total_memory=139 * doctor.GIB)
    return types.SimpleNamespace(
        __version__="2.9.0",
        version=types.SimpleNamespace(cuda="13.0"),
        cuda=types.SimpleNamespace(
            is_available=lambda: gpus > 0, device_count=lambda: gpus, get_device_properties=lambda _: device
        ),
        distributed=types.SimpleNamespace(is_nccl_available=lambda: nccl, is_gloo_available=lambda: True),
    )


def test_gpus_need_nccl(monkeypatch):
    monkeypatch.setattr(doctor, "load", lambda _: fake_torch(2, nccl=False))
    findings = doctor.examine_torch()
    assert find(findings, "CUDA GPUs").found == "2 (CUDA 13.0): NVIDIA H200 139 GiB, NVIDIA H200 139 GiB"
    assert find(findings, "NCCL").fatal
    assert not find(findings, "gloo").required


def test_one_gpu_or_none_does_not(monkeypatch):
    for gpus in (0, 1):
        monkeypatch.setattr(doctor, "load", lambda _, gpus=gpus: fake_torch(gpus, nccl=False))
        assert not find(doctor.examine_torch(), "NCCL").fatal
    monkeypatch.setattr(doctor, "load", lambda _: fake_torch(0, nccl=True))
    assert "no GPU answers" in find(doctor.examine_torch(), "CUDA GPUs").found


def test_no_torch_at_all(monkeypatch):
    monkeypatch.setattr(doctor, "load", lambda _: "")
    (finding,) = doctor.examine_torch()
    assert finding.fatal
    assert "pytorch.org" in finding.cost


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert doctor.examine_python().fatal
    assert "99.0" in doctor.examine_python().cost


def test_space(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    low = doctor.examine_space("Shared memory", tmp_path, total=True, wanted=doctor.GIB, cost="NCCL fails")
    assert (low.status, low.cost, low.fatal) == ("low", "NCCL fails", False)
    assert doctor.examine_space("Disk", tmp_path, total=False, wanted=1, cost="").status == "ok"
    monkeypatch.undo()
    assert doctor.examine_space("Disk", tmp_path / "no", total=False, wanted=1, cost="").status == "missing"


def run(monkeypatch, findings, **options):
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    console = Console(file=io.StringIO())
    return doctor.doctor(console=console, **options), console.file.getvalue()


GOOD = doctor.Finding(name="Python", status="ok", found="3.11", required=True)
ABSENT = doctor.Finding(name="vLLM", status="missing", found="not installed", cost="none now")
WRONG = doctor.Finding(name="Apex", status="broken", found="[not] NVIDIA's", cost="pip uninstall apex", fatal=True)


def test_exit_status_and_table(monkeypatch):
    status, text = run(monkeypatch, [GOOD, ABSENT])
    assert status == 0
    assert "Ready to train." in text
    assert "none now" in text
    status, text = run(monkeypatch, [GOOD, ABSENT, WRONG])
    assert status == 1
    assert "Fix first: Apex" in text
    assert "[not] NVIDIA's" in text


def test_json(monkeypatch):
    status, text = run(monkeypatch, [GOOD, WRONG], as_json=True)
    content = json.loads(text)
    assert status == 1
    assert content["ok"] is False
    assert content["findings"][1]["name"] == "Apex"
    assert content["findings"][1]["fatal"] is True


def test_this_machine_is_examined_without_harm(tmp_path):
    findings = doctor.examine(tmp_path)
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    wanted = {"Python", "PyTorch", "CUDA GPUs", "NCCL", "gloo", "Megatron-Core", "transformers", "math-verify", "Apex"}
    assert wanted <= set(names)
    assert {"Transformer Engine", "Triton", "vLLM", "sentencepiece", "datasets", "Disk", "Shared memory"} <= set(names)
    assert all(finding.cost for finding in findings if finding.status != "ok")
