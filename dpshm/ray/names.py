"""What replicas, routers and the node's actor of one deployment call the same things."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Self

KEY = "dpshm"
"""Under it a replica's metadata holds its place."""
NAMESPACE = "dpshm"
"""Ray's namespace of the actors that hold the boards."""


class Place(NamedTuple):
    """Where a replica's row is; Ray Serve takes it to every router.

    Attributes:
        node: Ray's id of the node that has the board.
        group: the group's name on that node.
        dp_rank: the replica's rank there.
        relayed: whether all boards with relays have that row, under the same rank.
    """

    node: str
    group: str
    dp_rank: int
    relayed: bool = False

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Self | None:
        """That of a replica with this metadata; None if it has none."""
        found = metadata.get(KEY)
        return None if found is None else cls(**found)

    def to_metadata(self) -> dict[str, Any]:
        """For `Place.of`."""
        return {KEY: self._asdict()}


def group_name(cluster: str, app: str, deployment: str) -> str:
    """The name of a deployment's group: two clusters on one machine have different ones.

    Args:
        cluster: the address of the cluster.
        app: the application's name.
        deployment: the deployment's name.
    """
    digest = hashlib.sha256("\0".join((cluster, app, deployment)).encode()).hexdigest()[:10]
    readable = "".join(c if c.isalnum() else "-" for c in deployment)[:24]
    return f"ray-{readable}-{digest}"
