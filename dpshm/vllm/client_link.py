"""A link between one client of vLLM's and the board of its group: it hooks its client, and knows the way back.

    WaveLink      one engine, behind an external load balancer: the wave comes from the board
    BookingLink   a front-end's row, in which every request sent is booked (`dpshm.vllm.booking_link`)
    BoardLink     books, and chooses engines by the board (`dpshm.vllm.board_link`)
    ShadowLink    books, leaves the choice to vLLM and compares (`dpshm.vllm.shadow`)

The hooks are on the instance (`dpshm.vllm.instance`):

    get_core_engine_for_request   chooses by the board and books. A request that is pinned to a rank, or belongs
                                  to a session that is placed already, goes where vLLM sends it, and is booked too
    add_request_async             reads the wave from the board, wakes paused ranks once the request is sent (up to
                                  vLLM 0.32), and cancels the booking if the send fails
    engines_running               an attribute that vLLM reads, and users through ``dp_engines_running``: a view of
                                  the board, true while the ranks run and false while they sleep or wake up (up to
                                  0.32 true also for 100 ms after a request of this client that found them asleep:
                                  stock clients say so until the next broadcast)
    first_req_send_socket         up to vLLM 0.32, where a client tells its own stats task of a first request. A
                                  client that chooses by the board has no such task, so its notice goes nowhere

From vLLM 0.33 on the engine that gets a request wakes the others, and no client says anything: a coordinator of
that release logs an error at a first-request message.

vLLM keeps its own record of requests in flight. It stays right: vLLM's own method notes each choice that we made,
as the choice of a request that names its rank. While the board serves, the client does not listen to the broadcast
at all. When a link gives up, the hooks come off and the client begins to listen.
"""

from __future__ import annotations

import time
from typing import Any

from dpshm.board.board import Board
from dpshm.board.words import unpack_control
from dpshm.rules.waves import Phase
from dpshm.vllm import metrics
from dpshm.vllm.instance import InstanceHooks
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options

LINK = "_dpshm_link"
"""The attribute of a client that holds its link: None once there is none, absent before anything was tried."""
BROADCAST_S = 0.1
"""How often vLLM's coordinator tells its clients whether the ranks run."""


class Nowhere:
    """Stands for a client's socket for notices of first requests: sends them to no peer, and never waits.

    Attributes:
        until: for so long the last notice counts, on the monotonic clock, in seconds: with vLLM until the next
            broadcast, which says whether the ranks run.
    """

    until = 0.0

    async def send(self, *_: Any, **__: Any) -> None:
        """Drops a notice, and notes its time."""
        self.until = time.monotonic() + BROADCAST_S


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

    def _watch_phase(self, board: Board, notices: Nowhere | None = None) -> None:
        """Makes the client's flag a view of the board's control word, and of the client's own notices."""
        words, at = board.words, board.index("control")

        def running() -> bool:
            if notices is not None and time.monotonic() < notices.until:
                return True
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
