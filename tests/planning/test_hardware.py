"""What settings need of a machine, with machines that are made up: GPUs, Transformer Engine, a foreign Apex."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_paint.base.errors import UserError
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.planning import hardware
from megatron_paint.planning.apex import refuse_foreign_apex
from megatron_paint.planning.hardware import (
    NONDETERMINISTIC,
    device_of_rank,
    engine_environment,
    use_transformer_engine,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine: machine(gpus=..., engine=..., broken=why the engine cannot be imported)."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", NONDETERMINISTIC):
        monkeypatch.delenv(name, raising=False)

    def make(*, gpus, engine=True, broken=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(hardware, "find_spec", lambda name: object() if engine else None)
        monkeypatch.setattr(hardware, "_import_error", lambda module: broken)

    return make


def test_the_engine_is_taken_where_it_is(machine):
    machine(gpus=1)
    assert use_transformer_engine(MegatronSettings())
    assert not use_transformer_engine(MegatronSettings(transformer_impl="local"))
    machine(gpus=1, engine=False)
    assert not use_transformer_engine(MegatronSettings())
    machine(gpus=1, broken="it does not fit this torch")
    assert not use_transformer_engine(MegatronSettings())
    with pytest.raises(UserError, match="it does not fit this torch"):
        use_transformer_engine(MegatronSettings(fp8="hybrid"))


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_engine.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "libcudnn.so.9: cannot open" in hardware._import_error("broken_engine")
    assert hardware._import_error("json") is None


@pytest.mark.parametrize(
    ("gpus", "settings", "says"),
    [
        (1, {"fp8": "hybrid"}, "megatron.fp8=hybrid needs Transformer Engine on a GPU: Transformer Engine is not inst"),
        (1, {"transformer_impl": "transformer_engine"}, "Transformer Engine is not installed"),
        (0, {"fp8": "hybrid"}, "no CUDA device was found"),
        (0, {"transformer_impl": "transformer_engine"}, "no CUDA device was found"),
    ],
)
def test_what_is_missing_is_named(machine, gpus, settings, says):
    machine(gpus=gpus, engine=False)
    with pytest.raises(UserError, match=says):
        use_transformer_engine(MegatronSettings(**settings))


def test_deterministic_mode_tells_the_engine(machine, monkeypatch):
    machine(gpus=1)
    deterministic = MegatronSettings(deterministic_mode=True)
    assert engine_environment(deterministic) == {NONDETERMINISTIC: "0"}
    assert engine_environment(MegatronSettings()) == {}
    assert engine_environment(MegatronSettings(deterministic_mode=True, transformer_impl="local")) == {}
    monkeypatch.setenv(NONDETERMINISTIC, "0")
    assert engine_environment(deterministic) == {NONDETERMINISTIC: "0"}
    monkeypatch.setenv(NONDETERMINISTIC, "1")
    with pytest.raises(UserError, match=f"deterministic_mode=true, but the environment has {NONDETERMINISTIC}=1"):
        engine_environment(deterministic)


SETS_IT_FIRST = f"""
import os, sys
import torch
import megatron_paint.planning.hardware as hardware
import megatron_paint.mcore.ranks as ranks
from megatron_paint.config.settings import MegatronSettings
class Reached(Exception): pass
class Watch:
    def find_spec(self, name, *_):
        if name.split('.')[0] in ('megatron', 'transformer_engine'):
            print(os.environ.get('{NONDETERMINISTIC}'))
            raise Reached
sys.meta_path.insert(0, Watch())
hardware.missing_for_engine = lambda: None
ranks.redirect_cuda_to_cpu = lambda: None
try:
    ranks.start_ranks(MegatronSettings(deterministic_mode=True))
except Reached:
    print('reached')
"""


def test_the_engine_is_told_before_megatron_imports_it():
    """Megatron-Core refuses deterministic_mode where attention is built with the variable unset."""
    environ = {name: value for name, value in os.environ.items() if name != NONDETERMINISTIC}
    done = subprocess.run(
        [sys.executable, "-c", SETS_IT_FIRST], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.split() == ["0", "reached"], done.stderr


def test_device_of_a_rank(machine, monkeypatch):
    machine(gpus=0)
    assert device_of_rank() == torch.device("cpu")
    machine(gpus=4)
    assert device_of_rank() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_rank() == torch.device("cuda", 3)
    machine(gpus=2)
    with pytest.raises(UserError, match="LOCAL_RANK=3, but this machine shows 2 GPUs"):
        device_of_rank()


def test_a_gpu_of_its_own_has_number_0(machine, monkeypatch):
    """srun --gpus-per-task=1 hides the other tasks' GPUs; torchrun, which says how many ranks are here, does not."""
    machine(gpus=1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_rank() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="LOCAL_RANK=3, but this machine shows 1 GPU to"):
        device_of_rank()


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """The folder of a package `apex` that is found before any other."""
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    folder = tmp_path / "apex"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('it must not be run to be found out')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_foreign_apex_is_refused(apex):
    with pytest.raises(UserError, match=r"is not NVIDIA's.*pip uninstall apex") as error:
        refuse_foreign_apex()
    assert str(apex) in str(error.value)


def test_nvidias_apex_is_not(apex):
    (apex / "optimizers").mkdir()
    refuse_foreign_apex()
