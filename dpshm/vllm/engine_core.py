"""An engine's part: the hooks on its class, which open its row of the board and an `EngineLink` around its loop.

The hook on ``run_busy_loop`` attaches the row in the thread that owns the scheduler, so every start method of the
process works.

An engine that finds no board, because that is on another node, sends its row to the coordinator instead
(`dpshm.engine.remote`), in a message that vLLM's own coordinator reads as a report. It has no bells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpshm.engine.remote import CarriedRow
from dpshm.engine.row import EngineRow
from dpshm.vllm.engine_link import ALONE, EngineLink
from dpshm.vllm.find import group_at, owner_name
from dpshm.vllm.follow import start_follower
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options


def busy_loop(stock: Callable[[Any], Any], options: Options | None = None) -> Callable[[Any], Any]:
    """The hook on ``run_busy_loop``: the loop, with the rank's row open around it."""

    def run_busy_loop(core: Any) -> Any:
        follower = start_follower(core, options or Options())
        try:
            link = _attach(core)
            try:
                return stock(core)
            finally:
                if link is not None:
                    _close(link)
        finally:
            if follower is not None:
                follower.close()

    return run_busy_loop


def _close(link: EngineLink) -> None:
    """Closes a link; what fails there must not take the place of the exception with which vLLM ends the loop."""
    try:
        link.close()
    except Exception:
        logger.warning("dpshm: a row could not be closed", exc_info=True)


def engine_dead(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """The hook on ``_send_engine_dead``: a rank that is on its own dies without the others.

    vLLM would tell all API servers that the engine is dead, and they would end. They see it on the board.
    """

    def _send_engine_dead(core: Any) -> None:
        if vars(core).get(ALONE):
            logger.warning("dpshm: engine %d ends, and the server goes on", core.engine_index)
        else:
            stock(core)

    return _send_engine_dead


def _attach(core: Any) -> EngineLink | None:
    address = getattr(core, "frontend_stats_publish_address", None)
    if not address:
        return None  # no coordinator: no data parallelism, or ranks that are on their own
    try:
        group = group_at(address)
        if group is None:
            row = _far_row(core, address)
            if row is None:
                return None
        else:
            row = EngineRow.attach(group, core.engine_index)
        try:
            link = EngineLink(core, row)
        except BaseException:
            row.close()
            raise
    except Exception:
        logger.warning("dpshm: engine %d goes on without a row", core.engine_index, exc_info=True)
        return None
    if group is not None:  # else the API servers, on another node, cannot see that it is gone
        header = row.board.segment.header
        vars(core)[ALONE] = not header.waves and header.head_address is None  # one launcher restarts ranks
        logger.info("dpshm: engine %d publishes to the board of group %r", core.engine_index, group)
    return link


def _far_row(core: Any, stats_address: str) -> EngineRow | None:
    """A row that is carried to the coordinator; None if it cannot be on another node."""
    inputs, output = list(core.addresses.inputs), getattr(core.addresses, "coordinator_output", None)
    if output is None or not output.startswith("tcp:"):
        logger.info(
            "dpshm: engine %d finds no board for %s and reports to the coordinator (a container with a /dev/shm "
            "of its own, or a coordinator that is not dpshm's)",
            *(core.engine_index, stats_address),
        )
        return None
    logger.info(
        "dpshm: engine %d finds no board for %s, which is on another node, and sends its row to %s (a report "
        "to a coordinator that is not dpshm's)",
        *(core.engine_index, stats_address, output),
    )
    return CarriedRow.connect(
        ("", output), core.engine_index, owners=[owner_name(i, address) for i, address in enumerate(inputs)]
    )
