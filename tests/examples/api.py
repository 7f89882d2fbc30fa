"""The API server of the example: an ASGI application that streams tokens as server-sent events.

    POST /generate   {"prompt_tokens": 512, "max_tokens": 64} -> data: {"token": 0} ... data: [DONE]
    GET /health      200 while a request can be routed, else 503
    GET /ranks       what each rank does

Each uvicorn worker is a front-end of the group. No request fails because a rank is restarted, drained or killed. A
request that finds no rank waits, and one whose rank died goes on at another, from the token that it had reached.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from typing import Any

import zmq
import zmq.asyncio

from dpshm import Frontend, NoEngineAvailable, Overloaded, StartupTimeout
from tests.examples.engine import address

PATIENCE_S = 60.0
"""How long a request waits for a rank."""
RETRY_S = 0.02
MAX_REQUESTS = 256
"""Outstanding requests of a rank. Above it the server answers 503."""
RANK_LOST = None

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Server:
    """One worker: its front-end, a socket to each rank, and the requests that it waits for."""

    def __init__(self, group: str) -> None:
        self.frontend = Frontend.attach(group, max_requests=MAX_REQUESTS, timeout_s=30)
        self._numbers = count()
        self._answers: dict[int, tuple[int, asyncio.Queue[dict[str, Any] | None]]] = {}  # rank, what came
        self._group = group
        self._sockets: list[zmq.asyncio.Socket] = []  # by rank
        self._changes = self.frontend.changes()
        self._tasks = [asyncio.create_task(self._watch())]
        self._socket_of(self.frontend.board.dp_size - 1)

    def _socket_of(self, rank: int) -> zmq.asyncio.Socket:
        """The socket to a rank; makes it, and those before it, where the group has grown."""
        for dp_rank in range(len(self._sockets), rank + 1):
            socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
            socket.linger = 0
            socket.immediate = True  # nothing is kept for a rank that is not there
            socket.reconnect_ivl = 10
            socket.connect(address(self._group, dp_rank))
            self._sockets.append(socket)
            self._tasks.append(asyncio.create_task(self._read(socket)))
        return self._sockets[rank]

    async def tokens(self, prompt_tokens: int, max_tokens: int) -> AsyncIterator[int]:
        """The tokens of one request, from whatever ranks it takes.

        Raises:
            Overloaded: every rank is full.
            StartupTimeout: for `PATIENCE_S` there was no rank.
        """
        first, failed = 0, set[int]()
        while first < max_tokens:
            try:
                route = self.frontend.route(prompt_tokens + first, exclude=failed)
            except Overloaded:
                raise
            except NoEngineAvailable:
                failed.clear()
                await asyncio.sleep(RETRY_S)
                await self.frontend.wait_ready(PATIENCE_S, min_ranks=1)
                continue
            number, done = next(self._numbers), False
            queue = asyncio.Queue[dict[str, Any] | None]()
            self._answers[number] = route.dp_rank, queue
            request = {"number": number, "stamp": route.stamp, "prompt_tokens": prompt_tokens + first}
            request |= {"max_tokens": max_tokens, "first": first}
            socket = self._socket_of(route.dp_rank)
            try:
                with route:
                    await socket.send(json.dumps(request).encode(), zmq.NOBLOCK)
                    route.sent()
                    while (answer := await queue.get()) is not RANK_LOST:
                        if not first:
                            route.first_token()
                        first, done = answer["token"] + 1, answer["done"]
                        yield answer["token"]
                        if done:
                            return
                failed.add(route.dp_rank)
            except zmq.Again:  # it is not connected: the route was cancelled
                failed.add(route.dp_rank)
            finally:
                del self._answers[number]
                if not done:  # the client went away, or the rank is gone
                    self._abort(socket, number)

    def _abort(self, socket: zmq.asyncio.Socket, number: int) -> None:
        task = asyncio.ensure_future(socket.send(json.dumps({"abort": number}).encode(), zmq.NOBLOCK))
        task.add_done_callback(lambda sent: sent.cancelled() or sent.exception())

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            answer = json.loads(await socket.recv())
            if found := self._answers.get(answer["number"]):
                found[1].put_nowait(answer)

    async def _watch(self) -> None:
        async for change in self._changes:
            if change.kind in ("rank_died", "rank_left"):
                for dp_rank, queue in self._answers.values():
                    if dp_rank == change.row:
                        queue.put_nowait(RANK_LOST)

    async def close(self) -> None:
        """Leaves the group."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in self._sockets:
            socket.close()
        self.frontend.close()


_server: Server | None = None


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
    elif scope["type"] == "http":
        assert _server is not None
        match scope["method"], scope["path"]:
            case "POST", "/generate":
                await _generate(_server, json.loads(await _body(receive)), send)
            case "GET", "/health":
                health = _server.frontend.health()
                await _answer(send, 200 if health.ok else 503, health.to_dict())
            case "GET", "/ranks":
                await _answer(send, 200, _server.frontend.snapshot().to_dicts())
            case _:
                await _answer(send, 404, {"error": "POST /generate, GET /health, GET /ranks"})


async def _live(receive: Receive, send: Send) -> None:
    global _server  # noqa: PLW0603 - uvicorn calls a module's function
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            _server = Server(os.environ["EXAMPLE_GROUP"])
            await _server.frontend.wait_ready(PATIENCE_S, min_ranks=1)
            await send({"type": "lifespan.startup.complete"})
        else:
            assert _server is not None
            await _server.close()
            await send({"type": "lifespan.shutdown.complete"})
            return


async def _generate(server: Server, order: dict[str, int], send: Send) -> None:
    tokens = server.tokens(order["prompt_tokens"], order["max_tokens"])
    try:
        first = await anext(tokens)
    except (Overloaded, StartupTimeout) as e:
        await _answer(send, 503, {"error": str(e)})
        return
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await _tell(send, {"token": first})
    async for token in tokens:
        await _tell(send, {"token": token})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _tell(send: Send, event: dict[str, int]) -> None:
    body = b"data: " + json.dumps(event).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _answer(send: Send, status: int, content: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body
