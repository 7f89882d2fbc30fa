"""A link that chooses: the client's engines are chosen by the board, as long as the board serves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from dpshm.board.words import unpack_control
from dpshm.errors import NoEngineAvailable
from dpshm.frontend.route import Route
from dpshm.vllm.away import AwayRanks
from dpshm.vllm.booking_link import BookingLink
from dpshm.vllm.client_link import LINK, Nowhere
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options

AWAY_HOOK = "_call_utility_async"
"""The method through which a client calls one engine."""
_FIRST_REQUESTS = "first_req_send_socket"
"""The attribute of a client that tells of first requests; clients have it up to vLLM 0.32."""


class BoardLink(BookingLink):
    """A client that chooses by the board."""

    does = "chooses by the board"
    instead_of_broadcast = True

    def __init__(
        self, client: Any, group: str, options: Options, attach: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(client, group, options, attach)
        self._at_control = self._frontend.board.index("control")
        self._warned_none = False
        self._wakes = _FIRST_REQUESTS in client.__dict__
        notices = Nowhere() if self._wakes else None
        if notices is not None:
            self._hooks.replace(_FIRST_REQUESTS, notices)
        self._watch_phase(self._frontend.board, notices)
        self._away: AwayRanks | None = None
        if options.restart and not self._frontend.board.segment.header.waves and AWAY_HOOK in dir(client):
            self._away = AwayRanks(client, self._frontend.board, self._frontend.heard_from)
            self._hooks.put(AWAY_HOOK, self._away.calling(getattr(client, AWAY_HOOK)))
            self._away.begin()

    def close(self) -> None:
        """Takes the hooks off and leaves the board."""
        if self._away is not None:
            self._away.close()
        super().close()

    def _before_add(self) -> None:
        if self._away is not None:
            self._away.begin()
        self._client.current_wave = unpack_control(self._frontend.board.words[self._at_control])[0]

    def _after_add(self) -> None:
        # After the request, as vLLM does it: since 0.32 a rank that wakes up before its request has come goes back
        # to sleep at its first step, and needs a second wake-up. The doorbells would be faster than the request:
        # the engine that gets it rings them.
        if not self._wakes or self._client.__dict__.get(LINK) is not self:
            return  # where the link gave up during the send, vLLM has sent its own wake-up
        try:
            self._frontend.wake(ring=False)
        except Exception:
            self._give_up()

    def _choose(self, stock: Callable[[Any], Any], request: Any) -> Any:
        route: Route | None = None
        try:
            if not self._is_pinned(request):
                route = self._route(request)
        except Exception:
            self._give_up()
            return stock(request)
        if route is None:
            engine = self._stock_choice(stock, request)
            try:
                route = self._book(request, engine)
            except Exception:
                self._give_up()
                return engine
        else:
            # vLLM's own method notes the choice, as that of a request which names its rank.
            request.data_parallel_rank = self._client.engine_ranks_managed.index(route.dp_rank)
            try:
                engine = stock(request)
            finally:
                request.data_parallel_rank = None
            try:
                route = self._rebook(request, route, engine)
            except Exception:
                self._give_up()
                return engine
        if route is not None:
            request.current_wave = route.wave  # the wave of the board when the request was booked
        return engine

    def _stock_choice(self, stock: Callable[[Any], Any], request: Any) -> Any:
        """The engine that vLLM chooses; a request that would go to a rank that is away is refused."""
        away = self._away
        if away is not None and away.ranks and not self._is_pinned(request):
            away.refuse(request)
        engine = stock(request)
        if away is not None and self._rank_of(engine) in away.ranks:
            away.refuse(request, engine)
        return engine

    def _rank_of(self, engine: Any) -> int:
        rank: int = self._client.engine_ranks_managed[self._client.core_engines.index(engine)]
        return rank

    def _elsewhere(self, request: Any, route: Route) -> Route | None:
        """The route, or another if its rank is away: its new process has a row, and is not connected yet."""
        if self._away is None or route.dp_rank not in self._away.ranks:
            return route
        self._routes[request.request_id].remove(route)
        route.cancel()
        outstanding = self._frontend.snapshot()["requests"]
        others = [rank for rank in self._client.engine_ranks_managed if rank not in self._away.ranks]
        for rank in sorted(others, key=lambda rank: int(outstanding[rank])):
            try:
                found = self._frontend.route(self._tokens(request), dp_rank=rank, wake=False)
            except NoEngineAvailable:
                continue
            return self._note(request, found)
        return None

    def _rebook(self, request: Any, route: Route, engine: Any) -> Route | None:
        """The route of a request that vLLM sends to `engine`: another than `route` if vLLM knew better.

        vLLM may send a request elsewhere than to the rank that it names: a rank that sleeps or was scaled away.
        """
        client = self._client
        if client.engine_ranks_managed[client.core_engines.index(engine)] == route.dp_rank:
            return route
        self._routes[request.request_id].remove(route)
        route.cancel()
        return self._book(request, engine)

    def _board_choice(self, request: Any, exclude: Collection[int] = ()) -> Route:
        tokens, prompt, key = self._tokens(request), self._prompt(request), self._key(request)
        return self._frontend.route(tokens, prompt=prompt, key=key, exclude=exclude, wake=False)

    def _route(self, request: Any) -> Route | None:
        try:
            full = self._adapters.full_for(request, self._client.engine_ranks_managed)
            try:
                route = self._board_choice(request, full)
            except NoEngineAvailable:
                if not full:
                    raise
                route = self._board_choice(request)  # the ranks with a place for its adapter cannot take it
            self._note(request, route)
            return self._elsewhere(request, route)
        except NoEngineAvailable as e:
            if not self._warned_none:
                self._warned_none = True
                logger.warning("dpshm: vLLM chooses while there is no engine to choose (said once): %s", e)
            return None
