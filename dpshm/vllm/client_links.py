"""Links between one client of vLLM's and the board of its group; each hooks its client, and knows the way back.

    WaveLink      one engine, behind an external load balancer: the wave comes from the board
    BookingLink   what the two below share: a front-end's row, in which every request sent is booked
    BoardLink     chooses engines by the board
    ShadowLink    leaves the choice to vLLM and compares (`dpshm.vllm.shadow`)

The hooks are on the instance (`dpshm.vllm.instance`):

    get_core_engine_for_request   chooses by the board and books. A request that is pinned to a rank, or belongs
                                  to a session that is placed already, goes where vLLM sends it, and is booked too
    add_request_async             reads the wave from the board, wakes paused ranks once the request is sent (up to
                                  vLLM 0.32), and cancels the booking if the send fails
    engines_running               an attribute that vLLM reads, and users through ``dp_engines_running``: a view of
                                  the board, true while the ranks run and false while they sleep or wake up
    first_req_send_socket         up to vLLM 0.32, where a client tells its own stats task of a first request. A
                                  client that chooses by the board has no such task, so its notice goes nowhere

From vLLM 0.33 on the engine that gets a request wakes the others, and no client says anything: a coordinator of
that release logs an error at a first-request message.

vLLM keeps its own record of requests in flight. It stays right: vLLM's own method notes each choice that we made,
as the choice of a request that names its rank. While the board serves, the client does not listen to the broadcast
at all. When a link gives up, the hooks come off and the client begins to listen.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import zmq

from dpshm.board.board import Board
from dpshm.board.words import unpack_control
from dpshm.errors import NoEngineAvailable
from dpshm.frontend.handle import Frontend
from dpshm.frontend.route import Route
from dpshm.policies import Affinity
from dpshm.rules.waves import Phase
from dpshm.vllm import metrics
from dpshm.vllm.away import AwayRanks
from dpshm.vllm.booked import BookedWriter
from dpshm.vllm.find import owner_name
from dpshm.vllm.instance import InstanceHooks
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options
from dpshm.vllm.prompts import PromptHasher, RequestPrompt

AWAY_HOOK = "_call_utility_async"
"""The method through which a client calls one engine."""
LINK = "_dpshm_link"
"""The attribute of a client that holds its link: None once there is none, absent before anything was tried."""
SESSION_EPSILON = 0.5
"""How far above the mean a rank may be loaded that `least_work` keeps a session on."""
_FIRST_REQUESTS = "first_req_send_socket"
"""The attribute of a client that tells of first requests; clients have it up to vLLM 0.32."""


class _Nowhere:
    """Stands for a client's socket for notices of first requests: sends them to no peer, and never waits."""

    async def send(self, *_: Any, **__: Any) -> None:
        """Drops a notice."""


class ClientLink:
    """One client and the board of its group.

    Attributes:
        does: what the link does, for the log.
        instead_of_broadcast: whether the client needs no broadcast while it has this link.
    """

    does: str
    instead_of_broadcast: bool

    def __init__(self, client: Any, group: str) -> None:
        self._client = client
        self._group = group
        self._hooks = InstanceHooks(client)

    def _watch_phase(self, board: Board) -> None:
        """Makes the client's flag a view of the board's control word."""
        words, at = board.words, board.index("control")

        def running() -> bool:
            try:
                return unpack_control(words[at])[1] is Phase.RUNNING
            except Exception:
                return False  # the next request ends the link; this reader may be in another thread

        self._hooks.view("engines_running", running)

    def heard(self, outputs: Any) -> None:
        """Called with what a step of an engine brought to this client, one output a request."""

    def finished(self, request_ids: Any) -> None:
        """Called with the ids of requests that are over: finished, aborted or refused."""

    def close(self) -> None:
        """Takes the hooks off and leaves the board."""
        self._hooks.remove()
        metrics.hide(self._group)

    def _give_up(self) -> None:
        """Ends the link after a failure of ours: the hooks come off, and the client goes the stock way."""
        client = self._client
        logger.warning(
            "dpshm: API server %d leaves the board and listens to the coordinator from now on",
            client.client_index,
            exc_info=True,
        )
        setattr(client, LINK, None)
        try:
            self.close()
        except Exception:
            logger.debug("dpshm: the board could not be left", exc_info=True)
        client.engines_running = False  # at worst one wake-up too many
        client._ensure_stats_update_task()  # the task that receives the broadcast and sends the wake-ups


