"""Counts the requests that reach an engine as received from the API server that booked each of them.

A request is counted before vLLM handles it. vLLM may answer at once, in shutdown and (since 0.33) while the user
has paused generation, and an API server that has the answer expects that the request was counted.
"""

from __future__ import annotations

from collections import deque
from importlib import import_module
from typing import Any

from dpshm.engine.remote import CarriedRow
from dpshm.engine.row import EngineRow
from dpshm.vllm.booked import BookedReader
from dpshm.vllm.find import owner_name


class Received:
    """The requests that came to one engine core.

    `note_refused` runs in vLLM's input thread; all else in the busy loop's.

    Args:
        core: vLLM's engine core.
        row: where they are counted.
    """

    def __init__(self, core: Any, row: EngineRow) -> None:
        self._core, self._row = core, row
        self._far = isinstance(row, CarriedRow)
        self._booked = BookedReader(row.board)
        self._inputs = list(core.addresses.inputs)
        self._frontends: dict[int, int] = {}
        self._seen_frontends = -1
        self.refused: deque[tuple[int, str, int]] = deque()  # (client, request, tokens), from the input thread
        self._wakeup = import_module("vllm.v1.engine").EngineCoreRequestType.WAKEUP
        self._count_tokens = import_module("vllm.utils").length_from_prompt_token_ids_or_embeds

    def count(self, client_index: int, request_id: str, tokens: int) -> int:
        """Counts a request as its API server booked it; gives the tokens that it expects to be cached."""
        frontend = self._frontend_of(client_index)
        cached = (
            0 if frontend is None or self._far else min(tokens, self._booked.cached_tokens(frontend, request_id))
        )
        self._row.count_received(frontend, tokens - cached)
        return cached

    def note_refused(self, request: Any) -> None:
        """Notes a request that the input thread refuses, and wakes the busy loop, which counts it."""
        try:
            tokens = self._count_tokens(request.prompt_token_ids, getattr(request, "prompt_embeds", None))
        except Exception:
            tokens = 0  # the API server cannot count them either, so it booked none
        self.refused.append((request.client_index, request.request_id, tokens))
        self._core.input_queue.put_nowait((self._wakeup, None))

    def count_refused(self) -> None:
        """Counts what `note_refused` noted."""
        while self.refused:
            self.count(*self.refused.popleft())

    def _frontend_of(self, client_index: int) -> int | None:
        """The row of an API server, or on another node its number; None while it has none."""
        if self._far:
            return client_index if 0 <= client_index < len(self._inputs) else None
        row = self._frontends.get(client_index)
        if row is not None:
            return row
        board = self._row.board
        seen = int(board.frontend_incarnation.sum())
        if seen != self._seen_frontends:
            self._seen_frontends = seen
            owners = {board.owner_of(f): f for f in range(board.frontends_used())}
            for i, address in enumerate(self._inputs):
                if (f := owners.get(owner_name(i, address))) is not None:
                    self._frontends[i] = f
        return self._frontends.get(client_index)
