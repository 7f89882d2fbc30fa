"""The board's figures on vLLM's own ``/metrics``.

With one API server that page shows prometheus-client's global registry, and a collector there is enough. With
several, the page is put together anew at each scrape, by a `MultiProcessCollector` on a fresh registry; so
whoever makes one gets our collector beside it. Each scrape reads the board: every API server shows the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpshm.board.board import Board
from dpshm.vllm.log import logger

_groups: set[str] = set()


def show(group: str) -> None:
    """This process's page shows that group from now on."""
    _groups.add(group)


def hide(group: str) -> None:
    """And no longer."""
    _groups.discard(group)


def install() -> None:
    """Puts the collector where the page is made; called once a process."""
    try:
        from prometheus_client import REGISTRY, multiprocess

        from dpshm.ops.metrics import BoardCollector  # noqa: F401  (to fail now, and not at each scrape)
    except Exception as e:
        logger.info("dpshm: no figures of the board on /metrics: %s", e)
        return
    REGISTRY.register(_COLLECTOR)
    stock: Any = multiprocess.MultiProcessCollector.__init__

    def __init__(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, registry, *args, **kwargs)
        if registry is not None:
            registry.register(_COLLECTOR)

    multiprocess.MultiProcessCollector.__init__ = __init__  # type: ignore[method-assign]


class _BoardsCollector:
    """Collects the shown groups at each scrape; nothing, and nothing failed, where there is none."""

    def describe(self) -> Iterable[Any]:
        """Nothing: the families are known when there is a group."""
        return ()

    def collect(self) -> Iterable[Any]:
        """The families of this moment."""
        families: list[Any] = []
        for group in sorted(_groups):
            try:
                from dpshm.ops.metrics import BoardCollector

                with Board.attach(group) as board:
                    families.extend(BoardCollector(board).collect())
            except Exception:
                logger.debug("dpshm: the board of group %r could not be scraped", group, exc_info=True)
        return families


_COLLECTOR: Any = _BoardsCollector()
