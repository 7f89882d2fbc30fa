"""Fakes of vLLM's clients, and what an API server does with them.

The fakes keep what the plugin relies on: which method calls which, in which order, and what each leaves behind.
They have no model, no sockets between client and core, and no threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import zmq

from dpshm.net.context import context
from tests.unit.vllm.fake_core import Request, RequestType

LATE = "late interaction"
"""The `pooling_params` of a request whose engine vLLM derives from its query."""


HOOKED = ("get_core_engine_for_request", "add_request_async")
"""The methods that the plugin hides in a client that books."""


class DPAsyncMPClient:
    """A client with one engine."""

    tells_of_first_requests = True
    """As up to 0.32: since 0.33 the engine that gets a request wakes the others."""

    def __init__(self, stats_address: str | None, ranks: Iterable[int] = (0, 1), client_index: int = 0) -> None:
        self.stats_update_address = stats_address
        self.client_index = client_index
        self.engine_ranks_managed = list(ranks)
        self.core_engines = [rank.to_bytes(2, "little") for rank in ranks]
        self.input_socket = context().socket(zmq.ROUTER)
        self.input_socket.bind("tcp://127.0.0.1:*")
        self.current_wave, self.engines_running = 0, False
        self.listening = False
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=True, prefix_caching_hash_algo="sha256")
        )
        self.sent: list[tuple[str, bytes, int]] = []
        self.first_requests: list[bytes] = []
        if self.tells_of_first_requests:
            self.first_req_send_socket = SimpleNamespace(send=self._tell)
        self.on_send: Callable[[], object] | None = None

    @property
    def address(self) -> str:
        """Where engines connect."""
        endpoint = self.input_socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.decode()

    def close(self) -> None:
        """Ends the socket."""
        self.input_socket.close()

    def _ensure_stats_update_task(self) -> None:
        self.listening = True

    def dp_engines_running(self) -> bool:
        """Whether the ranks run, for `AsyncLLM.wait_for_requests_to_drain`."""
        return self.engines_running

    async def _tell(self, engine: bytes) -> None:
        self.first_requests.append(engine)

    async def add_request_async(self, request: Request) -> None:
        """Stamps, chooses, sends; tells the coordinator if the ranks were paused."""
        self._ensure_stats_update_task()
        request.current_wave = self.current_wave
        request.client_index = self.client_index
        engine = self.get_core_engine_for_request(request)
        if self.tells_of_first_requests and not self.engines_running:
            await self.first_req_send_socket.send(engine)
        await self._send_input(RequestType.ADD, request, engine)

    async def _send_input(self, kind: RequestType, request: Request, engine: bytes) -> None:
        if self.on_send is not None:
            self.on_send()
        self.sent.append((request.request_id, engine, request.current_wave))

    def get_core_engine_for_request(self, request: Request) -> bytes:
        """The only one."""
        return self.core_engines[0]


class DPLBAsyncMPClient(DPAsyncMPClient):
    """A client that chooses; this one always takes the last engine, and keeps its own record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reqs_in_flight: dict[str, bytes] = {}

    def get_core_engine_for_request(self, request: Request) -> bytes:
        """The session's engine, the one asked for, or the last."""
        engine = self.reqs_in_flight.get(request.request_id)
        if engine is None:
            at = request.data_parallel_rank
            if at is None:
                at = late_interaction_engine(request.pooling_params, len(self.core_engines))
            engine = self.core_engines[-1 if at is None else at]
            self.reqs_in_flight[request.request_id] = engine
        return engine

    @staticmethod
    async def process_engine_outputs(client: DPLBAsyncMPClient, outputs: Any) -> None:
        """Finished requests leave the record."""
        for request_id in outputs.finished_requests or ():
            client.reqs_in_flight.pop(request_id, None)


def late_interaction_engine(pooling_params: object, engines: int) -> int | None:
    """The engine of a late-interaction query: the last but one."""
    return engines - 2 if pooling_params == LATE else None


def add(client: DPAsyncMPClient, *requests: Request) -> None:
    """Sends requests as an API server does, each after the other."""

    async def sending() -> None:
        for request in requests:
            await client.add_request_async(request)

    asyncio.run(sending())


def finish(client: DPLBAsyncMPClient, *request_ids: str) -> None:
    """The engines tell the client that requests are over."""
    outputs = SimpleNamespace(finished_requests=set(request_ids), outputs=[])
    asyncio.run(type(client).process_engine_outputs(client, outputs))


def hear(client: DPLBAsyncMPClient, *outputs: Any) -> None:
    """An engine's step brings tokens to the client."""
    heard = SimpleNamespace(finished_requests=None, outputs=list(outputs))
    asyncio.run(type(client).process_engine_outputs(client, heard))


def hooked(client: DPAsyncMPClient) -> list[str]:
    """Which methods of the client are hidden."""
    return [name for name in HOOKED if name in vars(client)]


def raising(*_: object, **__: object) -> None:
    """Stands for a method of dpshm that fails."""
    raise ZeroDivisionError
