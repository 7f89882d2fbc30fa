"""A board on a further node of hybrid or external load balancing: its first engine starts a follower.

The launcher of such a node starts no coordinator, and learns the address of the first node's one only from its
engines. So the node's first engine starts a coordinator that follows that one (`dpshm.coordinator.follower`) when
it begins its work. The node's other engines and its API servers wait for its board, `BOARD_TIMEOUT_S` at most.
The follower ends with its engine; vLLM then ends the whole server.

An engine of a dense model forgets how many ranks there are: vLLM makes it the only one of its own configuration,
before it loads plugins. So the launcher notes the numbers in the configuration that it gives to its engines.

It also follows vLLM's own coordinator, whose messages are the same. That one logs that it does not know some of
the follower's subscriptions.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

from dpshm.linux import processes
from dpshm.service.coordinator_process import CoordinatorProcess
from dpshm.vllm.coordinator import FRONTENDS_TO_SPARE, GROUP_PREFIX, counts_have_kv
from dpshm.vllm.find import group_at
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options

BOARD_TIMEOUT_S = 15.0
LOOK_S = 0.05
_TCP = "tcp:"
_SIZES = "_dpshm_sizes"
"""The attribute of an engine's configuration with the numbers of ranks that there were: in all, on this node."""


def sizes_noted(stock: Callable[..., None]) -> Callable[..., None]:
    """The hook on ``CoreEngineProcManager.__init__``, before it starts engines: notes how many ranks there are.

    Its signature stays, for the checks and hooks that come after it.
    """

    @functools.wraps(stock, assigned=())
    def __init__(manager: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = inspect.signature(stock).bind(manager, *args, **kwargs).arguments
            config = given["vllm_config"].parallel_config
            vars(config)[_SIZES] = config.data_parallel_size, config.data_parallel_size_local
        except Exception:
            logger.debug("dpshm: a further node with dense ranks gets no board", exc_info=True)
        stock(manager, *args, **kwargs)

    return __init__


def start_follower(core: Any, options: Options) -> CoordinatorProcess | None:
    """Gives a node its board, if it needs one and has none; the coordinator that the caller has to close, or None.

    Args:
        core: an engine's, at the begin of its busy loop.
        options: the plugin's.
    """
    address = getattr(core, "frontend_stats_publish_address", None)
    config = getattr(getattr(core, "vllm_config", None), "parallel_config", None)
    if not (address and config is not None and address.startswith(_TCP)):
        return None
    hybrid = getattr(config, "data_parallel_hybrid_lb", False)
    if not (hybrid or getattr(config, "data_parallel_external_lb", False)) or group_at(address) is not None:
        return None
    waves = hasattr(core, "current_wave")
    known = (config.data_parallel_size, config.data_parallel_size_local) if waves else None
    sizes = vars(config).get(_SIZES, known)
    if sizes is None:
        logger.info("dpshm: engine %d does not know how many ranks there are: no board here", core.engine_index)
        return None
    if getattr(config, "data_parallel_rank_local", 0):
        wait_for_board(address)
        return None
    addresses = address, core.addresses.coordinator_input, core.addresses.coordinator_output
    try:
        follower = CoordinatorProcess(
            detached=True,  # vLLM ends a server by killing its engines with their children
            group=options.group or f"{GROUP_PREFIX}{processes.tag(os.getppid())}",
            dp_size=sizes[0],
            dp_size_local=sizes[1],
            balancing="hybrid" if hybrid else "external",
            waves=waves,
            head=",".join(addresses),
            counts_with_kv=counts_have_kv(),
            max_frontends=max(64, sizes[0] + FRONTENDS_TO_SPARE),
            stall_timeout_s=options.stall_timeout_s,
        )
    except Exception:
        logger.warning("dpshm: this node gets no board, and goes on as without dpshm", exc_info=True)
        return None
    logger.info("dpshm: group %r on this node follows the coordinator at %s", follower.settings.group, address)
    return follower


def expects_board(vllm_config: Any) -> bool:
    """Whether the node of an API server or engine gets a board, from its launcher or from its first engine."""
    config = getattr(vllm_config, "parallel_config", None)
    if getattr(config, "data_parallel_hybrid_lb", False) is True:
        return True
    # Dense ranks with external balancing are servers that know nothing of each other.
    external = getattr(config, "data_parallel_external_lb", False) is True
    return external and getattr(getattr(vllm_config, "model_config", None), "is_moe", False) is True


def wait_for_board(address: str) -> str | None:
    """Waits until the node's first engine has made the board; its group, or None if it did not in time."""
    deadline = time.monotonic() + BOARD_TIMEOUT_S
    while (group := group_at(address)) is None:
        if time.monotonic() > deadline:
            logger.warning("dpshm: no board for %s appeared within %g s", address, BOARD_TIMEOUT_S)
            return None
        time.sleep(LOOK_S)
    return group
