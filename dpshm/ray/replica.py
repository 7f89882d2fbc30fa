"""What a replica does: it takes a row of the board of its node, and tells routers through Ray Serve which one."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import serve

from dpshm.engine.handle import Engine
from dpshm.errors import RowInUse
from dpshm.ray.board_actor import admit
from dpshm.ray.names import Place, group_name

HOOK = "record_replica_metadata"
"""Ray Serve asks a replica for it once, when it is ready, and gives the answer to every router."""
CAPACITY = 64


def register(replica: Any, *, capacity: int = CAPACITY, nodes: int | None = None) -> Engine:
    """Makes a replica visible to `BoardRouter`. Call it in the constructor of the deployment's class.

        @serve.deployment(request_router_config=RequestRouterConfig(request_router_class=BoardRouter))
        class Model:
            def __init__(self):
                register(self)

    The replica keeps its row until its process ends. Nothing else has to be called: routers count what they sent
    and what has ended. A replica that runs an engine may tell more through the `Engine` that it gets: steps
    (`Engine.step`), what its prefix cache holds (`Engine.open_cache`). It belongs to the thread that called this.

    Args:
        replica: the instance; it gets a method ``record_replica_metadata``, which adds to the one that it has.
        capacity: the most replicas of this deployment on one node.
        nodes: the most nodes whose boards have relays between them: routers on each see the replicas and the
            bookings of all. The first replica of a deployment decides. Default: the nodes that the cluster has
            then. 1: no relay.

    Raises:
        RayServeException: this is not a replica of Ray Serve.
        CapacityExceeded: the node has as many replicas already.
    """
    context = serve.get_replica_context()
    runtime = ray.get_runtime_context()
    group = group_name(runtime.gcs_address, context.app_name, context.deployment)
    if nodes is None:
        nodes = sum(node["Alive"] for node in ray.nodes())
    engine = _attach(group, runtime.get_node_id(), capacity, max(1, nodes))
    place = Place(runtime.get_node_id(), group, engine.dp_rank, engine.board.nodes > 1)
    theirs = getattr(replica, HOOK, None)

    def record_replica_metadata() -> dict[str, Any]:
        return {**(theirs() if theirs is not None else {}), **place.to_metadata()}

    setattr(replica, HOOK, record_replica_metadata)
    _engines.append(engine)
    return engine


_engines: list[Engine] = []  # as long as the process lives, also where the replica drops its handle


def _attach(group: str, node: str, capacity: int, nodes: int) -> Engine:
    while True:
        try:
            return Engine.attach(group, admit(group, node, capacity, nodes))
        except RowInUse:
            time.sleep(0.05)  # another process took it in between
