"""The vLLM plugin: with dpshm installed, an unchanged ``vllm serve --data-parallel-size N`` uses it.

vLLM calls `register` (entry point ``dpshm`` in the group ``vllm.general_plugins``) in its launcher, in every
API server, in every engine and in every worker, some of them more than once. It puts six hooks on vLLM's
classes (`dpshm.vllm.hooks` lists them) and returns; each hook does nothing until its process has to do with
data parallelism, and each goes on the stock way if anything of ours fails.

    launcher      dpshm's coordinator in the place of vLLM's         `dpshm.vllm.coordinator`
    engine        its row of the board, before and after each step   `dpshm.vllm.engine_core`
    API server    chooses by the board and books on it               `dpshm.vllm.api_server`

``DPSHM=0`` turns it off, ``DPSHM=shadow`` only compares (`dpshm.vllm.shadow`); `dpshm.vllm.options` has the rest.
"""

from __future__ import annotations

from dpshm.vllm.log import logger


def register() -> None:
    """Called by vLLM; never raises."""
    try:
        from dpshm.vllm.options import from_environment

        options = from_environment()
        if options.mode != "off":
            from dpshm.vllm import hooks

            hooks.install(options)
    except Exception:
        logger.warning("dpshm is off: it could not be set up. vLLM runs as it does without it", exc_info=True)
