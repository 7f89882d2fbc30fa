"""The board's figures on vLLM's own ``/metrics``.

With one API server that page shows prometheus-client's global registry, and a collector there is enough. With
several, vLLM makes a fresh registry and a `MultiProcessCollector` at each scrape, so a hook on that class adds our
collector to the same registry. Each scrape reads the board, so every API server shows the same figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpshm.vllm.log import logger

_groups: set[str] = set()


def show(group: str) -> None:
    """Starts to export a group's metrics on this process's page."""
    _groups.add(group)


def hide(group: str) -> None:
    """Stops exporting a group's metrics."""
    _groups.discard(group)


def install() -> None:
    """Registers the collector for both kinds of page; called once a process."""
    try:
        from prometheus_client import REGISTRY, multiprocess

        from dpshm.ops.metrics import collect_group  # noqa: F401  (so that a failure comes now, and not at each scrape)
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
    """Collects the metrics of the exported groups at each scrape; skips a group that cannot be read."""

    def describe(self) -> Iterable[Any]:
        """Gives no families: they are known only once there is a group."""
        return ()

    def collect(self) -> Iterable[Any]:
        """Gives the families of all exported groups, read now."""
        families: list[Any] = []
        for group in sorted(_groups):
            try:
                from dpshm.ops.metrics import collect_group

                families.extend(collect_group(group))
            except Exception:
                logger.debug("dpshm: the board of group %r could not be scraped", group, exc_info=True)
        return families


_COLLECTOR: Any = _BoardsCollector()
