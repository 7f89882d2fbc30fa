"""The vLLM plugin: with dpshm installed, an unchanged ``vllm serve --data-parallel-size N`` uses it.

vLLM calls `register` (entry point ``dpshm`` in the group ``vllm.general_plugins``) in its launcher, in every
API server, in every engine and in every worker, some of them more than once. It puts hooks on vLLM's
classes (`dpshm.vllm.hooks` lists them) and returns. A hook does nothing until its process takes part in data
parallelism, and calls the stock method alone once anything of ours failed.

    launcher      dpshm's coordinator in the place of vLLM's         `dpshm.vllm.coordinator`
    engine        publishes to its row before and after each step    `dpshm.vllm.engine_core`
    API server    chooses by the board and books on it               `dpshm.vllm.api_server`

``DPSHM=0`` turns it off, ``DPSHM=shadow`` only compares (`dpshm.vllm.shadow`); `dpshm.vllm.options` has the rest.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

from dpshm.errors import SettingError
from dpshm.vllm.log import logger


@cache
def _say_off(reason: str) -> None:
    """Says once that a variable keeps the plugin off. All processes inherit it: the launcher speaks for them."""
    processes: Any = sys.modules.get("multiprocessing.process")
    is_child = processes is not None and processes.parent_process() is not None
    level = logging.DEBUG if is_child else logging.WARNING
    logger.log(level, "dpshm is off: %s. vLLM runs as it does without it", reason)


def register() -> None:
    """Installs the hooks; vLLM calls it, and it never raises."""
    try:
        from dpshm.vllm.options import from_environment

        options = from_environment()
        if options.mode != "off":
            from dpshm.vllm import hooks

            hooks.install(options)
    except SettingError as e:
        _say_off(str(e))
    except Exception:
        logger.warning("dpshm is off: it could not be set up. vLLM runs as it does without it", exc_info=True)
