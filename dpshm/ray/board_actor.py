"""The actor that holds a deployment's board on one node: its coordinator runs in the actor's process.

Ray starts it when the first replica of the node registers, and starts it again if it dies. The new coordinator
takes the board over; meanwhile routers go on by what they read. The actor ends itself when no replica has had a
row for `IDLE_S`, and the board goes with it.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpshm.board.board import Board
from dpshm.coordinator.handle import CoordinatorThreads
from dpshm.coordinator.settings import make_settings
from dpshm.errors import CapacityExceeded
from dpshm.ray.names import NAMESPACE

logger = logging.getLogger(__name__)

IDLE_S = 60.0
LOOK_S = 1.0
PROMISE_S = 30.0
"""A rank that was given out and is not held yet is not given out again for so long."""
TRIES = 5


class BoardHolder:
    """The actor's class. One call runs at a time.

    Args:
        group: the group's name.
        capacity: the most replicas of the deployment on this node.
    """

    def __init__(self, group: str, capacity: int) -> None:
        self._coordinator = CoordinatorThreads(
            make_settings(group=group, dp_size=1, max_engines=capacity, waves=False)
        )
        self._board: Board = self._coordinator.board
        self._promised: dict[int, float] = {}
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._end_when_idle, name="dpshm-ray-idle", daemon=True).start()

    def admit(self) -> int:
        """A rank for a replica: the lowest that is free. The group grows where it has to.

        Raises:
            CapacityExceeded: there are as many replicas as the board has rows.
        """
        now = time.monotonic()
        taken = {rank for rank, until in self._promised.items() if until > now}
        for rank in range(self._board.engines):
            if rank not in taken and not self._board.engine_alive(rank):
                break
        else:
            raise CapacityExceeded(
                f"{self._board.engines} replicas have a row already: call register() with a larger capacity"
            )
        if rank >= self._board.dp_size:
            self._coordinator.scale(rank + 1)
        self._promised[rank] = now + PROMISE_S
        return rank

    def end(self) -> None:
        """Removes the board and ends the actor."""
        self._coordinator.close()
        ray.actor.exit_actor()

    def _end_when_idle(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < IDLE_S:
            time.sleep(LOOK_S)
            now = time.monotonic()
            held = any(map(self._board.engine_alive, range(self._board.dp_size)))
            if held or any(until > now for until in self._promised.values()):
                idle_since = now
        logger.info(
            "no replica has had a row for %g s: the board of group %r ends", IDLE_S, self._board.segment.group
        )
        self._coordinator.close()
        ray.kill(self._me, no_restart=True)


def admit(group: str, node: str, capacity: int) -> int:
    """A free rank of a node's board; starts the board's actor if there is none."""
    actor_class = ray.remote(BoardHolder)
    for tried in range(TRIES):
        actor: Any = actor_class.options(
            name=f"{group}-{node}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(group, capacity)
        try:
            return int(ray.get(actor.admit.remote()))
        except ray.exceptions.RayActorError:
            if tried == TRIES - 1:
                raise
            time.sleep(0.2 * 2**tried)  # it was just ending itself, or Ray starts it again
    raise AssertionError("unreachable")


def end_boards() -> None:
    """Ends the boards of all deployments of this cluster. Call it after ``serve.shutdown()``.

    Without it each ends a minute later. A cluster that is killed before leaves them in ``/dev/shm``, where the
    next start of a coordinator removes them.
    """
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE:
            with suppress(ray.exceptions.RayActorError, ValueError):
                ray.get(ray.get_actor(actor["name"], namespace=NAMESPACE).end.remote())
