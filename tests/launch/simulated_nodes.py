"""The nodes of a preflight as threads on a simulated clock, with a store in memory: minutes pass in milliseconds.

The protocol between the nodes is the real one: coordinator, worker, time limit, clock, report. The checks of a node and
the sums are stand-ins. The clock advances only while every node waits, and then to the earliest deadline.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

from megatron_paint.launch.preflight import clock, collective, coordinator, report, time_limit, worker
from megatron_paint.launch.preflight.collective import SumResult
from megatron_paint.launch.preflight.identity import Node
from megatron_paint.launch.preflight.node_checks import NodeResults
from megatron_paint.launch.preflight.options import parse
from megatron_paint.launch.preflight.probes import Probes
from megatron_paint.launch.preflight.result import CheckResult
from megatron_paint.launch.preflight.store import NodeStore, StoreLost
from megatron_paint.launch.preflight.time_limit import TimeLimit
from megatron_paint.launch.preflight.timed_process import Outcome

FOREVER = float("inf")
CHECK_SECONDS = 2.0  # of each node, and of a sum
BANDWIDTH = 3.0  # GB/s of every sum


class Stopped(Exception):
    """Ends the thread of a node that stopped, once nobody else can continue."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a node."""

    absent: bool = False  # it never starts
    stops_in: str = ""  # "checks" or "sum"
    delays: dict[str, float] = field(default_factory=dict)  # seconds before it posts or reads a key


