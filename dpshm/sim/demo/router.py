"""The two ways in which a simulated front-end decides, and how stale each decision was.

`BoardRouter` reads the board. `PubRouter` lets the same policy choose from its copy of the last broadcast, then
pins the choice. So bookings and wake-ups are the same on both paths, and only the load that the policy sees
differs.

The staleness of a decision is the largest over the ranks. For one rank it is the publish time of its newest report
on the board, less the publish time of the report that the decision used. The newest publish times are read from
the board right after the choice, on both paths. On the PUB path each report carries its own time. On the board
path the publish times are noted before the board is read and again when the policy begins, some 50 us later. If a
rank published in between, its load word decides: if the policy got the word that is on the board now, it used the
newer report, else the older. `dpshm scale` may change the number of ranks at any moment, so whole columns of the
board are noted, and those of the ranks that the policy saw count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec
import zmq

from dpshm.frontend.handle import Frontend
from dpshm.frontend.route import Route
from dpshm.policies import Request, View, by_name
from dpshm.sim.demo.broadcast import StatsCopy, broadcast_decoder
from dpshm.sim.demo.messages import FrontendSettings, broadcast_address
from dpshm.sim.demo.prompts import TracePrompt


class Router(ABC):
    """Chooses ranks for a front-end.

    Attributes:
        frontend: the front-end's handle.
        staleness_us: the staleness of each decision.
    """

    frontend: Frontend

    def __init__(self) -> None:
        self.staleness_us: list[float] = []

    @abstractmethod
    def route(self, prompt_tokens: int, blocks: tuple[int, ...] = ()) -> Route:
        """Chooses a rank and books the request; `blocks` are the hashes of its prompt's blocks."""

    def done(self, route: Route, output_tokens: int) -> None:
        """Records the end of a request."""
        route.done(output_tokens)

    def register(self, poller: zmq.Poller) -> None:  # noqa: ARG002 - for routers that receive
        """Makes a poller return when `receive_broadcasts` has a message to receive. The board path needs none."""
        return

    def receive_broadcasts(self) -> bool:
        """Receives broadcasts; returns whether the router can decide."""
        return True

    def close(self) -> None:
        """Leaves the group and frees the row."""
        self.frontend.close()

    def _note(self, used_ns: list[int], newest_ns: list[int]) -> None:
        behind_ns = max(newest - used for newest, used in zip(newest_ns, used_ns, strict=True))
        self.staleness_us.append(max(0, behind_ns) / 1e3)


class BoardRouter(Router):
    """Decides from the board."""

    def __init__(self, settings: FrontendSettings) -> None:
        super().__init__()
        choose = by_name(settings.policy)
        self._block_tokens = settings.block_tokens
        self._before_ns: list[int] = []

        def watched(view: View, request: Request) -> int:
            # Times before words: a report that comes in between makes its rank look stale, not fresh.
            begun_ns, words = self._beat.tolist(), self._load.tolist()
            rank = choose(view, request)
            newest_ns = self._beat.tolist()
            each = zip(view.columns.load, words, begun_ns, self._before_ns, strict=False)
            used_ns = [begun if given == word else before for given, word, begun, before in each]
            self._note(used_ns, newest_ns[: len(used_ns)])
            return rank

        vars(watched)["sees_work"] = getattr(choose, "sees_work", False)  # a front-end asks the policy itself
        self.frontend = Frontend.attach(settings.group, owner=f"demo:{settings.index}", policy=watched)
        self._beat, self._load = self.frontend.board.beat, self.frontend.board.load

    def route(self, prompt_tokens: int, blocks: tuple[int, ...] = ()) -> Route:
        prompt = TracePrompt(blocks, self._block_tokens) if blocks and self._block_tokens else None
        self._before_ns = self._beat.tolist()
        return self.frontend.route(prompt_tokens, prompt=prompt)

    def close(self) -> None:
        del self._beat, self._load  # views of the board
        super().close()


class PubRouter(Router):
    """Decides from the last broadcast."""

    def __init__(self, settings: FrontendSettings) -> None:
        super().__init__()
        self._copy = StatsCopy(settings.dp_size, settings.num_frontends, settings.index, by_name(settings.policy))
        self._own = [0] * settings.dp_size
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._socket.connect(broadcast_address(settings.prefix))
        self.frontend = Frontend.attach(settings.group, owner=f"demo:{settings.index}")
        self._beat = self.frontend.board.beat[: settings.dp_size]

    def route(self, prompt_tokens: int, blocks: tuple[int, ...] = ()) -> Route:  # noqa: ARG002 - not broadcast
        self.receive_broadcasts()
        rank = self._copy.choose(Request(prompt_tokens), self._own)
        self._note(self._copy.published_ns, self._beat.tolist())
        route = self.frontend.route(prompt_tokens, dp_rank=rank)
        self._own[rank] += 1
        return route

    def done(self, route: Route, output_tokens: int) -> None:
        self._own[route.dp_rank] -= 1
        super().done(route, output_tokens)

    def register(self, poller: zmq.Poller) -> None:
        poller.register(self._socket, zmq.POLLIN)

    def receive_broadcasts(self) -> bool:
        while True:
            try:
                self._copy.update(broadcast_decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return all(self._copy.published_ns)
            except msgspec.MsgspecError:
                continue

    def close(self) -> None:
        del self._beat  # a view of the board
        self._socket.close(linger=0)
        super().close()


def make_router(settings: FrontendSettings) -> Router:
    """The router that the settings ask for."""
    return PubRouter(settings) if settings.stats == "pub" else BoardRouter(settings)
