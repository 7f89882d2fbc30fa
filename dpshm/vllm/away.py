"""An API server's part in the death of a rank that is on its own: its requests fail, and no new one goes there.

vLLM's client notices the death of no single engine, and would wait for answers for ever. A task looks at the
board:

- The process of a rank is gone. Requests that were sent to it end with status 503, which says that they can be
  sent again, and so do calls that wait for it (``/pause``, ``/sleep``). From then on the rank is *away*: no
  request goes there, also if one is pinned to it.
- A rank that is away has a new process, and that process has connected to this API server: its ready message came
  through the socket of requests. Only now is the rank back: a request that is sent sooner would be dropped.

In lockstep no rank can go on without the others, and the server ends (`dpshm.vllm.revival`).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from http import HTTPStatus
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import zmq

from dpshm.board.board import Board
from dpshm.board.words import ON_BEHALF
from dpshm.linux import processes
from dpshm.rules.liveness import Verdict
from dpshm.vllm.log import logger

POLL_S = 0.05
"""How often the task looks at the board."""
Process = tuple[int, int]
"""A process: its pid and start time, as on the board."""
OUTPUTS = "_dpshm_outputs"
"""The attribute of a client that leads to vLLM's output processor, which knows who waits for a request."""


def output_handler(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The hook on ``AsyncLLM._run_output_handler``: tells the client who waits for its requests."""

    def _run_output_handler(llm: Any) -> Any:
        client = llm.engine_core
        if OUTPUTS not in vars(client):
            vars(client)[OUTPUTS] = weakref.ref(llm.output_processor)
        return stock(llm)

    return _run_output_handler


class AwayRanks:
    """The ranks of one client that died and are not back.

    Args:
        client: vLLM's.
        board: the group's.
        heard_from: called with a rank, and whether it is connected, when that changes.

    Attributes:
        ranks: their numbers.
    """

    def __init__(self, client: Any, board: Board, heard_from: Callable[[int, bool], None]) -> None:
        self.ranks: set[int] = set()
        self._heard_from = heard_from
        self._client = client
        self._board = board
        self._engines: dict[int, Any] = dict(zip(client.engine_ranks_managed, client.core_engines, strict=True))
        self._processes: dict[int, Process] = {}  # that have the ranks
        self._dead: dict[int, Process] = {}  # of each rank: the one that died last
        self._read: dict[int, Process] = {}  # of each rank: what the look before read
        self._calls: dict[Any, set[asyncio.Future[Any]]] = {engine: set() for engine in self._engines.values()}
        self._task: asyncio.Task[None] | None = None
        self._namespace = processes.namespace_inode("pid")

    def begin(self) -> None:
        """Starts the task, once there is an event loop."""
        if self._task is None:
            with suppress(RuntimeError):
                self._task = asyncio.get_running_loop().create_task(_watch(weakref.ref(self)), name="dpshm-away")

    def close(self) -> None:
        """Ends the task."""
        if self._task is not None and not self._task.get_loop().is_closed():
            self._task.cancel()
        self._task = None

    def refuse(self, request: Any, engine: Any = None) -> None:
        """Refuses a request that is not sent yet.

        Args:
            request: vLLM's request.
            engine: the engine for which vLLM noted it, if it did.

        Raises:
            GracefulHTTPError: always; status 503.
        """
        client = self._client
        if engine is not None and client.reqs_in_flight.pop(request.request_id, None) is not None:
            client.engine_inflight[engine] -= 1
        rank = next((r for r, e in self._engines.items() if e == engine), None)
        error = _unavailable(
            "no rank can take the request: all have died. Send it again later"
            if rank is None
            else f"rank {rank} died and is not back. Send the request again later, or to another rank"
        )
        self._end(request.request_id, None)  # vLLM registered it already
        raise error

    def calling(self, stock: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        """The hook on ``_call_utility_async``: a call to a rank that dies, or is away, fails."""

        async def _call_utility_async(method: str, *args: Any, engine: Any) -> Any:
            calls = self._calls[engine]
            if any(self._engines[rank] == engine for rank in self.ranks):
                raise _unavailable(f"{method}: a rank died and is not back")
            call = asyncio.ensure_future(stock(method, *args, engine=engine))
            died = asyncio.get_running_loop().create_future()
            calls.add(died)
            try:
                await asyncio.wait((call, died), return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    return call.result()
                raise _unavailable(f"{method}: a rank died before it answered")
            finally:
                calls.discard(died)
                call.cancel()

        return _call_utility_async

    async def look(self) -> None:
        """Looks at the board once, and at the socket of requests while a rank is away."""
        verdicts = self._board.engine_verdicts()
        for rank in self._engines:
            if rank < len(verdicts) and rank not in self.ranks and self._is_gone(rank, verdicts[rank]):
                await self._lose(rank)
        if self.ranks:
            await self._listen()

    def _is_gone(self, rank: int, verdict: Verdict) -> bool:
        """Whether the process that had the rank when this looked last is gone."""
        board, known = self._board, self._processes.get(rank)
        process = pid, started = int(board.engine_pid[rank]), int(board.engine_start_time[rank])
        if process == self._dead.get(rank):
            return False  # a new process may have connected, and will take the row
        if pid:
            # SYNC: a process that takes a row stores its words one after the other, and this may read them between
            # two stores. So another process has the row only once two looks have read the same of it.
            settled, self._read[rank] = process == self._read.get(rank), process
            if known is None and settled and started:
                known = self._processes[rank] = process
            if known is None:
                return False
            # Its mark may still be that of the one before: the lock decides.
            return settled if process != known else verdict is Verdict.DEAD and not board.engine_alive(rank)
        if known is None or int(board.engine_mark[rank]) & ON_BEHALF:
            return False  # not here yet, or it reports through the coordinator
        # It gave its row up: it ends, or it goes on without us.
        is_visible = int(board.engine_pid_namespace[rank]) == self._namespace
        return is_visible and processes.start_time(known[0]) != known[1]

    async def _lose(self, rank: int) -> None:
        client, engine = self._client, self._engines[rank]
        self.ranks.add(rank)
        self._heard_from(rank, False)
        self._dead[rank] = self._processes.pop(rank)
        lost = [request for request, its in client.reqs_in_flight.items() if its == engine]
        logger.warning(
            "dpshm: API server %d: rank %d died. %d requests that it had end with status 503; new ones go "
            "elsewhere",
            *(client.client_index, rank, len(lost)),
        )
        for died in self._calls[engine]:
            if not died.done():
                died.set_result(None)
        if lost:
            over = SimpleNamespace(finished_requests=set(lost), outputs=[], utility_output=None)
            await type(client).process_engine_outputs(client, over)
        for request in lost:
            self._end(request, _unavailable(f"rank {rank} died while it had the request, which can be sent again"))

    def _end(self, request_id: str, error: Exception | None) -> None:
        """Ends a request in vLLM's output processor; who waits for it gets the error."""
        outputs = vars(self._client).get(OUTPUTS, lambda: None)()
        state = None if outputs is None else outputs.request_states.get(request_id)
        if state is not None:
            if state.queue is not None and error is not None:
                state.queue.put(error)
            outputs.abort_requests([request_id], internal=True)

    async def _listen(self) -> None:
        """Takes the ready messages of new processes."""
        while True:
            try:
                identity, *_ = await self._client.input_socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            for rank, engine in self._engines.items():
                if engine == identity and rank in self.ranks:
                    self.ranks.discard(rank)
                    self._heard_from(rank, True)
                    logger.info("dpshm: API server %d: rank %d is back", self._client.client_index, rank)


def _unavailable(message: str) -> Exception:
    """The error that vLLM's API servers answer with status 503."""
    error: Exception = import_module("vllm.exceptions").GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
    return error


async def _watch(of: weakref.ref[AwayRanks]) -> None:
    """Looks as long as there is the object."""
    while (away := of()) is not None:
        try:
            await away.look()
        except Exception:
            if not away._client.input_socket.closed:  # else the server ends
                logger.warning("dpshm: this API server no longer notices that a rank dies", exc_info=True)
            return
        del away
        await asyncio.sleep(POLL_S)
