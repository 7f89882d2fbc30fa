"""The hooks: all that dpshm replaces in vLLM, put in once a process, after a look at what is there.

    what                                           why
    ---------------------------------------------  ------------------------------------------------------
    v1.engine.utils.DPCoordinator                  the launcher starts ours instead
    v1.engine.core.EngineCoreProc.run_busy_loop    the thread that owns the scheduler begins its work: takes
    v1.engine.core.DPEngineCoreProc.run_busy_loop  the rank's row there, and hooks the instance
                                                   (`dpshm.vllm.engine_core`)
    v1.engine.core_client.DPAsyncMPClient          an API server would listen to the broadcast: looks for the
      ._ensure_stats_update_task                   board first, and hooks the instance (`dpshm.vllm.api_server`)
    v1.engine.core_client.DPLBAsyncMPClient        requests that finished leave the bookings
      .process_engine_outputs
    prometheus_client.multiprocess                 the board's figures on vLLM's /metrics
      .MultiProcessCollector.__init__

All of these are in vLLM 0.10.2 already, the oldest release looked at; two methods that engine hooks call,
``has_work`` and ``is_scheduler_paused``, and the wake-up of an idle engine, came between 0.16 and 0.20.

Everything else is done on instances, in processes that found a board, and is taken off again when something
of ours fails: the class below it is vLLM's, untouched. No hook holds code of vLLM; each wraps and calls.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dpshm.vllm import metrics
from dpshm.vllm.api_server import outputs_processor, stats_task
from dpshm.vllm.coordinator import coordinator_factory
from dpshm.vllm.engine_core import busy_loop
from dpshm.vllm.log import adopt_core, logger
from dpshm.vllm.options import Options
from dpshm.vllm.versions import why_not

_MARK = "_dpshm_installed"


def install(options: Options) -> None:
    """Puts the hooks in, once a process; says why not, if not."""
    utils = import_module("vllm.v1.engine.utils")
    if getattr(utils, _MARK, False):
        return
    setattr(utils, _MARK, True)
    if reason := why_not(options.any_version):
        logger.warning("dpshm is off: %s. vLLM runs as it does without it", reason)
        return
    adopt_core()
    core = import_module("vllm.v1.engine.core")
    client = import_module("vllm.v1.engine.core_client")
    _wrap(utils, "DPCoordinator", lambda stock: coordinator_factory(stock, options))
    for kind in (core.EngineCoreProc, core.DPEngineCoreProc):
        _wrap(kind, "run_busy_loop", busy_loop)
    _wrap(client.DPAsyncMPClient, "_ensure_stats_update_task", lambda stock: stats_task(stock, options))
    _wrap(client.DPLBAsyncMPClient, "process_engine_outputs", lambda stock: staticmethod(outputs_processor(stock)))
    metrics.install()


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))
