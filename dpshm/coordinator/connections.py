"""Whose connections the engines' subscriptions are.

Every engine subscribes to everything. An engine with dpshm's own link also subscribes to its name
(`dpshm.net.wire.encode_name`), so its connection is never taken for that of another rank, even if a forked worker
keeps an old one open. What is left has no name: the connections of stock engines, and of engines that have a row
and vLLM's sockets. Each rank with such a row accounts for one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Connections:
    """Counts subscriptions of engines.

    Attributes:
        count: connections, those that a forked worker keeps among them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._named: Counter[int] = Counter()

    def on_join(self, name: int | None) -> None:
        """An engine subscribed: to everything (None), or to the name of its rank."""
        if name is None:
            self.count += 1
        else:
            self._named[name] += 1

    def on_leave(self, name: int | None) -> None:
        """A subscription ended."""
        if name is None:
            self.count = max(0, self.count - 1)
        elif self._named[name] > 1:
            self._named[name] -= 1
        else:
            del self._named[name]

    def on_disconnect(self) -> None:
        """Every connection was ended."""
        self.count = 0
        self._named.clear()

    def ranks(self, held: Sequence[bool]) -> int:
        """How many ranks have a connection.

        Args:
            held: by rank, whether a process holds its row.
        """
        named = sum(row and e in self._named for e, row in enumerate(held))
        return named + max(0, min(self.nameless, len(held) - named))

    def stock(self, held: Sequence[bool]) -> int:
        """How many stock engines are connected, at most one for each rank without a row.

        Args:
            held: by rank, whether a process holds its row.
        """
        with_sockets_of_vllm = sum(row and e not in self._named for e, row in enumerate(held))
        return max(0, min(self.nameless - with_sockets_of_vllm, len(held) - sum(held)))

    @property
    def nameless(self) -> int:
        """Connections that tell no rank's name."""
        return self.count - self._named.total()
