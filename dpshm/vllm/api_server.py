"""An API server's part: three hooks on its client class, and a link between one client and the board of its group.

    _ensure_stats_update_task   a client is about to listen to the coordinator's broadcast: the hook looks for the
                                board first, and gives the client a link (`dpshm.vllm.client_link`)
    add_request_async           a client that was made outside an event loop gets its link before its first request
    process_engine_outputs      tokens are timed, and requests that finished leave the bookings

A client has at most one link, for as long as the link works: a link that fails removes itself, and the client does
from then on what vLLM's own client does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dpshm.vllm import metrics
from dpshm.vllm.board_link import BoardLink
from dpshm.vllm.client_link import LINK, ClientLink, WaveLink
from dpshm.vllm.find import group_at
from dpshm.vllm.follow import expects_board, wait_for_board
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options
from dpshm.vllm.shadow import ShadowLink


def stats_task(stock: Callable[[Any], Any], options: Options) -> Callable[[Any], Any]:
    """The hook on ``_ensure_stats_update_task``: a client that chooses by the board needs no broadcast."""

    def _ensure_stats_update_task(client: Any) -> Any:
        if LINK not in client.__dict__:
            setattr(client, LINK, _attach(client, options))
        link = client.__dict__[LINK]
        if link is not None and link.instead_of_broadcast:
            return None
        return stock(client)

    return _ensure_stats_update_task


def first_request(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The hook on ``add_request_async``: the link comes before the first request, which then passes its hooks."""

    async def add_request_async(client: Any, request: Any) -> Any:
        if LINK not in client.__dict__:
            client._ensure_stats_update_task()
            hooked = client.__dict__.get("add_request_async")
            if hooked is not None:
                return await hooked(request)
        return await stock(client, request)

    return add_request_async


def outputs_processor(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The hook on ``process_engine_outputs``: tokens are timed, and requests that finished leave the bookings."""

    async def process_engine_outputs(client: Any, outputs: Any) -> None:
        link = client.__dict__.get(LINK)
        if link is not None:
            if outputs.outputs:
                link.heard(outputs.outputs)
            if outputs.finished_requests:
                link.finished(outputs.finished_requests)
        await stock(client, outputs)

    return process_engine_outputs


def _attach(client: Any, options: Options) -> ClientLink | None:
    """Makes the link of a client; None where the client goes the stock way."""
    address = client.stats_update_address
    try:
        group = group_at(address)
        if group is None and expects_board(getattr(client, "vllm_config", None)):
            group = wait_for_board(address)  # nothing is served yet
        if group is None:
            logger.info(
                "dpshm: API server %d finds no board for %s and listens to the coordinator (another node, a "
                "container with a /dev/shm of its own, or a coordinator that is not dpshm's)",
                client.client_index,
                address,
            )
            return None
        balancing = isinstance(client, import_module("vllm.v1.engine.core_client").DPLBAsyncMPClient)
        kind: Any = WaveLink if not balancing else ShadowLink if options.mode == "shadow" else BoardLink
        link: ClientLink = kind(client, group, options)
        metrics.show(group)
    except Exception:
        logger.warning("dpshm: API server %d goes on without the board", client.client_index, exc_info=True)
        return None
    logger.info("dpshm: API server %d %s, group %r", client.client_index, link.does, group)
    return link
