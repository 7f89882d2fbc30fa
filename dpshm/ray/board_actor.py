"""The actor that holds a deployment's board on one node: its coordinator and its relay run in the actor's process.

Ray starts it when the first replica of the node registers, and starts it again if it dies. The new coordinator
takes the board over; meanwhile routers go on by what they read. The actor ends itself when no replica has had a
row for `IDLE_S`, and the board goes with it.

The boards of several nodes have numbers, which are in the names of their actors; number 0 is the head
(`dpshm.coordinator.relay`). A node has the ranks that leave its number when divided by `nodes`, so no two nodes
give the same rank away, and none has to ask another one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpshm.board.board import Board
from dpshm.coordinator.handle import CoordinatorThreads
from dpshm.coordinator.settings import make_settings
from dpshm.errors import CapacityExceeded, SegmentError
from dpshm.net.keys import ENVIRONMENT as KEYS
from dpshm.ray.names import NAMESPACE

logger = logging.getLogger(__name__)

IDLE_S = 60.0
LOOK_S = 1.0
PROMISE_S = 30.0
"""A rank that was given out and is not held yet is not given out again for so long."""
TRIES = 5
CALL_S = 60.0
"""The longest that a call of another actor may take: it may be starting."""
RELAYED_S = 5.0
END_S = 10.0
FRONTENDS_A_NODE = 32


class Facts(NamedTuple):
    """What other nodes have to know of a board.

    Attributes:
        node: Ray's id of its node.
        number: its number among the nodes with relays.
        nodes: how many of those there may be; 1: the board has no relay.
        capacity: the most replicas on one node.
        head: of the head's board: the addresses where others meet it (`Coordinator.head_addresses`).
    """

    node: str
    number: int
    nodes: int
    capacity: int
    head: str


class BoardHolder:
    """The actor's class. One call runs at a time.

    Args:
        group: the group's name.
        facts: of this board. Those of the head's board have no `head` yet.
    """

    def __init__(self, group: str, facts: Facts) -> None:
        settings: dict[str, Any] = {"group": group, "dp_size": facts.nodes, "waves": False}
        settings["max_engines"] = facts.capacity * facts.nodes
        if facts.nodes > 1:
            keys = os.environ.get(KEYS)
            # Without keys the relay trusts the network between the nodes, as Ray itself does.
            settings |= {"nodes": facts.nodes, "node": facts.number, "curve_dir": keys, "insecure": keys is None}
            settings["max_frontends"] = FRONTENDS_A_NODE * facts.nodes
            settings |= {"head": facts.head} if facts.number else {"host": ray.util.get_node_ip_address()}
        self._coordinator = CoordinatorThreads(make_settings(**settings))
        self._board: Board = self._coordinator.board
        self._facts = facts if facts.number else facts._replace(head=self._coordinator.head_addresses)
        self._promised: dict[int, float] = {}
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._end_when_idle, name="dpshm-ray-idle", daemon=True).start()

    def facts(self) -> Facts:
        """Those of this board."""
        return self._facts

    def admit(self) -> int:
        """A rank for a replica of this node: the lowest that is free. The group grows where it has to.

        Raises:
            CapacityExceeded: there are as many replicas as the board has rows for this node.
        """
        now = time.monotonic()
        taken = {rank for rank, until in self._promised.items() if until > now}
        for rank in range(self._facts.number, self._board.engines, self._facts.nodes):
            if rank not in taken and not self._board.engine_alive(rank):
                break
        else:
            raise CapacityExceeded(
                f"{self._facts.capacity} replicas have a row already: call register() with a larger capacity"
            )
        self._grow(rank + 1)
        self._promised[rank] = now + PROMISE_S
        return rank

    def scale(self, dp_size: int) -> None:
        """Has the group, and so the boards of all nodes, at least so many ranks. For the head."""
        if dp_size > self._board.dp_size:
            self._coordinator.scale(dp_size)

    def _grow(self, dp_size: int) -> None:
        dp_size += -dp_size % self._facts.nodes
        if dp_size <= self._board.dp_size:
            return
        if self._facts.number:
            group = self._board.segment.group
            try:
                head = ray.get_actor(actor_name(group, 0), namespace=NAMESPACE)
                ray.get(head.scale.remote(dp_size), timeout=CALL_S)
            except (ValueError, ray.exceptions.RayError) as e:
                logger.warning("the head of group %r cannot be asked for more ranks: %s", group, e)
            until = time.monotonic() + RELAYED_S
            while self._board.dp_size < dp_size and time.monotonic() < until:
                time.sleep(0.01)  # the relay brings it
        self.scale(dp_size)  # here, too, if the head is gone

    def end(self) -> None:
        """Removes the board and ends the actor."""
        self._coordinator.close()
        ray.actor.exit_actor()

    def _end_when_idle(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < IDLE_S:
            time.sleep(LOOK_S)
            now = time.monotonic()
            if self._is_used() or any(until > now for until in self._promised.values()):
                idle_since = now
        logger.info(
            "no replica has had a row for %g s: the board of group %r ends", IDLE_S, self._board.segment.group
        )
        self._coordinator.close()
        ray.kill(self._me, no_restart=True)

    def _is_used(self) -> bool:
        """Whether a replica has a row: of this node, and at the head also of another one."""
        board = self._board
        ranks = range(board.dp_size)
        return any(map(board.engine_alive, ranks)) or (
            not self._facts.number and any(map(board.engine_present, ranks))
        )


def admit(group: str, node: str, capacity: int, nodes: int) -> int:
    """A free rank of a node's board; starts the board's actor if there is none.

    Args:
        group: the group's name.
        node: Ray's id of this node.
        capacity: the most replicas on one node, if this is the first board of the group.
        nodes: the most nodes with relays, if this is the first board.
    """
    for tried in range(TRIES):
        try:
            actor, _ = _holder(group, node, Facts(node, 0, nodes, capacity, ""))
            return int(ray.get(actor.admit.remote()))
        except ray.exceptions.RayActorError:
            if tried == TRIES - 1:
                raise
            time.sleep(0.2 * 2**tried)  # it was just ending itself, or Ray starts it again
    raise AssertionError("unreachable")


def _holder(group: str, node: str, first: Facts) -> tuple[Any, Facts]:
    """The actor of this node's board, and its facts."""
    alone = f"{group}-{node}"
    with suppress(ValueError, SegmentError), Board.attach(group) as board:  # most often it is there
        named = actor_name(group, board.node)
        for name in (alone, named) if board.nodes == 1 else (named,):
            with suppress(ray.exceptions.GetTimeoutError):
                actor = ray.get_actor(name, namespace=NAMESPACE)
                facts = ray.get(actor.facts.remote(), timeout=CALL_S)
                if facts.node == node:
                    return actor, facts
    capacity = first.capacity
    try:
        found, head = _get(group, first)
        capacity = head.capacity
        if head.node == node:
            return found, head
        for number in range(1, head.nodes):
            found, facts = _get(group, head._replace(node=node, number=number))
            if facts.node == node:
                return found, facts
    except ray.exceptions.GetTimeoutError:
        logger.warning("a board of group %r does not answer: was its node lost?", group)
    logger.warning("node %s has a board without a relay: group %r was made for fewer nodes", node, group)
    return _get(group, Facts(node, 0, 1, capacity, ""), name=alone)


def _get(group: str, facts: Facts, name: str | None = None) -> tuple[Any, Facts]:
    """The actor with a number, wherever it is, started on a node if there is none; and its facts."""
    actor = (
        ray.remote(BoardHolder)
        .options(
            name=name or actor_name(group, facts.number),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(facts.node, soft=False),
        )
        .remote(group, facts)
    )
    return actor, ray.get(actor.facts.remote(), timeout=CALL_S)


def actor_name(group: str, number: int) -> str:
    """The name of the actor of the board with a number."""
    return f"{group}-{number}"


def end_boards() -> None:
    """Ends the boards of all deployments of this cluster. Call it after ``serve.shutdown()``.

    Without it each ends a minute later. A cluster that is killed before leaves them in ``/dev/shm``, where the
    next start of a coordinator removes them.
    """
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE:
            with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ValueError):
                ray.get(ray.get_actor(actor["name"], namespace=NAMESPACE).end.remote(), timeout=END_S)
