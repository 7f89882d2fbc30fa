"""A router's open bookings on its node's board, by request. Knows nothing of Ray.

A replica of Ray Serve does not count what it receives. So a booking stays from the choice until the request has
ended, and the sums of all routers' bookings are what is outstanding at each replica.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from dpshm.errors import DpshmError, NoEngineAvailable
from dpshm.frontend.handle import Frontend
from dpshm.frontend.route import Route
from dpshm.policies import LeastWork, Request, View, sees_work
from dpshm.rules.prefix_hash import Prompt, Tokens

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long after a failure the board is tried again."""
Cost = int | Prompt | Tokens
"""What is known of a request: its number of prompt tokens, or the token ids."""
_least_work = LeastWork()


@sees_work
def least_outstanding(view: View, request: Request) -> int:
    """`LeastWork` where replicas have learnt how long their steps take, else the fewest outstanding tokens."""
    work = view.work
    if work.learnt:
        return _least_work(view, request)
    cached = request.cached or [0] * len(work.tokens)
    return view.least([tokens - hit for tokens, hit in zip(work.tokens, cached, strict=True)])


class Bookings:
    """The open bookings.

    Args:
        group: the group's name.
        owner: the router's name on the board.
        attach: opens the board; for tests.
    """

    def __init__(self, group: str, owner: str, attach: Callable[..., Frontend] = Frontend.attach) -> None:
        self._group, self._owner, self._attach = group, owner, attach
        self._frontend: Frontend | None = None
        self._next_try = 0.0
        self._open: dict[str, Route] = {}

    def choose(self, request_id: str, cost: Cost, ranks: Collection[int]) -> int | None:
        """Books a request at one of some ranks; None if the board does not tell which.

        An earlier booking of the same request is given back: Ray Serve asks again after a replica refused.
        """
        self.cancel(request_id)
        frontend = self._ready()
        if frontend is None:
            return None
        others = set(range(frontend.board.dp_size)).difference(ranks)
        size, prompt = (max(1, cost), None) if isinstance(cost, int) else (0, cost)
        try:
            route = frontend.route(size, prompt=prompt, exclude=others, wake=False)
        except NoEngineAvailable:
            return None
        except DpshmError as e:
            self._lose(e)
            return None
        self._open[request_id] = route
        return route.dp_rank

    def moved(self, request_id: str, dp_rank: int | None) -> None:
        """The request went to another rank than the one it is booked at; None: to one without a row here."""
        route = self._open.get(request_id)
        if route is None or route.dp_rank == dp_rank:
            return
        tokens = route.prompt_tokens
        self.cancel(request_id)
        if dp_rank is None or (frontend := self._ready()) is None:
            return
        try:
            self._open[request_id] = frontend.route(tokens, dp_rank=dp_rank, wake=False)
        except DpshmError as e:
            logger.debug("request %s is not booked at rank %d: %s", request_id, dp_rank, e)

    def cancel(self, request_id: str) -> None:
        """The request was not sent."""
        if (route := self._open.pop(request_id, None)) is not None:
            route.cancel()

    def ended(self, request_id: str) -> None:
        """The request has ended, in whatever way.

        The booking is taken back, as one that was never received: at a rank of another node, what is not received
        counts as late, and stays as long as requests come.
        """
        self.cancel(request_id)

    def close(self) -> None:
        """Gives all back."""
        for request_id in list(self._open):
            self.ended(request_id)
        if self._frontend is not None:
            self._frontend.close()
            self._frontend = None

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def _ready(self) -> Frontend | None:
        frontend = self._frontend
        if frontend is not None and frontend.board.segment.linked:
            return frontend
        if time.monotonic() < self._next_try:
            return None
        if frontend is not None:  # the board's actor ended, and a new one made a new board
            self.close()
        try:
            self._frontend = self._attach(self._group, owner=self._owner, policy=least_outstanding)
        except DpshmError as e:
            self._lose(e)
        return self._frontend

    def _lose(self, why: DpshmError) -> None:
        self._next_try = time.monotonic() + RETRY_S
        logger.warning("Ray's own choice is taken: group %r cannot be used: %s", self._group, why)
