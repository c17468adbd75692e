"""What the first node does: it hosts the store, gathers the results of all nodes, and reports them."""

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from megatron_paint.launch.preflight import blame, clock, collective, gpus, packages, port, shared, time_limit
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.node_checks import HANGS, PACKAGES, Canary, NodeResults, check_node
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.result import CheckResult
from megatron_paint.launch.preflight.store import NodeStore, StoreLost, open_store
from megatron_paint.launch.preflight.time_limit import TimeLimit
from megatron_paint.launch.preflight.timed_process import end_all, run_timed

DISK_SECONDS = 10.0
GOODBYE_SECONDS = 10.0
ANSWERS = "answers"
INSTALL = "install the same version on every node"


@dataclass(kw_only=True)
class PreflightState:
    """What is known so far. Each phase adds to it."""

    node: Node
    results: list[CheckResult] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    members: list[int] = field(default_factory=list)  # ranks of the nodes that have answered until now
    bandwidth: float | None = None  # GB/s of the sum over all nodes

    def name(self, rank: int) -> str:
        """The node's name."""
        return self.node.names[rank]

    def drop_silent(self, answered: Iterable[int], phase: str) -> None:
        """Records for each member whether it answered in a phase, and removes the members that did not."""
        kept = [rank for rank in self.members if rank in set(answered)]
        for rank in self.members:
            ok = rank in kept
            seen = f"answered in {phase}" if ok else f"stopped answering in {phase}"
            advice = "" if ok else blame.REPAIR
            self.results.append(CheckResult(check=ANSWERS, ok=ok, seen=seen, advice=advice, node=self.name(rank)))
        self.members = kept


def run_coordinator(
    options: Options, me: Node, probes: Probes, limit: TimeLimit, report: Callable[[PreflightState], int]
) -> int:
    """Runs all phases and returns the exit status, which it also sends to the other nodes.

    report: prints and writes the results, and returns the exit status.
    """
    state = PreflightState(node=me)
    try:
        store = open_store(options.rendezvous)
    except port.Unusable as error:
        state.results.append(error.result(me.name))
        return report(state)
    canary = Canary(name=secrets.token_hex(8), token=secrets.token_hex(64))
    try:
        _gather_nodes(store, state, options, limit)
        written = _write_token(state, options, canary)
        limit.phase = "the checks of each node"
        start = {"members": state.members, "seconds": limit.left(time_limit.LOCAL)}
        store.post("local/start", json.dumps({**start, "canary": [canary.name, canary.token] if written else None}))
        by_rank = _check_all_nodes(store, state, options, probes, limit)
        if written:
            _check_answers(state, options, canary, by_rank)
        limit.phase = blame.CHECK
        _sum_over_nodes(store, state, options, probes, limit, by_rank)
        status = report(state)
        store.post("status", str(status))
        _wait_for_goodbyes(store, state, limit)
    finally:
        end_all()  # the process that writes the token may be among them
        run_timed(lambda: shared.remove_token(options.run, canary.name), DISK_SECONDS)
        store.close()
    return status


def _gather_nodes(store: NodeStore, state: PreflightState, options: Options, limit: TimeLimit) -> None:
    limit.phase = "the gathering of nodes"
    others = range(1, state.node.count)
    joined = store.collect("join", others, limit.at(time_limit.JOIN))
    state.node = Node(
        rank=0, name=state.node.name, names=tuple(joined.get(r, name) for r, name in enumerate(state.node.names))
    )
    state.members = [0, *sorted(joined)]
    # If none of several nodes joined, then this node is late, or the network is broken.
    fault = "node" if joined or state.node.count == 2 else "job"
    for rank in range(state.node.count):
        ok = rank in state.members
        seen = "joined" if ok else f"did not join within {time_limit.JOIN * limit.seconds:.0f} s"
        advice = "" if ok else f"check that it was started and can reach {options.rendezvous}; else exclude it"
        state.results.append(
            CheckResult(check="join", ok=ok, seen=seen, advice=advice, fault=fault, node=state.name(rank))
        )


def _write_token(state: PreflightState, options: Options, canary: Canary) -> bool:
    """Writes the token that the other nodes read; returns whether it succeeded."""
    outcome = run_timed(lambda: shared.write_token(options.run, canary.name, canary.token), DISK_SECONDS)
    result = outcome.value or CheckResult(check=shared.CHECK, ok=False, seen=outcome.problem, advice=HANGS)
    state.results.append(result.at(state.node.name))
    return result.ok


