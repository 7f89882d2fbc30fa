"""A board on one node, engines on another, slow links between them, and requests: for tests and `__main__`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.nodes.machines import Cable, Node, two_nodes
from tests.nodes.traffic import Told
from tests.support import Remote, wait_until

_PROXY = "from tests.nodes.slow_link import SlowLink"
_ENGINE = """
from dpshm.engine.remote import RemoteEngine
from tests.nodes import traffic
import zmq
requests, answers, ends = traffic.sockets((zmq.PULL, zmq.PUSH), ("tcp://10.77.0.2:*",) * 2, bind=True)
engine = RemoteEngine.connect(("tcp://10.77.0.1:9", output), rank, waves=False)
"""
_FRONTEND = """
from tests.nodes import traffic
import zmq
frontend = Frontend.attach(group, owner="api", policy="least_loaded")
links = [traffic.sockets((zmq.PUSH, zmq.PULL), ends, bind=False)[:2] for ends in addresses]
"""


class Deployment:
    """Two engines on the second of two nodes; coordinator and front-end on the first.

    Args:
        using: closes what it is given, the newest first.
        delay_s: one way, of rows, requests and answers.
        lost: the probability that a chunk of rows stalls, as a lost packet does.
        stall_s: for how long.
    """

    def __init__(
        self, using: Callable[[Any], Any], *, delay_s: float = 0.0, lost: float = 0.0, stall_s: float = 0.2
    ) -> None:
        self._using = using
        self.nodes: tuple[Node, Node]
        self.cable: Cable
        *nodes, self.cable = two_nodes(using)
        self.nodes = nodes[0], nodes[1]
        self.group = "nodes"
        self.settings = {
            "group": self.group,
            "dp_size": 2,
            "dp_size_local": 0,
            "host": "10.77.0.1",
            "insecure": True,
            "waves": False,
            "stall_timeout_s": 0,
        }
        self.coordinator = self.start_coordinator()
        output = self.coordinator.eval("coordinator.engine_addresses")[1]
        self.rows = using(self.nodes[1].process())
        self.rows.run(
            f"{_PROXY}\nlink = SlowLink('127.0.0.1', delay_s=delay_s, lost=lost, stall_s=stall_s)",
            delay_s=delay_s,
            lost=lost,
            stall_s=stall_s,
        )
        requests = using(self.nodes[1].process())
        requests.run(f"{_PROXY}\nlink = SlowLink('10.77.0.2', delay_s=delay_s)", delay_s=delay_s)
        self.output = self.rows.eval("link.to(output)", output=output)
        self.engines = [self.start_engine(rank) for rank in range(2)]
        ends = [engine.eval("ends") for engine in self.engines]
        self._addresses = [tuple(requests.eval("link.to(end)", end=end) for end in pair) for pair in ends]
        wait_until(lambda: self.states() == ["idle"] * 2)
        self.frontend = using(self.nodes[0].process())
        self.frontend.run(_FRONTEND, group=self.group, addresses=self._addresses)

    def start_coordinator(self) -> Remote:
        """A coordinator: the first, or one that takes over."""
        self.coordinator = self._using(self.nodes[0].process())
        self.coordinator.run("coordinator = Coordinator(**settings)", settings=self.settings)
        return self.coordinator

    def start_engine(self, rank: int) -> Remote:
        """An engine on the second node."""
        engine: Remote = self._using(self.nodes[1].process())
        engine.run(_ENGINE, rank=rank, output=self.output)
        return engine

    def states(self) -> list[str]:
        """What the board says of each rank."""
        states: list[str] = self.coordinator.eval("coordinator.board.snapshot()['state'].tolist()")
        return states

    def begin(self, number: int) -> None:
        """Sends so many requests; returns at once."""
        f = self.frontend.eval("frontend.index")
        for engine in self.engines:
            engine.begin(f"traffic.serve(engine, requests, answers, {f}, told)")
        self.frontend.begin(f"seen = traffic.Sender(frontend, links).run({number}, told)")

    def finish(self) -> Told:
        """Waits until all have been answered, and gives what the front-end saw."""
        wait_until(self.frontend.ended, 600)
        return Told(*self.frontend.eval("tuple(seen)"))

    def at_rest(self) -> list[tuple[int, ...]]:
        """By rank: outstanding requests and tokens, and what was sent and not received, of both."""
        self.coordinator.run("from tests.nodes.traffic import left_over")
        rows: list[tuple[int, ...]] = self.coordinator.eval("left_over(coordinator.board)")
        return rows
