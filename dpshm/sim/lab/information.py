"""Information models: the load that a front-end of the laboratory sees when it decides.

| name | what a front-end sees |
|---|---|
| `live` | the board: every rank's current row, and the requests in flight of all front-ends |
| `live-index` | the same, and which blocks of prompts each rank's cache holds: the prefix index |
| `live-index-sent` | the same, and what any front-end sent to a rank in the last second, as samples of each prompt: all that `Frontend.route` knows |
| `live-index-ahead` | the same, with all blocks of each prompt |
| `live-unbooked` | the current rows, and no requests in flight |
| `broadcast` | all rows at the last broadcast, every 100 ms. Its own requests since then count once for each front-end, as in vLLM's API servers, until the next broadcast overwrites them |
| `broadcast-keep` | the same rows. Its own requests count once, until a broadcast shows them as received |
| `immediate` | each row 1 ms after it changed. Its own requests count until such a row shows them as received |
| `remote` | one board, eight ranks on its node and eight on each other one: rows of other nodes 1 ms after they changed, and the requests in flight of all front-ends. What dpshm has |
| `nodes` | a board and front-ends on each node of eight ranks: rows and requests in flight of the own node, and those of others 1 ms later. Two drawn ranks of other nodes are compared beside all of the own (`dpshm.policies.old_news`) |
| `scrape` | all rows at the last scrape, every second, and nothing else, as a gateway does |

A number after a colon is another interval or delay in milliseconds: ``broadcast:10``. For `live-index` it is the
delay of changes of the caches, as for a router that receives events; the default is 0. For `live-index-ahead` it
is the time for which sent requests are remembered.
All models give the same `View`, so each policy runs on each of them.
"""  # noqa: E501 - a table

from __future__ import annotations

from typing import Any

from dpshm.errors import SettingError
from dpshm.sim.lab.late_information import Broadcast, BroadcastKeep, Immediate
from dpshm.sim.lab.live_information import Live, LiveIndex, LiveIndexAhead, LiveUnbooked
from dpshm.sim.lab.node_information import Nodes, Remote
from dpshm.sim.lab.rank import SimRank
from dpshm.sim.lab.sent_information import LiveIndexSent
from dpshm.sim.lab.view_model import Information

DEFAULT_MS = {
    "live-index": 0.0,
    "live-index-ahead": 1000.0,
    "broadcast": 100.0,
    "broadcast-keep": 100.0,
    "immediate": 1.0,
    "remote": 1.0,
    "nodes": 1.0,
    "scrape": 1000.0,
}
NAMES = ("live", "live-unbooked", "live-index-sent", *DEFAULT_MS)


def check_information(name: str) -> tuple[str, float]:
    """The kind of a model and its interval or delay in seconds (0 for the live ones).

    Raises:
        SettingError: no model has that name.
    """
    kind, colon, number = name.partition(":")
    try:
        ms = float(number) if colon else DEFAULT_MS.get(kind, 0.0)
    except ValueError:
        ms = 0.0
    if kind not in NAMES or (colon and (kind not in DEFAULT_MS or not 0 < ms < 1e9)):
        raise SettingError(
            f"no information model {name!r}: choose one of {', '.join(NAMES)}; those but the live ones take "
            "milliseconds after a colon, as in broadcast:10"
        )
    return kind, ms / 1e3


def make_information(name: str, ranks: list[SimRank], own: list[list[int]]) -> Information:
    """Makes the model of that name over these ranks."""
    kind, seconds = check_information(name)
    made: dict[str, Any] = {
        "live": lambda: Live(ranks, own),
        "live-index": lambda: LiveIndex(ranks, own, seconds),
        "live-index-ahead": lambda: LiveIndexAhead(ranks, own, seconds),
        "live-index-sent": lambda: LiveIndexSent(ranks, own),
        "live-unbooked": lambda: LiveUnbooked(ranks, own),
        "broadcast": lambda: Broadcast(ranks, own, seconds, times=len(own)),
        "broadcast-keep": lambda: BroadcastKeep(ranks, own, seconds),
        "immediate": lambda: Immediate(ranks, own, seconds),
        "remote": lambda: Remote(ranks, own, seconds),
        "nodes": lambda: Nodes(ranks, own, seconds),
        "scrape": lambda: Broadcast(ranks, own, seconds, times=0),
    }
    return made[kind]()  # type: ignore[no-any-return]