class WaveLink(ClientLink):
    """A client with one engine, behind an external load balancer: the wave comes from the board."""

    does = "reads the wave from the board and chooses nothing (external load balancing)"
    instead_of_broadcast = False  # vLLM's task sends the wake-ups of this client

    def __init__(self, client: Any, group: str, _options: Options) -> None:
        super().__init__(client, group)
        self._board = Board.attach(group)
        add_request_async = client.add_request_async

        async def add(request: Any) -> Any:
            try:
                client.current_wave = unpack_control(int(self._board.control[0]))[0]
            except Exception:
                self._give_up()
            return await add_request_async(request)

        self._hooks.put("add_request_async", add)
        self._watch_phase(self._board)

    def close(self) -> None:
        """Takes the hooks off and leaves the board."""
        super().close()
        self._board.close()


class BookingLink(ClientLink):
    """A client with a front-end's row, in which every request that it sends is booked."""

    def __init__(
        self, client: Any, group: str, options: Options, attach: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(client, group)
        self._routes: dict[str, list[Route]] = {}
        self._output_tokens: dict[str, int] = {}  # of each request whose first token came
        self._needs_key = options.policy.startswith("affinity")
        self._keeps_sessions = options.policy == "least_work"
        core_client = import_module("vllm.v1.engine.core_client")
        self._count_tokens = import_module("vllm.utils").length_from_prompt_token_ids_or_embeds
        # After 0.16: documents of a late-interaction query go to the engine that has the query.
        self._late_interaction = getattr(core_client, "get_late_interaction_engine_index", lambda *_: None)
        self._frontend = (attach or Frontend.attach)(
            group,
            owner=owner_name(client.client_index, client.input_socket.getsockopt(zmq.LAST_ENDPOINT).decode()),
            ranks=client.engine_ranks_managed,
            policy=Affinity(SESSION_EPSILON)
            if self._keeps_sessions
            else options.policy,  # without a key it is least_work
        )
        self._prompts = PromptHasher(client)
        self._booked: BookedWriter | None = None
        if not self._prompts.works:
            self._frontend.expect_no_prompts()  # why was logged, or there is no prefix cache
        else:
            try:
                self._booked = BookedWriter(self._frontend.board, self._frontend.index)
            except Exception:
                self._prompts.leave("engines cannot be told what is booked", exc_info=True)
        choose, add_request_async = client.get_core_engine_for_request, client.add_request_async

        async def add(request: Any) -> Any:
            try:
                self._before_add()
            except Exception:
                self._give_up()
            try:
                return await add_request_async(request)
            except BaseException:
                for route in self._routes.pop(request.request_id, ()):
                    route.cancel()
                raise
            finally:
                self._after_add()

        self._hooks.put("get_core_engine_for_request", lambda request: self._choose(choose, request))
        self._hooks.put("add_request_async", add)

    def heard(self, outputs: Any) -> None:
        """Counts tokens, and times the first of each request."""
        try:
            routes, output_tokens = self._routes, self._output_tokens
            for output in outputs:
                request_id, tokens = output.request_id, len(output.new_token_ids)
                if request_id in output_tokens:
                    output_tokens[request_id] += tokens
                elif tokens and (of_request := routes.get(request_id)):
                    output_tokens[request_id] = tokens
                    of_request[-1].first_token(_queue_s(getattr(output, "events", None)))
        except Exception:
            self._give_up()

    def finished(self, request_ids: Any) -> None:
        """Ends the bookings of these requests."""
        try:
            for request_id in request_ids:
                output_tokens = self._output_tokens.pop(request_id, 0)
                for route in reversed(self._routes.pop(request_id, [])):  # several: parts of a streamed input
                    route.done(output_tokens)
                    output_tokens = 0
        except Exception:
            self._give_up()

    def _before_add(self) -> None:
        """Called before vLLM stamps a request with the wave of its client."""

    def _after_add(self) -> None:
        """Called after vLLM sent a request, or failed to; never raises."""

    def _choose(self, stock: Callable[[Any], Any], request: Any) -> Any:
        """The engine that gets the request, as vLLM names engines. Calls `stock` exactly once."""
        raise NotImplementedError

    def close(self) -> None:
        """Takes the hooks off and leaves the board."""
        super().close()
        self._frontend.close()
        if self._booked is not None:
            self._booked.close()
            self._booked = None

    def _tokens(self, request: Any) -> int:
        return int(self._count_tokens(request.prompt_token_ids, getattr(request, "prompt_embeds", None)))

    def _prompt(self, request: Any) -> RequestPrompt | None:
        """What is looked up in the ranks' prefix indexes; None for a later part of a streamed input, or to look up
        nothing.
        """
        return (
            None if self._routes.get(request.request_id) else self._prompts.prompt(request, self._tokens(request))
        )

    def _key(self, request: Any) -> str | None:
        """The key by which requests meet on one rank: the session that the client names (vLLM 0.32 on).

        For the policy `affinity`, and for `least_work` where the prompt cannot be looked up though engines cache
        it: the session is then all that tells where its cache is. No key is made of the prompt's first tokens:
        prompts that all begin alike would all have one key.
        """
        session: str | None = getattr(request, "session_id", None) or None
        if session is None or self._needs_key:
            return session
        prompts = self._prompts
        looks_up = prompts.works and getattr(request, "prompt_embeds", None) is None
        return session if self._keeps_sessions and prompts.caches and not looks_up else None

    def _is_pinned(self, request: Any) -> bool:
        client = self._client
        return (
            request.data_parallel_rank is not None
            or request.request_id in client.reqs_in_flight
            or self._late_interaction(request.pooling_params, len(client.core_engines)) is not None
        )

    def _book(self, request: Any, engine: Any) -> Route | None:
        """Books a choice that vLLM made; None if the board says that the engine is dead."""
        client = self._client
        rank = client.engine_ranks_managed[client.core_engines.index(engine)]
        try:
            prompt = self._prompt(request)
            route = self._frontend.route(self._tokens(request), prompt=prompt, dp_rank=rank, wake=False)
            return self._note(request, route)
        except NoEngineAvailable as e:
            logger.debug("dpshm: not booked: %s", e)
            return None

    def _note(self, request: Any, route: Route) -> Route:
        self._routes.setdefault(request.request_id, []).append(route)
        if self._booked is not None:
            self._booked.tell(request.request_id, route.cached_tokens)
        return route


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
        if self._wakes:
            self._hooks.replace(_FIRST_REQUESTS, _Nowhere())
        self._watch_phase(self._frontend.board)
        self._away: AwayRanks | None = None
        if options.restart and not self._frontend.board.segment.header.waves and AWAY_HOOK in dir(client):
            self._away = AwayRanks(client, self._frontend.board)
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

    def _route(self, request: Any) -> Route | None:
        try:
            prompt, key = self._prompt(request), self._key(request)
            route = self._frontend.route(self._tokens(request), prompt=prompt, key=key, wake=False)
            self._note(request, route)
            return self._elsewhere(request, route)
        except NoEngineAvailable as e:
            if not self._warned_none:
                self._warned_none = True
                logger.warning("dpshm: vLLM chooses while there is no engine to choose (said once): %s", e)
            return None


def _queue_s(events: Any) -> float | None:
    """How long a request waited in its engine's queue; None if the engine keeps no such events (no log stats)."""
    times = {event.type.name: event.timestamp for event in events or ()}
    if not {"QUEUED", "SCHEDULED"} <= times.keys():
        return None
    return max(0.0, float(times["SCHEDULED"] - times["QUEUED"]))
