"""What every node except the first one does.

It joins, is checked, sends its results, and ends with the status of the first node.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict

from megatron_paint.launch.preflight import blame, clock, collective, port, time_limit
from megatron_paint.launch.preflight.coordinator import group_of
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.node_checks import Canary, check_node
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.store import NodeStore, StoreLost, join_store
from megatron_paint.launch.preflight.time_limit import BAD, TimeLimit


def run_worker(options: Options, me: Node, probes: Probes, limit: TimeLimit) -> int:
    """Runs all phases and returns the exit status. A node that loses the first node prints the reason itself."""
    try:
        limit.phase = f"the joining of {me.first}"
        store = join_store(options.rendezvous, limit.at(time_limit.JOIN))
    except port.Unusable as error:
        _print_error(f"preflight: node {me.name}: {port.CHECK}: {error}{f'; {error.advice}' if error.advice else ''}")
        return BAD
    limit.restart(limit.seconds)  # from here on the time of the first node counts, and that one started earlier
    try:
        _take_part(store, options, me, probes, limit)
        limit.phase = f"the wait for the status of {me.first}"
        status = int(store.wait_for("status", limit.at(1.0)))
        with suppress(StoreLost):  # the first node waits only for a limited time
            store.post(f"goodbye/{me.rank}", json.dumps("goodbye"))
    except StoreLost as error:
        _print_error(
            f"preflight: node {me.name}: {me.first}, the first node, stopped answering ({error}; this node was in "
            f"{limit.phase}); read the message of the first node, or have it repaired"
        )
        return BAD
    finally:
        store.close()
    return status


def _take_part(store: NodeStore, options: Options, me: Node, probes: Probes, limit: TimeLimit) -> None:
    store.post(f"join/{me.rank}", json.dumps(me.name))
    start = json.loads(store.wait_for("local/start", limit.at(1.0)))
    if me.rank not in start["members"]:  # it came too late, and the first node does not wait for it
        return
    limit.phase = f"the checks of each node, gathered by {me.first}"
    deadline = _deadline(limit, start["seconds"])
    offset = clock.ask(store, me.rank, probes.clock, deadline)
    canary = Canary(name=start["canary"][0], token=start["canary"][1]) if start["canary"] else None
    local = check_node(options, me, probes, canary, deadline)
    store.post(f"local/{me.rank}", json.dumps({"local": local.plain(), "clock": asdict(offset)}))
    limit.phase = f"the {blame.CHECK}, started by {me.first}"
    start = json.loads(store.wait_for("sum/start", limit.at(1.0)))
    ranks = start.get("ranks", {}).get(str(me.rank))
    if ranks is not None:
        group = group_of(options, ranks, start["size"], start["on_gpu"])
        result = collective.run_sum(group, _deadline(limit, start["seconds"]), probes.contribution)
        store.post(f"sum/{me.rank}", json.dumps(result.plain()))


def _deadline(limit: TimeLimit, seconds: float) -> float:
    """So many seconds from now, or the end of this node's own time."""
    return min(time.monotonic() + seconds, limit.at(1.0))


def _print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
