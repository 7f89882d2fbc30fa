"""Two nodes with a board, two ranks and two front-ends each, relays between the boards, and slow links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.nodes.machines import Cable, Node, two_nodes
from tests.nodes.relayed_traffic import Told
from tests.support import Remote, wait_until

GROUP = "nodes"
RANKS, FRONTENDS = 4, 4
_LINK = "from tests.nodes.slow_link import SlowLink\nlink = SlowLink(host, delay_s=delay_s, lost=lost)"
_TRAFFIC = "from tests.nodes import relayed_traffic as traffic\nimport zmq\n"
_ENGINE = (
    _TRAFFIC
    + """
engine = Engine.attach(group, rank)
requests = traffic.socket(zmq.PULL, f"tcp://{host}:*", bind=True)
"""
)
_FRONTEND = (
    _TRAFFIC
    + """
frontend = Frontend.attach(group, owner=f"api-{number}", policy="least_loaded")
answers = traffic.socket(zmq.PULL, f"tcp://{host}:*", bind=True)
"""
)
_END = "{}.getsockopt_string(zmq.LAST_ENDPOINT)"


def node_of(row: int) -> int:
    """Ranks 0 and 1 are on the first node, 2 and 3 on the second; so are front-ends, by number and not by row."""
    return row // 2


class Relayed:
    """The deployment, at rest.

    Args:
        using: closes what it is given, the newest first.
        delay_s: one way, of what the relays tell, and of requests and answers between the nodes.
        lost: the probability that a chunk between the relays stalls, as a lost packet does.
        settings: of both coordinators.
    """

    def __init__(
        self, using: Callable[[Any], Any], *, delay_s: float = 0.0, lost: float = 0.0, **settings: Any
    ) -> None:
        self._using, self._delay_s = using, delay_s
        self.nodes: tuple[Node, Node]
        self.cable: Cable
        *nodes, self.cable = two_nodes(using)
        self.nodes = nodes[0], nodes[1]
        self.settings = {"group": GROUP, "dp_size": RANKS, "nodes": 2, "waves": False, "insecure": True} | settings
        self.coordinators: list[Remote] = []
        for node in range(2):
            self.coordinators.append(using(self.nodes[node].process()))
            if node:
                self.link = self._slow_link(1, lost)
                *addresses, key = self.coordinators[0].eval("coordinator.head_addresses").split(",")
                relayed = [self._through(self.link, address) for address in addresses[3:]]
                self.head = ",".join([*addresses[:3], *relayed, key])
            self.start(node)
        self.engines = [self.start_engine(rank) for rank in range(RANKS)]
        self.frontends: list[Remote] = []
        for number in range(FRONTENDS):
            frontend: Remote = using(self.nodes[node_of(number)].process())
            address = self.cable.addresses[node_of(number)]
            frontend.run(_FRONTEND, group=GROUP, number=number, host=address)
            self.frontends.append(frontend)
        wait_until(lambda: [self.states(node) for node in range(2)] == [["idle"] * RANKS] * 2)

    def start(self, node: int) -> None:
        """Starts a node's coordinator, with its relay: the first, or one that takes over."""
        mine = {"node": node, "head": self.head} if node else {"host": self.cable.addresses[0]}
        self.coordinators[node].run("coordinator = Coordinator(**settings)", settings=self.settings | mine)

    def restart(self, node: int) -> None:
        """Kills a node's coordinator and starts another one."""
        self.coordinators[node].kill()
        self.coordinators[node] = self._using(self.nodes[node].process())
        self.start(node)

    def start_engine(self, rank: int, node: int | None = None) -> Remote:
        """An engine, on its node or on another one."""
        node = node_of(rank) if node is None else node
        engine: Remote = self._using(self.nodes[node].process())
        engine.run(_ENGINE, group=GROUP, rank=rank, host=self.cable.addresses[node])
        return engine

    def states(self, node: int) -> list[str]:
        """What a node's board says of each rank."""
        states: list[str] = self.coordinators[node].eval("coordinator.board.snapshot()['state'].tolist()")
        return states

    def column(self, node: int, name: str) -> list[int]:
        """A column of the snapshot of a node's board."""
        column: list[int] = self.coordinators[node].eval(f"coordinator.board.snapshot()['{name}'].tolist()")
        return column

    def begin(self, number: int) -> None:
        """Has each front-end send so many requests; returns at once."""
        slow = [self._slow_link(node, 0.0) for node in range(2)]
        to_engines = [engine.eval(_END.format("requests")) for engine in self.engines]
        to_frontends = [frontend.eval(_END.format("answers")) for frontend in self.frontends]
        rows = [frontend.eval("frontend.index") for frontend in self.frontends]

        def between(here: int, there: int, address: str) -> str:
            return address if here == there else self._through(slow[here], address)

        for rank, engine in enumerate(self.engines):
            ends = {
                f: between(node_of(rank), node_of(number), address)
                for number, (f, address) in enumerate(zip(rows, to_frontends, strict=True))
            }
            engine.run("answers = {f: traffic.socket(zmq.PUSH, end) for f, end in ends.items()}", ends=ends)
            engine.begin("traffic.serve(engine, requests, answers, told)")
        for number_, frontend in enumerate(self.frontends):
            addresses = [
                between(node_of(number_), node_of(rank), address) for rank, address in enumerate(to_engines)
            ]
            frontend.run("ranks = [traffic.socket(zmq.PUSH, end) for end in ends]", ends=addresses)
            frontend.begin(f"seen = traffic.Caller(frontend, ranks, answers).run({number}, told)")

    def ended(self) -> bool:
        """Whether all requests have been answered."""
        return all(frontend.ended() for frontend in self.frontends)

    def finish(self, timeout_s: float = 600) -> list[Told]:
        """Waits until all have been answered, and gives what the front-ends saw."""
        wait_until(self.ended, timeout_s)
        return [Told(*frontend.eval("tuple(seen)")) for frontend in self.frontends]

    def at_rest(self) -> bool:
        """Whether nothing is outstanding and nothing in flight on either board."""
        for coordinator in self.coordinators:
            coordinator.run("from tests.nodes.relayed_traffic import left_over, received_here")
        return all(c.eval("left_over(coordinator.board)") == (0, 0, 0, 0) for c in self.coordinators)

    def received(self, ranks: list[int], node: int) -> tuple[int, int]:
        """Requests and tokens that ranks have received, as a node's board says."""
        told: tuple[int, int] = self.coordinators[node].eval(f"received_here(coordinator.board, {ranks})")
        return told

    def _slow_link(self, node: int, lost: float) -> Remote:
        link: Remote = self._using(self.nodes[node].process())
        link.run(_LINK, host=self.cable.addresses[node], delay_s=self._delay_s, lost=lost)
        return link

    @staticmethod
    def _through(link: Remote, address: str) -> str:
        through: str = link.eval("link.to(address)", address=address)
        return through
