"""The request router for Ray Serve. Ray pickles this module by value, so it holds the router and no more.

A request goes where the board of this router's node says, among the replicas that have a row there: those of this
node, and those of other nodes if the boards have relays. Two replicas drawn at random follow, of which Ray takes
the one with the shorter queue, in case the first refuses. If some replicas have no row (not registered, or on a
node without a relay), Ray compares the board's choice with one of those.
"""

from __future__ import annotations

import asyncio
import os
import random
from importlib import import_module
from typing import Any

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from dpshm.ray.bookings import Bookings, Cost
from dpshm.ray.names import Place


class BoardRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Chooses by the board; replicas call `dpshm.ray.replica.register`.

    ``request_router_kwargs`` may have ``cost``: a function of a request's positional and keyword arguments, or its
    name as ``"module:function"``. It gives the number of prompt tokens, or the token ids. Without it every request
    counts the same.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve with ``request_router_kwargs``."""
        cost = kwargs.pop("cost", None)
        if kwargs:
            raise TypeError(f"BoardRouter has no argument {sorted(kwargs)}; it has: cost")
        if isinstance(cost, str):
            module, _, name = cost.partition(":")
            cost = getattr(import_module(module), name)
        self._cost = cost
        self._places: dict[ReplicaID, Place] = {}
        self._bookings: Bookings | None = None  # there is one board of the deployment on a node

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve when the set of replicas changes."""
        super().update_replicas(replicas)
        found = {replica.replica_id: Place.of(replica.replica_metadata) for replica in replicas}
        here = [p for p in found.values() if p is not None and p.node == self._self_node_id]
        relayed = any(p.relayed for p in here)
        self._places = {r: p for r, p in found.items() if p is not None and (p in here or (relayed and p.relayed))}
        if self._places and self._bookings is None:
            group = next(iter(self._places.values())).group
            self._bookings = Bookings(group, owner=f"ray-{os.getpid()}-{id(self) & 0xFFFF:x}")

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Ray Serve: the replicas to try, the best first."""
        candidates = list(candidate_replicas)
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            ids = self.apply_multiplex_routing(pending_request=pending_request)
            candidates = [self.curr_replicas[i] for i in ids if i in self.curr_replicas]
        if not candidates:
            return []
        drawn = random.sample(candidates, min(2, len(candidates)))
        best = None if pending_request is None else self._choose(candidates, pending_request)
        if best is None:
            return [drawn]
        elsewhere = [replica for replica in candidates if replica.replica_id not in self._places]
        return [[best, random.choice(elsewhere)] if elsewhere else [best], drawn]

    def _choose(self, candidates: list[RunningReplica], request: PendingRequest) -> RunningReplica | None:
        bookings, places = self._bookings, self._places
        here = {places[r.replica_id].dp_rank: r for r in candidates if r.replica_id in places}
        if bookings is None or not here:
            return None
        request_id = request.metadata.internal_request_id
        size: Cost = 1 if self._cost is None else self._cost(*request.args, **request.kwargs)
        rank = bookings.choose(request_id, size, here)
        if rank is None:
            return None
        request.future.add_done_callback(lambda future: self._routed(request_id, future))
        return here[rank]

    def _routed(self, request_id: str, future: asyncio.Future[RunningReplica]) -> None:
        """Ray Serve has chosen a replica, mostly the first, or the caller has gone."""
        assert self._bookings is not None
        if future.cancelled() or future.exception() is not None:
            self._bookings.cancel(request_id)
        else:
            place = self._places.get(future.result().replica_id)
            self._bookings.moved(request_id, None if place is None else place.dp_rank)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:  # noqa: ARG002
        """Called by Ray Serve when a request has ended, also when its replica refused it."""
        if self._bookings is not None:
            self._bookings.ended(internal_request_id)
