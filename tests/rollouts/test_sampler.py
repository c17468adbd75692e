"""What the sampler asks of its servers and when it exports the model, without servers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_paint.base.errors import UserError
from megatron_paint.rollouts.vllm.fleet import Fleet, Server
from megatron_paint.rollouts.vllm.sampler import VllmSampler
from megatron_paint.runtime.rank_zero import directly


class Servers:
    """A fleet of two servers, of which the first has failed."""

    adapter = None
    restarts_with_weights = Fleet.restarts_with_weights

    def __init__(self, process):
        self.failed = [Server(0, SimpleNamespace(url="http://a:1"), process)]
        self.restarted_with = []

    def restart_failed(self, model, *, version):
        self.restarted_with.append((model, version))
        self.failed = []

    def check(self, requests, sampling):
        raise UserError("too long")


class Weights:
    """Notes the folders of its exports."""

    def __init__(self):
        self.exported = []

    def export(self, folder):
        self.exported.append(folder)


class NoSpotCheck:
    """Must not be asked."""


def sampler(fleet, weights):
    made = VllmSampler(
        fleet,
        weights=weights,
        transfer=None,
        spot_check=NoSpotCheck(),
        start_model=Path("start"),
        exports=Path("exports"),
        on_rank_zero=directly,
    )
    made.version, made.checked = "v", False
    return made


@pytest.mark.parametrize(
    ("process", "before", "model", "version"),
    [
        (object(), False, Path("exports/restart"), "v"),
        (object(), True, Path("start"), None),  # an update follows
        (None, False, Path("start"), "v"),  # a server of urls is not started again
    ],
)
def test_the_model_is_exported_only_for_a_server_that_starts_with_its_weights(process, before, model, version):
    fleet, weights = Servers(process), Weights()
    assert sampler(fleet, weights)._revive(before=before)
    assert fleet.restarted_with == [(model, version)]
    assert weights.exported == ([model] if model == Path("exports/restart") else [])


def test_requests_are_checked_before_the_spot_check_samples():
    """A prompt that does not fit would look like the fault of a server."""
    fleet = Servers(None)
    fleet.failed = []
    for act in ("generate", "start"):
        with pytest.raises(UserError, match="too long"):
            getattr(sampler(fleet, Weights()), act)([object()], object())
