"""An API server's part: it chooses engines by the board, books what it sends there, and stamps the wave.

Put on one client when it would begin to listen to the coordinator's broadcast:

    get_core_engine_for_request   chooses by the board and books; what is pinned, or belongs to a session that is
                                  placed already, goes where vLLM sends it, and is booked too
    add_request_async             reads the wave from the board; wakes paused ranks once the request is sent; takes
                                  the booking back if the send fails

and, on the class, `outputs_processor`: what finished leaves the bookings.

vLLM keeps its own books of requests in flight; they stay right, because its own method makes each choice that
we made, as one of a request that names its rank. While the board serves, the client does not listen to the
broadcast at all; when we give up, its next request starts to listen, as if nothing had been.
"""

from __future__ import annotations

import atexit
import time
from array import array
from collections.abc import Callable
from importlib import import_module
from typing import Any

import zmq

from dpshm.board.board import Board
from dpshm.board.words import unpack_control
from dpshm.errors import NoEngineAvailable
from dpshm.frontend.handle import Frontend, Route
from dpshm.rules.waves import Phase
from dpshm.vllm import metrics
from dpshm.vllm.find import group_at, owner_name
from dpshm.vllm.instance import InstanceHooks
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options
from dpshm.vllm.shadow import ShadowTally

KEY_TOKENS = 256
_LINK = "_dpshm_link"


def stats_task(stock: Callable[[Any], Any], options: Options) -> Callable[[Any], Any]:
    """The hook on ``_ensure_stats_update_task``: no broadcast for a client that the board serves."""

    def _ensure_stats_update_task(client: Any) -> Any:
        if _LINK not in client.__dict__:
            setattr(client, _LINK, _attach(client, options))
        link = client.__dict__[_LINK]
        if link is not None and link.instead_of_broadcast:
            return None
        return stock(client)

    return _ensure_stats_update_task