class Simulation:
    """The clock, and who waits until when. All methods may be called from the thread of any node."""

    def __init__(self) -> None:
        self.now = 0.0
        self.changed = threading.Condition(threading.RLock())
        self._active = 0
        self._waits: list[tuple[Callable[[], bool], float]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, self.now + seconds)

    def wait(self, ready: Callable[[], bool], deadline: float) -> None:
        """Returns when `ready`, or at the deadline. Errors: Stopped if the deadline is never reached."""
        with self.changed:
            own = (ready, deadline)
            self._waits.append(own)
            self._active -= 1
            self._advance()
            while not self._can_continue(own):
                self.changed.wait()
            self._waits.remove(own)
            self._active += 1
            if not ready() and deadline == FOREVER:
                raise Stopped

    def run(self, *nodes: Callable[[], None]) -> None:
        """Runs all nodes, each in a thread, to their ends."""
        errors: list[BaseException] = []

        def run_one(node: Callable[[], None]) -> None:
            try:
                node()
            except Stopped:
                pass
            except BaseException as error:
                errors.append(error)
            with self.changed:
                self._active -= 1
                self._advance()

        self._active = len(nodes)
        threads = [threading.Thread(target=run_one, args=(node,), daemon=True) for node in nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a node of the simulation hangs"
        if errors:
            raise errors[0]

    def _can_continue(self, wait: tuple[Callable[[], bool], float]) -> bool:
        ready, deadline = wait
        return ready() or self.now >= deadline

    def _advance(self) -> None:
        if self._active == 0 and self._waits and not any(map(self._can_continue, self._waits)):
            self.now = min(deadline for _, deadline in self._waits)
        self.changed.notify_all()


class SimulatedStore(NodeStore):
    """One node's access to the store of all nodes, which the first node closes."""

    def __init__(self, simulation: Simulation, shared: SimpleNamespace, rank: int, fault: Fault) -> None:
        self._simulation, self._shared, self._rank, self._fault = simulation, shared, rank, fault

    def post(self, key: str, content: str) -> None:
        self._begin(key)
        with self._simulation.changed:
            self._shared.posted[key] = content
            self._simulation.changed.notify_all()

    def count(self, key: str) -> int:
        self._begin(key)
        with self._simulation.changed:
            self._shared.counts[key] = self._shared.counts.get(key, 0) + 1
            return self._shared.counts[key]

    def wait_for(self, key: str, deadline: float, *, pause: float = 0.0, default: str | None = None) -> str:
        self._begin(key)
        self._simulation.wait(lambda: key in self._shared.posted or self._shared.closed, deadline)
        if self._shared.closed:
            raise StoreLost("the store is closed")
        if key in self._shared.posted:
            return self._shared.posted[key]
        if default is None:
            raise StoreLost(f"{key} was not posted in time")
        return default

    def close(self) -> None:
        with self._simulation.changed:
            self._shared.closed |= self._rank == 0
            self._simulation.changed.notify_all()

    def _begin(self, key: str) -> None:
        if key in self._fault.delays:
            self._simulation.sleep(self._fault.delays[key])
        if self._shared.closed:
            raise StoreLost("the store is closed")


@dataclass(kw_only=True)
class Ended:
    """The end of a simulated preflight."""

    status: dict[str, int] = field(default_factory=dict)  # by node; without those that stopped
    ended_at: dict[str, float] = field(default_factory=dict)
    results: list[CheckResult] = field(default_factory=list)
    reported_at: float = 0.0

    def failed(self) -> set[tuple[str, str]]:
        """Node and check of each result that is not ok."""
        return {(result.node, result.check) for result in self.results if not result.ok}


def simulate(monkeypatch, folder, *faults: Fault, limit: int, options: tuple[str, ...] = ()) -> Ended:
    """Runs a node for each of `faults`, named n0, n1, ...; bad nodes are written to the file `bad` in the folder."""
    simulation, ended = Simulation(), Ended()
    shared = SimpleNamespace(posted={}, counts={}, closed=False, adding=set())
    names = tuple(f"n{rank}" for rank in range(len(faults)))
    given = ["--run", str(folder / "run"), "--rendezvous", "h:29500", "--settings", "s.yaml"]
    parsed = parse([*given, "--exclude-bad", str(folder / "bad"), f"--limit-seconds={limit}", *options])
    by_thread = threading.local()

    def stop_if(where: str) -> None:
        if by_thread.fault.stops_in == where:
            simulation.wait(lambda: False, FOREVER)

    def check_node(options, me, probes, canary, deadline):
        simulation.sleep(CHECK_SECONDS)
        stop_if("checks")
        return NodeResults(results=[CheckResult(check="GPUs", ok=True, seen="none")], versions={}, gpus=0)

    def run_sum(group, deadline, contribution):
        stop_if("sum")
        with simulation.changed:
            shared.adding.add(group.first)
            simulation.changed.notify_all()
        simulation.wait(lambda: len(shared.adding) == group.size, deadline)
        if len(shared.adding) < group.size:
            return SumResult(problem="it did not end in time", kind="stalled", progress=2)
        simulation.sleep(CHECK_SECONDS)
        return SumResult(progress=6, bandwidth=BANDWIDTH)

    def report_results(state):
        ended.results, ended.reported_at = state.results, simulation.now
        return report.report_results(state, parsed, simulation.now)

    def run_node(rank: int) -> None:
        by_thread.fault, by_thread.rank = faults[rank], rank
        me, probes = Node(rank=rank, name=names[rank], names=names), Probes(clock=simulation.monotonic)
        time = TimeLimit(float(limit), me.name, "the start")
        if rank == 0:
            status = coordinator.run_coordinator(parsed, me, probes, time, report_results)
        else:
            status = worker.run_worker(parsed, me, probes, time)
        ended.status[me.name], ended.ended_at[me.name] = status, simulation.now

    for module in (clock, coordinator, time_limit, worker):
        monkeypatch.setattr(module, "time", simulation)
    for module in (coordinator, report):
        monkeypatch.setattr(module, "run_timed", lambda work, seconds: Outcome(value=work()))
    for module in (coordinator, worker):
        monkeypatch.setattr(module, "check_node", check_node)
    monkeypatch.setattr(collective, "run_sum", run_sum)
    monkeypatch.setattr(coordinator, "end_all", lambda: None)

    def store(*_: object) -> SimulatedStore:
        return SimulatedStore(simulation, shared, by_thread.rank, by_thread.fault)

    monkeypatch.setattr(coordinator, "open_store", store)
    monkeypatch.setattr(worker, "join_store", store)
    simulation.run(*(lambda rank=rank: run_node(rank) for rank, fault in enumerate(faults) if not fault.absent))
    return ended
