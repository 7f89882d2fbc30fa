"""The hooks: all that dpshm replaces in vLLM, once a process, after `dpshm.vllm.versions` found every name.

    what                                           why
    ---------------------------------------------  ------------------------------------------------------
    v1.engine.utils.DPCoordinator                  the launcher starts ours instead
    v1.engine.core.EngineCoreProc.run_busy_loop    the thread that owns the scheduler begins its work: the hook
    v1.engine.core.DPEngineCoreProc.run_busy_loop  attaches the rank's row in that thread, and hooks the instance
                                                   (`dpshm.vllm.engine_core`)
    v1.engine.utils.CoreEngineProcManager          an engine of a dense model still knows how many ranks there are
      .__init__                                    (`dpshm.vllm.follow`)
    v1.engine.core_client.DPAsyncMPClient          an API server is about to listen to the broadcast: the hook
      ._ensure_stats_update_task                   finds the board and hooks the instance (`dpshm.vllm.api_server`)
      .add_request_async                           the first request passes the instance's hooks too
    v1.engine.core_client.DPLBAsyncMPClient        tokens are timed; requests that finished leave the bookings
      .process_engine_outputs
    v1.engine.utils.CoreEngineProcManager          a dense rank that dies is started again, and the server stays up
      .__init__, .monitor_engine_liveness          (`dpshm.vllm.revival`)
    v1.engine.utils.wait_for_engine_startup
    v1.engine.core.EngineCoreProc                  such a rank does not tell API servers that the server is over
      ._send_engine_dead
    v1.engine.async_llm.AsyncLLM                   who waits for a request that such a rank had
      ._run_output_handler                         (`dpshm.vllm.away`)
    prometheus_client.multiprocess                 the board's figures on vLLM's /metrics
      .MultiProcessCollector.__init__

vLLM has had all of these since 0.10.2 at the latest. Two methods that engine hooks call,
``has_work`` and ``is_scheduler_paused``, and the wake-up of an idle engine, came between 0.16 and 0.20.

All other hooks are on instances, in processes that found a board, and come off when something of ours fails: the
classes of these instances keep vLLM's methods. No hook holds code of vLLM; each wraps a method and calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dpshm.vllm import metrics
from dpshm.vllm.api_server import first_request, outputs_processor, stats_task
from dpshm.vllm.away import output_handler
from dpshm.vllm.coordinator import coordinator_factory
from dpshm.vllm.engine_core import busy_loop, engine_dead
from dpshm.vllm.follow import sizes_noted
from dpshm.vllm.log import adopt_core, logger
from dpshm.vllm.options import Options
from dpshm.vllm.revival import made_manager, monitored, waited_for_startup
from dpshm.vllm.versions import why_no_restart, why_not

_MARK = "_dpshm_installed"


def install(options: Options) -> None:
    """Installs the hooks, once a process, or logs why they stay out."""
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
    _wrap(utils.CoreEngineProcManager, "__init__", sizes_noted)
    for kind in (core.EngineCoreProc, core.DPEngineCoreProc):
        _wrap(kind, "run_busy_loop", lambda stock: busy_loop(stock, options))
    _wrap(client.DPAsyncMPClient, "_ensure_stats_update_task", lambda stock: stats_task(stock, options))
    _wrap(client.DPAsyncMPClient, "add_request_async", first_request)
    _wrap(client.DPLBAsyncMPClient, "process_engine_outputs", lambda stock: staticmethod(outputs_processor(stock)))
    metrics.install()
    if not options.restart:
        return
    if reason := why_no_restart():
        logger.info("dpshm: a rank that dies ends the server: %s", reason)
        return
    manager = utils.CoreEngineProcManager
    _wrap(manager, "__init__", made_manager)
    _wrap(manager, "monitor_engine_liveness", monitored)
    _wrap(utils, "wait_for_engine_startup", lambda stock: waited_for_startup(stock, options))
    _wrap(core.EngineCoreProc, "_send_engine_dead", engine_dead)
    _wrap(import_module("vllm.v1.engine.async_llm").AsyncLLM, "_run_output_handler", output_handler)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))