def outputs_processor(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The hook on ``process_engine_outputs``: requests that finished leave the bookings."""

    async def process_engine_outputs(client: Any, outputs: Any) -> None:
        link = client.__dict__.get(_LINK)
        if link is not None and outputs.finished_requests:
            link.finished(outputs.finished_requests)
        await stock(client, outputs)

    return process_engine_outputs


def _attach(client: Any, options: Options) -> ClientLink | None:
    address = client.stats_update_address
    try:
        group = group_at(address)
        if group is None:
            logger.info(
                "dpshm: API server %d finds no board for %s and listens to the coordinator (another node, a "
                "container with a /dev/shm of its own, or a coordinator that is not dpshm's)",
                client.client_index,
                address,
            )
            return None
        balancing = isinstance(client, import_module("vllm.v1.engine.core_client").DPLBAsyncMPClient)
        kind: Any = WaveLink if not balancing else ShadowLink if options.mode == "shadow" else BoardLink
        link: ClientLink = kind(client, group, options)
        metrics.show(group)
    except Exception:
        logger.warning("dpshm: API server %d goes on without the board", client.client_index, exc_info=True)
        return None
    logger.info("dpshm: API server %d %s, group %r", client.client_index, link.does, group)
    return link


class ClientLink:
    """One client and the board of its group.

    Attributes:
        does: what it does, for the log.
        instead_of_broadcast: whether the client needs no broadcast meanwhile.
    """

    does: str
    instead_of_broadcast: bool

    def __init__(self, client: Any, group: str) -> None:
        self._client = client
        self._group = group
        self._hooks = InstanceHooks(client)

    def finished(self, request_ids: Any) -> None:
        """These requests are over, in whatever way."""

    def _close(self) -> None:
        self._hooks.remove()
        metrics.hide(self._group)

    def _give_up(self) -> None:
        """Something of ours failed: from now on this client does as vLLM does."""
        client = self._client
        logger.warning(
            "dpshm: API server %d leaves the board and listens to the coordinator from now on",
            client.client_index,
            exc_info=True,
        )
        setattr(client, _LINK, None)
        try:
            self._close()
        except Exception:
            logger.debug("dpshm: the board could not be left", exc_info=True)
        client.engines_running = False  # at worst a wake-up too many
        client._ensure_stats_update_task()  # which is who sends the wake-ups


class WaveLink(ClientLink):
    """A client with one engine, behind an external load balancer: it only reads the wave from the board."""

    does = "reads the wave from the board and chooses nothing (external load balancing)"
    instead_of_broadcast = False  # its wake-ups go through the same socket

    def __init__(self, client: Any, group: str, _options: Options) -> None:
        super().__init__(client, group)
        self._board = Board.attach(group)
        add_request_async = client.add_request_async

        async def add(request: Any) -> Any:
            try:
                wave, phase = unpack_control(int(self._board.control[0]))
                client.current_wave, client.engines_running = wave, phase is not Phase.PAUSED
            except Exception:
                self._give_up()
            return await add_request_async(request)

        self._hooks.put("add_request_async", add)

    def _close(self) -> None:
        super()._close()
        self._board.close()


class BookingLink(ClientLink):
    """A client that has a row of the board and books what it sends."""

    def __init__(self, client: Any, group: str, options: Options) -> None:
        super().__init__(client, group)
        self._routes: dict[str, list[Route]] = {}
        self._needs_key = options.policy.startswith("affinity")
        core_client = import_module("vllm.v1.engine.core_client")
        self._count_tokens = import_module("vllm.utils").length_from_prompt_token_ids_or_embeds
        # After 0.16: documents of a late-interaction query go where the query is.
        self._late_interaction = getattr(core_client, "get_late_interaction_engine_index", lambda *_: None)
        self._frontend = Frontend.attach(
            group,
            owner=owner_name(client.client_index, client.input_socket.getsockopt(zmq.LAST_ENDPOINT).decode()),
            ranks=client.engine_ranks_managed,
            policy=options.policy,
        )
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

    def finished(self, request_ids: Any) -> None:
        """Takes requests out of the books."""
        try:
            for request_id in request_ids:
                for route in self._routes.pop(request_id, ()):
                    route.done()
        except Exception:
            self._give_up()

    def _before_add(self) -> None:
        """Called before vLLM stamps a request with what it knows of the wave."""

    def _after_add(self) -> None:
        """Called when vLLM has sent a request, or could not; never raises."""

    def _choose(self, stock: Callable[[Any], Any], request: Any) -> Any:
        """An engine, as vLLM names it."""
        raise NotImplementedError

    def _close(self) -> None:
        super()._close()
        self._frontend.close()

    def _tokens(self, request: Any) -> int:
        return int(self._count_tokens(request.prompt_token_ids, getattr(request, "prompt_embeds", None)))

    def _key(self, request: Any) -> bytes | None:
        """What the policy `affinity` keeps together: requests whose prompts begin alike, and may share a cache."""
        if not self._needs_key or request.prompt_token_ids is None:
            return None
        return array("q", request.prompt_token_ids[:KEY_TOKENS]).tobytes()

    def _is_pinned(self, request: Any) -> bool:
        client = self._client
        return (
            request.data_parallel_rank is not None
            or request.request_id in client.reqs_in_flight
            or self._late_interaction(request.pooling_params, len(client.core_engines)) is not None
        )

    def _book(self, request: Any, engine: Any) -> Route | None:
        """Books a choice that vLLM made."""
        client = self._client
        rank = client.engine_ranks_managed[client.core_engines.index(engine)]
        try:
            return self._note(request, self._frontend.route(self._tokens(request), dp_rank=rank, wake=False))
        except NoEngineAvailable as e:
            logger.debug("dpshm: not booked: %s", e)
            return None

    def _note(self, request: Any, route: Route) -> Route:
        self._routes.setdefault(request.request_id, []).append(route)
        return route


class BoardLink(BookingLink):
    """A client that chooses by the board."""

    does = "chooses by the board"
    instead_of_broadcast = True

    def __init__(self, client: Any, group: str, options: Options) -> None:
        super().__init__(client, group, options)
        self._at_control = self._frontend.board.index("control")
        self._warned_none = False

    def _before_add(self) -> None:
        # `_after_add` wakes paused ranks; vLLM's own wake-up would go to a task that does not run.
        client = self._client
        client.current_wave = unpack_control(self._frontend.board.words[self._at_control])[0]
        client.engines_running = True

    def _after_add(self) -> None:
        # After the request, as vLLM does it: since 0.32 ranks that wake up before it go back to sleep at their
        # first step, and it would have to wake them a second time.
        if self._client.__dict__.get(_LINK) is not self:
            return  # given up meanwhile: vLLM has sent its own
        try:
            self._frontend.wake()
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
            engine = stock(request)
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
        if route is not None:
            request.current_wave = route.wave  # as the board had it when the request was booked
        return engine

    def _route(self, request: Any) -> Route | None:
        try:
            key = self._key(request)
            return self._note(request, self._frontend.route(self._tokens(request), key=key, wake=False))
        except NoEngineAvailable as e:
            if not self._warned_none:
                self._warned_none = True
                logger.warning("dpshm: vLLM chooses, now and whenever this is so: %s", e)
            return None


class ShadowLink(BookingLink):
    """A client that leaves the choice to vLLM, and counts what it would have been."""

    does = "leaves the choice to vLLM and compares (shadow)"
    instead_of_broadcast = False

    def __init__(self, client: Any, group: str, options: Options) -> None:
        super().__init__(client, group, options)
        self._tally = ShadowTally()
        self._log_s = options.shadow_log_s
        self._next_log = time.monotonic() + self._log_s
        atexit.register(self._log)

    def _choose(self, stock: Callable[[Any], Any], request: Any) -> Any:
        try:
            ours = (
                None
                if self._is_pinned(request)
                else self._frontend.choose(self._tokens(request), key=self._key(request))
            )
            requests = self._frontend.snapshot()["requests"].tolist()
        except NoEngineAvailable:
            ours = None
        except Exception:
            self._give_up()
            return stock(request)
        engine = stock(request)
        try:
            route = self._book(request, engine)
            if ours is not None and route is not None:
                self._tally.count(route.dp_rank, ours, requests)
            if time.monotonic() >= self._next_log:
                self._log()
        except Exception:
            self._give_up()
        return engine

    def _log(self) -> None:
        self._next_log = time.monotonic() + self._log_s
        if self._tally.decisions:
            logger.info("dpshm shadow, API server %d: %s", self._client.client_index, self._tally.summary())
