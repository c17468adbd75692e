"""What the first node does: it keeps the meeting, gathers what all nodes found, and says what came of it."""

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from megatron_paint.launch.preflight import blame, clock, collective, gpus, packages, port, shared, store, time_limit
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.node_checks import HANGS, PACKAGES, Canary, Local, examine
from megatron_paint.launch.preflight.options import Options
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.result import Finding
from megatron_paint.launch.preflight.time_limit import TimeLimit
from megatron_paint.launch.preflight.timed_process import carry_out, end_all

DISK_SECONDS = 10.0
FAREWELL_SECONDS = 10.0
ANSWERS = "answers"
INSTALL = "install the same on every node"


@dataclass(kw_only=True)
class Case:
    """What is known so far, filled from phase to phase."""

    node: Node
    findings: list[Finding] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    members: list[int] = field(default_factory=list)  # ranks of the nodes that have answered until now
    bandwidth: float | None = None  # GB/s of the sum over all nodes

    def name(self, rank: int) -> str:
        """The node's name."""
        return self.node.names[rank]

    def lose(self, answered: Iterable[int], phase: str) -> None:
        """Leaves out the members that have not answered in a phase, and says of each member whether it has."""
        kept = [rank for rank in self.members if rank in set(answered)]
        for rank in self.members:
            ok = rank in kept
            seen = f"answered in {phase}" if ok else f"stopped answering in {phase}"
            advice = "" if ok else "have the node looked at, and leave it out until then"
            self.findings.append(Finding(check=ANSWERS, ok=ok, seen=seen, advice=advice, node=self.name(rank)))
        self.members = kept


def lead(options: Options, me: Node, probes: Probes, limit: TimeLimit, conclude: Callable[[Case], int]) -> int:
    """All phases; the exit status, which the other nodes are told. conclude: prints and writes what came of it."""
    case = Case(node=me)
    try:
        met = store.host(options.rendezvous)
    except port.Unusable as error:
        case.findings.append(error.finding(me.name))
        return conclude(case)
    canary = Canary(name=secrets.token_hex(8), token=secrets.token_hex(64))
    try:
        _gather_nodes(met, case, options, limit)
        written = _release(case, options, canary)
        limit.phase = "the checks of each node"
        told = {"members": case.members, "seconds": limit.left(time_limit.LOCAL)}
        met.post("local/told", json.dumps({**told, "canary": [canary.name, canary.token] if written else None}))
        found = _examine_all(met, case, options, probes, limit)
        if written:
            _check_answers(case, options, canary, found)
        limit.phase = blame.CHECK
        _add_up_all(met, case, options, probes, limit, found)
        status = conclude(case)
        met.post("verdict", str(status))
        _say_farewell(met, case, limit)
    finally:
        end_all()  # the one that writes the token may be among them
        carry_out(lambda: shared.remove(options.run, canary.name), DISK_SECONDS)
        met.close()
    return status


def _gather_nodes(met: store.Meeting, case: Case, options: Options, limit: TimeLimit) -> None:
    limit.phase = "the gathering of nodes"
    others = range(1, case.node.count)
    joined = met.collect("join", others, limit.at(time_limit.JOIN))
    case.node = Node(
        rank=0, name=case.node.name, names=tuple(joined.get(r, name) for r, name in enumerate(case.node.names))
    )
    case.members = [0, *sorted(joined)]
    # Where none of several has come, it is this node that is late, or the network.
    fault = "node" if joined or case.node.count == 2 else "job"
    for rank in range(case.node.count):
        ok = rank in case.members
        seen = "joined" if ok else f"did not join within {time_limit.JOIN * limit.seconds:.0f} s"
        advice = "" if ok else f"see whether it was started and can reach {options.rendezvous}; else leave it out"
        case.findings.append(Finding(check="join", ok=ok, seen=seen, advice=advice, fault=fault, node=case.name(rank)))


def _release(case: Case, options: Options, canary: Canary) -> bool:
    """Whether the token is there for the others to read."""
    outcome = carry_out(lambda: shared.release(options.run, canary.name, canary.token), DISK_SECONDS)
    finding = outcome.value or Finding(check=shared.CHECK, ok=False, seen=outcome.problem, advice=HANGS)
    case.findings.append(finding.at(case.node.name))
    return finding.ok


