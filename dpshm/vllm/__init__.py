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

from dpshm.vllm.log import logger


def register() -> None:
    """Installs the hooks; vLLM calls it, and it never raises."""
    try:
        from dpshm.vllm.options import from_environment

        options = from_environment()
        if options.mode != "off":
            from dpshm.vllm import hooks

            hooks.install(options)
    except Exception:
        logger.warning("dpshm is off: it could not be set up. vLLM runs as it does without it", exc_info=True)