def _check_all_nodes(
    store: NodeStore, state: PreflightState, options: Options, probes: Probes, limit: TimeLimit
) -> dict[int, NodeResults]:
    """The results of each node that answered, by rank."""
    clock.serve(store, len(state.members) - 1, probes.clock, limit.at(time_limit.LOCAL))
    mine = check_node(options, state.node, probes, None, limit.at(time_limit.LOCAL))
    sent = store.collect("local", state.members[1:], limit.at(time_limit.LOCAL + time_limit.GRACE))
    state.drop_silent((0, *sent), "the checks of each node")
    by_rank = {0: mine} | {rank: NodeResults.of(plain["local"]) for rank, plain in sent.items()}
    offsets = {state.name(0): clock.Offset(seconds=0.0, round_trip=0.0)}
    offsets |= {state.name(rank): clock.Offset(**plain["clock"]) for rank, plain in sent.items()}
    state.results += clock.compare(offsets)
    for rank, local in by_rank.items():
        state.results += [result.at(state.name(rank)) for result in local.results]
    state.versions = {state.name(rank): local.versions for rank, local in by_rank.items() if local.versions}
    state.results += packages.compare_nodes(PACKAGES, state.versions, INSTALL)
    if options.expect_gpus is None:
        counts = {state.name(rank): {gpus.CHECK: str(local.gpus)} for rank, local in by_rank.items()}
        advice = "give the expected number with --expect-gpus, and have the node repaired"
        state.results += packages.compare_nodes("number of GPUs", counts, advice)
    return by_rank


def _check_answers(state: PreflightState, options: Options, canary: Canary, by_rank: Mapping[int, NodeResults]) -> None:
    wrote = {
        rank: state.name(rank)
        for rank, local in by_rank.items()
        if any(result.check == shared.CHECK and result.ok for result in local.results)
    }
    outcome = run_timed(
        lambda: shared.missing_answers(options.run, canary.name, canary.token, wrote, first=state.node.name),
        DISK_SECONDS,
    )
    if outcome.problem:
        result = CheckResult(check=shared.CHECK, ok=False, seen=outcome.problem, advice=HANGS)
        state.results.append(result.at(state.node.name))
    else:
        state.results += [result.at(node) for node, result in outcome.value.items()]


def _sum_over_nodes(
    store: NodeStore,
    state: PreflightState,
    options: Options,
    probes: Probes,
    limit: TimeLimit,
    by_rank: Mapping[int, NodeResults],
) -> None:
    """The sum over all nodes whose own sums are correct. Either all of them use GPUs, or none."""
    able = [rank for rank, local in by_rank.items() if local.can_join_sum]
    if not able:
        store.post("sum/start", json.dumps({}))
        return
    on_gpu = Counter(by_rank[rank].gpus > 0 for rank in able).most_common(1)[0][0]
    able = [rank for rank in able if (by_rank[rank].gpus > 0) == on_gpu]
    first, ranks = 0, {}
    for rank in able:
        ranks[rank] = list(range(first, first + max(1, by_rank[rank].gpus)))
        first += len(ranks[rank])
    start = {"ranks": ranks, "size": first, "on_gpu": on_gpu, "seconds": limit.left(time_limit.COLLECTIVE)}
    store.post("sum/start", json.dumps(start))
    sums = {}
    if 0 in ranks:
        sums[0] = collective.run_sum(
            group_of(options, ranks[0], first, on_gpu), limit.at(time_limit.COLLECTIVE), probes.contribution
        )
    deadline = limit.at(time_limit.COLLECTIVE + time_limit.GRACE)
    sent = store.collect("sum", [rank for rank in able if rank], deadline)
    sums |= {rank: collective.SumResult(**plain) for rank, plain in sent.items()}
    silent = {rank for rank in able if rank not in sums}
    state.drop_silent(set(state.members) - silent, f"the {blame.CHECK}")
    _record_sums(state, sums, ranks, [state.name(rank) for rank in sorted(silent)], options.bandwidth_floor)


def _record_sums(
    state: PreflightState,
    sums: Mapping[int, collective.SumResult],
    ranks: Mapping[int, list[int]],
    silent: list[str],
    floor: float | None,
) -> None:
    named = {state.name(rank): result for rank, result in sorted(sums.items())}
    named_ranks = {state.name(rank): numbers for rank, numbers in ranks.items()}
    if not named:
        return
    state.results += blame.blame_nodes(named, named_ranks, silent=silent, floor=floor)
    if len(named) > 1 and not silent and not any(result.problem for result in named.values()):
        state.bandwidth = min(result.bandwidth for result in named.values())


def group_of(options: Options, ranks: list[int], size: int, on_gpu: bool) -> collective.Group:
    """This node's processes in the sum over all nodes."""
    where = options.rendezvous
    return collective.Group(
        name="all", host=where.host, port=where.port, first=ranks[0], local=len(ranks), size=size, on_gpu=on_gpu
    )


def _wait_for_goodbyes(store: NodeStore, state: PreflightState, limit: TimeLimit) -> None:
    """Keeps the store open until the other nodes have read the status."""
    deadline = min(time.monotonic() + GOODBYE_SECONDS, limit.at(time_limit.GOODBYE))
    with suppress(StoreLost):
        store.collect("goodbye", state.members[1:], deadline)
