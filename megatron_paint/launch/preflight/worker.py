"""What every node but the first does: it joins, is examined, sends what it found, and ends as the first one says."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict

from megatron_paint.launch.preflight import blame, clock, collective, port, store, time_limit
from megatron_paint.launch.preflight.coordinator import group_of
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.node_checks import Canary, examine
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.time_limit import BAD, TimeLimit


def follow(options: Options, me: Node, probes: Probes, limit: TimeLimit) -> int:
    """All phases; the exit status. A node that the first one cannot hear of says by itself why it ends."""
    try:
        limit.phase = f"the joining of {me.first}"
        met = store.join(options.rendezvous, limit.at(time_limit.JOIN))
    except port.Unusable as error:
        _say(f"preflight: node {me.name}: {port.CHECK}: {error}{f'; {error.advice}' if error.advice else ''}")
        return BAD
    limit.begin(limit.seconds)  # the first node's own time, which began before, is the one that counts from here on
    try:
        _take_part(met, options, me, probes, limit)
        limit.phase = f"the wait for the verdict of {me.first}"
        status = int(met.wait_for("verdict", limit.at(1.0)))
        with suppress(store.Lost):  # it waits only for so long
            met.post(f"bye/{me.rank}", json.dumps("bye"))
    except store.Lost as error:
        _say(
            f"preflight: node {me.name}: {me.first}, the first node, stopped answering ({error}; this node was in "
            f"{limit.phase}); look at its message, or have that node looked at"
        )
        return BAD
    finally:
        met.close()
    return status


def _take_part(met: store.Meeting, options: Options, me: Node, probes: Probes, limit: TimeLimit) -> None:
    met.post(f"join/{me.rank}", json.dumps(me.name))
    told = json.loads(met.wait_for("local/told", limit.at(1.0)))
    if me.rank not in told["members"]:  # it came too late, and is not waited for
        return
    limit.phase = f"the checks of each node, gathered by {me.first}"
    deadline = _deadline(limit, told["seconds"])
    offset = clock.ask(met, me.rank, probes.clock, deadline)
    canary = Canary(name=told["canary"][0], token=told["canary"][1]) if told["canary"] else None
    local = examine(options, me, probes, canary, deadline)
    met.post(f"local/{me.rank}", json.dumps({"local": local.plain(), "clock": asdict(offset)}))
    limit.phase = f"the {blame.CHECK}, started by {me.first}"
    told = json.loads(met.wait_for("sum/told", limit.at(1.0)))
    ranks = told.get("ranks", {}).get(str(me.rank))
    if ranks is not None:
        group = group_of(options, ranks, told["size"], told["on_gpu"])
        result = collective.take_part(group, _deadline(limit, told["seconds"]), probes.contribution)
        met.post(f"sum/{me.rank}", json.dumps(result.plain()))


def _deadline(limit: TimeLimit, seconds: float) -> float:
    """So many seconds from now, or the end of this node's own time."""
    return min(time.monotonic() + seconds, limit.at(1.0))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