def _examine_all(
    met: store.Meeting, case: Case, options: Options, probes: Probes, limit: TimeLimit
) -> dict[int, Local]:
    clock.serve(met, len(case.members) - 1, probes.clock, limit.at(time_limit.LOCAL))
    mine = examine(options, case.node, probes, None, limit.at(time_limit.LOCAL))
    sent = met.collect("local", case.members[1:], limit.at(time_limit.LOCAL + time_limit.GRACE))
    case.lose((0, *sent), "the checks of each node")
    found = {0: mine} | {rank: Local.of(plain["local"]) for rank, plain in sent.items()}
    offsets = {case.name(0): clock.Offset(seconds=0.0, round_trip=0.0)}
    offsets |= {case.name(rank): clock.Offset(**plain["clock"]) for rank, plain in sent.items()}
    case.findings += clock.judge(offsets)
    for rank, local in found.items():
        case.findings += [finding.at(case.name(rank)) for finding in local.findings]
    case.versions = {case.name(rank): local.versions for rank, local in found.items() if local.versions}
    case.findings += packages.odd_ones_out(PACKAGES, case.versions, INSTALL)
    if options.expect_gpus is None:
        counts = {case.name(rank): {gpus.CHECK: str(local.gpus)} for rank, local in found.items()}
        advice = "say with --expect-gpus how many there must be, and have the node looked at"
        case.findings += packages.odd_ones_out("number of GPUs", counts, advice)
    return found


def _check_answers(case: Case, options: Options, canary: Canary, found: Mapping[int, Local]) -> None:
    wrote = {
        rank: case.name(rank)
        for rank, local in found.items()
        if any(f.check == shared.CHECK and f.ok for f in local.findings)
    }
    outcome = carry_out(
        lambda: shared.missing_answers(options.run, canary.name, canary.token, wrote, first=case.node.name),
        DISK_SECONDS,
    )
    if outcome.problem:
        finding = Finding(check=shared.CHECK, ok=False, seen=outcome.problem, advice=HANGS)
        case.findings.append(finding.at(case.node.name))
    else:
        case.findings += [finding.at(node) for node, finding in outcome.value.items()]


def _add_up_all(
    met: store.Meeting,
    case: Case,
    options: Options,
    probes: Probes,
    limit: TimeLimit,
    found: Mapping[int, Local],
) -> None:
    """The sum over all nodes whose own sums are right, all with GPUs or all without."""
    able = [rank for rank, local in found.items() if local.can_add_up]
    if not able:
        met.post("sum/told", json.dumps({}))
        return
    on_gpu = Counter(found[rank].gpus > 0 for rank in able).most_common(1)[0][0]
    able = [rank for rank in able if (found[rank].gpus > 0) == on_gpu]
    first, ranks = 0, {}
    for rank in able:
        ranks[rank] = list(range(first, first + max(1, found[rank].gpus)))
        first += len(ranks[rank])
    told = {"ranks": ranks, "size": first, "on_gpu": on_gpu, "seconds": limit.left(time_limit.COLLECTIVE)}
    met.post("sum/told", json.dumps(told))
    results = {}
    if 0 in ranks:
        results[0] = collective.take_part(
            group_of(options, ranks[0], first, on_gpu), limit.at(time_limit.COLLECTIVE), probes.contribution
        )
    deadline = limit.at(time_limit.COLLECTIVE + time_limit.GRACE)
    sent = met.collect("sum", [rank for rank in able if rank], deadline)
    results |= {rank: collective.Result(**plain) for rank, plain in sent.items()}
    silent = {rank for rank in able if rank not in results}
    case.lose(set(case.members) - silent, f"the {blame.CHECK}")
    _judge(case, results, ranks, [case.name(rank) for rank in sorted(silent)], options.bandwidth_floor)


def _judge(
    case: Case,
    results: Mapping[int, collective.Result],
    ranks: Mapping[int, list[int]],
    silent: list[str],
    floor: float | None,
) -> None:
    named = {case.name(rank): result for rank, result in sorted(results.items())}
    named_ranks = {case.name(rank): numbers for rank, numbers in ranks.items()}
    if not named:
        return
    case.findings += blame.judge(named, named_ranks, silent=silent, floor=floor)
    if len(named) > 1 and not silent and not any(result.problem for result in named.values()):
        case.bandwidth = min(result.bandwidth for result in named.values())


def group_of(options: Options, ranks: list[int], size: int, on_gpu: bool) -> collective.Group:
    """This node's part in the sum over all nodes."""
    where = options.rendezvous
    return collective.Group(
        name="all", host=where.host, port=where.port, first=ranks[0], local=len(ranks), size=size, on_gpu=on_gpu
    )


def _say_farewell(met: store.Meeting, case: Case, limit: TimeLimit) -> None:
    """Keeps the store until the others have read the verdict."""
    deadline = min(time.monotonic() + FAREWELL_SECONDS, limit.at(time_limit.FAREWELL))
    with suppress(store.Lost):
        met.collect("bye", case.members[1:], deadline)
