"""Which adapters an API server's requests use at each rank, so that a request goes where its adapter can run now.

A rank runs at most ``--max-loras`` adapters in one step. While requests of so many others are in flight there, a
request of a further adapter waits, however idle the rank is otherwise. As long as requests of the others keep
coming, it goes on waiting. Such a rank is left out while another one has a place.

Only this API server's own requests are known here. A rank that they fill is full for certain. One at which they
leave a place may be filled by the requests of other API servers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from dpshm.frontend.route import Route


class AdapterPlaces:
    """The adapters in flight, by rank."""

    def __init__(self, client: Any) -> None:
        """Reads how many adapters a rank runs in a step; without adapters nothing is kept.

        Args:
            client: vLLM's client.
        """
        config = getattr(getattr(client, "vllm_config", None), "lora_config", None)
        self._places = int(getattr(config, "max_loras", 0) or 0)
        # By rank and adapter: the bookings, the oldest first. Ended ones go once they are the oldest.
        self._routes: dict[int, dict[int, deque[Route]]] = {}

    def note(self, request: Any, route: Route) -> None:
        """A request is booked: it has a place at its rank until its booking ends."""
        if self._places and (adapter := _adapter_of(request)):
            routes = self._routes.setdefault(route.dp_rank, {}).setdefault(adapter, deque())
            _drop_ended(routes)
            routes.append(route)

    def full_for(self, request: Any, ranks: Sequence[int]) -> list[int]:
        """The ranks at which the request would wait for a place, if there are others; else none.

        Args:
            request: vLLM's.
            ranks: that may be chosen.
        """
        if not self._places or not (adapter := _adapter_of(request)):
            return []
        full = [rank for rank in ranks if self._is_full(rank, adapter)]
        return full if len(full) < len(ranks) else []

    def _is_full(self, rank: int, adapter: int) -> bool:
        of_rank = self._routes.get(rank)
        if of_rank is None:
            return False
        for other, routes in [*of_rank.items()]:
            _drop_ended(routes)
            if not routes:
                del of_rank[other]
        return len(of_rank) >= self._places and adapter not in of_rank


def _drop_ended(routes: deque[Route]) -> None:
    while routes and not routes[0].open:
        routes.popleft()


def _adapter_of(request: Any) -> int:
    """The number of its adapter; 0 if it has none."""
    return int(getattr(getattr(request, "lora_request", None), "lora_int_id", 0) or 0)
