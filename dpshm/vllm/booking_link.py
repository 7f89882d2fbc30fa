"""A link that books: every request that a client sends is on the board, from its choice to its end."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import zmq

from dpshm.errors import NoEngineAvailable
from dpshm.frontend.handle import Frontend
from dpshm.frontend.route import Route
from dpshm.policies import Affinity
from dpshm.vllm.adapters import AdapterPlaces
from dpshm.vllm.booked import BookedWriter
from dpshm.vllm.client_link import ClientLink
from dpshm.vllm.find import owner_name
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options
from dpshm.vllm.prompts import PromptHasher, RequestPrompt

SESSION_EPSILON = 0.5
"""How far above the mean a rank may be loaded that `least_work` keeps a session on."""


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
        for rank in client.engine_ranks_managed:  # a client is made once all its engines have connected to it
            self._frontend.heard_from(rank)
        self._adapters = AdapterPlaces(client)
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
        it: the session is then all that tells where its cache is. Without a session `affinity` takes the adapter.
        No key is made of the prompt's first tokens: prompts that all begin alike would all have one key.
        """
        session: str | None = getattr(request, "session_id", None) or None
        if self._needs_key:
            return session or getattr(request.lora_request, "lora_name", None)
        if session is None:
            return None
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
        self._adapters.note(request, route)
        if self._booked is not None:
            self._booked.tell(request.request_id, route.cached_tokens)
        return route


def _queue_s(events: Any) -> float | None:
    """How long a request waited in its engine's queue; None if the engine keeps no such events (no log stats)."""
    times = {event.type.name: event.timestamp for event in events or ()}
    if not {"QUEUED", "SCHEDULED"} <= times.keys():
        return None
    return max(0.0, float(times["SCHEDULED"] - times["QUEUED"]))
