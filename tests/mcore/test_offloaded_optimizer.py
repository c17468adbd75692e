"""The optimiser's state in host memory: the steps of the usual optimiser to the bit, and exact resumes.

Megatron's own optimiser for this runs on a CPU, with memory that counts as the GPU's.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_paint.base.errors import UserError
from megatron_paint.checkpoints.torch_dist import CheckpointReader
from megatron_paint.config.megatron import MegatronSettings
from megatron_paint.config.offload import STATE_TYPES
from megatron_paint.mcore.optimizer import _refusals_of_adam, _state_settings
from tests.mcore import expert_cases
from tests.mcore import parity_cases as parity
from tests.mcore.layouts import run_worker
from tests.mcore.offload_worker import CASES, EXPERTS, HALF
from tests.support.exports import same, weights

WRITER = "tp2-dp2"
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("tp1", "tp2-pp2-sp", "ep2")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a part at a layout once; returns (saved checkpoints, output)."""
    checkpoints = {name: tmp_path_factory.mktemp(name) for name in ("dense", "experts")}
    parity.make_checkpoints(checkpoints["dense"])
    expert_cases.make_checkpoints(checkpoints["experts"])
    done = {}

    def of(layout: str, part: str, saved):
        if (layout, part, saved) not in done:
            out = tmp_path_factory.mktemp(part)
            folder = checkpoints["experts" if "ep2" in layout else "dense"]
            run_worker("offload_worker", layout, part, folder, saved, out)
            done[layout, part, saved] = out
        return done[layout, part, saved]

    return of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where checkpoints of a layout and a part are."""
    folders = {}

    def of(layout: str, part: str):
        if (layout, part) not in folders:
            folders[layout, part] = tmp_path_factory.mktemp("saved")
        return folders[layout, part]

    return of


@pytest.mark.parametrize("layout", [WRITER, *LONG])
def test_steps_and_resumes_are_those_of_the_usual_optimiser(layout, run, saved, tmp_path):
    """Weights and losses to the bit. A checkpoint before the first step resumes too, and so do experts' optimisers."""
    plain, moved = run(layout, "plain", tmp_path), run(layout, "all", tmp_path)
    resumed = []
    for part in ("first", "none"):
        run(layout, part, saved(layout, part))
        resumed.append(run(layout, "rest", saved(layout, part)))
    for case in EXPERTS if layout == "ep2" else CASES:
        wanted = torch.load(plain / "found.pt")[case.name]
        assert set(wanted["optimisers"]) == {"AdamW"}
        size, count = torch.load(moved / "found.pt")[case.name]["host"]
        assert size == 16 * count  # as the estimate has it, planning/stage_memory.py
        for out, steps in ((moved, 0), (resumed[0], HALF), (resumed[1], 0)):
            found = torch.load(out / "found.pt")[case.name]
            assert found["optimisers"] == ["HybridDeviceOptimizer"] * len(wanted["optimisers"])
            assert (found["losses"], found["norms"]) == (wanted["losses"][steps:], wanted["norms"][steps:])
            assert same(weights(out / case.name), weights(plain / case.name)), case.name


def test_another_layout_loads_every_bit(run, saved):
    run(WRITER, "first", saved(WRITER, "first"))
    for layout in ("tp1", "pp2"):
        out = run(layout, "again", saved(WRITER, "first"))
        for case in CASES:
            one, other = tensors(saved(WRITER, "first") / case.name), tensors(out / case.name)
            assert any(key.startswith("optimizer.state.exp_avg_sq") and value.any() for key, value in one.items())
            assert {value.dtype for key, value in one.items() if key.startswith("optimizer.state")} == {torch.float32}
            assert same(one, other), case.name


def tensors(folder) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {
        key: reader.read(key, (), slice(0, stored.shape[0])) for key, stored in reader.tensors.items() if stored.shape
    }


def test_the_names_and_values_of_megatrons_settings():
    assert _state_settings(MegatronSettings()) == {}
    given = dict(zip(STATE_TYPES, ("fp32", "fp32", "bf16", "fp32"), strict=True))
    found = _state_settings(MegatronSettings(use_precision_aware_optimizer=True, **given))
    types = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    aware = {"use_precision_aware_optimizer": True, "store_param_remainders": False}
    assert found == aware | dict(zip(STATE_TYPES, types, strict=True))
    moved = {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True, "pin_cpu_grads": False}
    found = _state_settings(MegatronSettings(use_precision_aware_optimizer=True, **moved))
    floats = dict.fromkeys(STATE_TYPES, torch.float32)
    assert found == aware | floats | moved | {"optimizer_offload_fraction": 1.0}


def test_an_older_transformer_engine_is_named():
    aware, usual = MegatronSettings(use_precision_aware_optimizer=True), MegatronSettings()
    told = "FusedAdam only supports fp32/fp16/fp8 exp_avg."
    with pytest.raises(UserError) as error, _refusals_of_adam(aware):
        raise RuntimeError(told)
    assert str(error.value) == (
        f"megatron.use_precision_aware_optimizer=true: Transformer Engine refuses it ({told}); install a newer one, or "
        "set it to false"
    )
    for kind, megatron in ((torch.OutOfMemoryError, aware), (dist.DistError, aware), (RuntimeError, usual)):
        with pytest.raises(kind, match="as it is"), _refusals_of_adam(megatron):
            raise kind("as it is")
