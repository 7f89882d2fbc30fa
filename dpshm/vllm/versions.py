"""Which releases of vLLM the plugin was tested on, and a check that every name which it uses is there.

On any other release, or where a name is missing, the plugin stays off and logs why: it never breaks a server.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import NamedTuple

TRIED = ("0.28.0", "0.31.0", "0.32.0")
"""Releases on which the tests of ``tests/e2e/vllm`` passed: all of them on the last, those of lockstep ranks
(``test_moe.py``) on the others."""


class Needed(NamedTuple):
    """A name that the plugin wraps or calls, and the parameters that it relies on.

    Attributes:
        module: the module of the name.
        name: a function, a class, or a method as ``Class.method``.
        parameters: the names of the parameters that it must have, without ``self``.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()


NEEDED = (
    Needed("vllm.v1.engine.utils", "DPCoordinator", ("parallel_config", "enable_wave_coordination")),
    Needed("vllm.v1.engine.core", "EngineCoreProc.run_busy_loop"),
    Needed("vllm.v1.engine.core", "DPEngineCoreProc.run_busy_loop"),
    Needed("vllm.v1.engine.core", "EngineCoreProc._process_input_queue"),
    Needed("vllm.v1.engine.core", "EngineCoreProc._handle_client_request", ("request_type", "request")),
    Needed("vllm.v1.engine.core", "EngineCoreProc._process_engine_step"),
    Needed("vllm.v1.engine.core", "EngineCoreProc._handle_request_preproc_error", ("request",)),
    Needed("vllm.v1.engine.core", "EngineCoreProc.execute_dummy_batch"),
    Needed("vllm.v1.engine.core", "EngineCoreProc.has_work"),
    Needed("vllm.v1.engine.core", "EngineCoreProc.is_scheduler_paused"),
    Needed("vllm.v1.core.sched.scheduler", "Scheduler.get_request_counts"),
    Needed("vllm.v1.core.sched.scheduler", "Scheduler.has_unfinished_requests"),
    Needed("vllm.v1.engine", "EngineCoreRequestType.WAKEUP"),
    Needed("vllm.v1.engine.core_client", "DPAsyncMPClient._ensure_stats_update_task"),
    Needed("vllm.v1.engine.core_client", "DPAsyncMPClient.add_request_async", ("request",)),
    Needed("vllm.v1.engine.core_client", "DPLBAsyncMPClient.get_core_engine_for_request", ("request",)),
    Needed("vllm.v1.engine.core_client", "DPLBAsyncMPClient.process_engine_outputs", ("outputs",)),
)


def why_not(any_version: bool = False) -> str | None:
    """Why the plugin must stay off in the vLLM of this process; None if it may run."""
    version = import_module("vllm").__version__
    release = version.partition("+")[0]
    if release not in TRIED and not any_version:
        return f"vLLM {version} is not a tested release ({', '.join(TRIED)}); DPSHM_ANY_VLLM=1 tries it anyway"
    for needed in NEEDED:
        if problem := _missing(needed):
            return f"vLLM {version} {problem}"
    return None


def _missing(needed: Needed) -> str | None:
    full = f"{needed.module}.{needed.name}"
    try:
        thing = import_module(needed.module)
        for part in needed.name.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError):
        return f"has no {full}"
    if needed.parameters:
        found = inspect.signature(thing).parameters  # type: ignore[arg-type]
        lacking = [p for p in needed.parameters if p not in found]
        if lacking:
            return f"has another {full}: no parameter {', '.join(lacking)} among {', '.join(found)}"
    return None
