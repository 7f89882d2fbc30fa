"""Whether the plugin may run in the vLLM of this process: a self-check, at the start, of what the hooks rely on.

Every name that the plugin wraps or calls must be there with its parameters, and each hook must pass a dry run on
the release's own classes (`dpshm.vllm.dry_run`). No list of releases has to be maintained. Where the check fails
the plugin stays off and logs why: it never breaks a server.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from importlib import import_module
from typing import NamedTuple

from dpshm.vllm.dry_run import dry_run, dry_run_of_deaths
from dpshm.vllm.log import logger

OLDEST = (0, 28)
"""Releases before this one stay off: they lack names, or were never tried."""
TESTED = ("0.33.0", "0.32.0", "0.28.0")
"""Releases on which tests of ``tests/e2e/vllm`` passed: those that the table in dpshm/vllm/README.md names."""


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
    Needed("vllm.v1.engine.utils", "CoreEngineProcManager.__init__", ("vllm_config",)),
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
    Needed("vllm.v1.request", "RequestStatus.RUNNING"),
    Needed("vllm.v1.engine", "EngineCoreEventType.PREEMPTED"),
    Needed("vllm.v1.engine", "EngineCoreRequestType.WAKEUP"),
    Needed("vllm.v1.engine", "EngineCoreRequestType.START_DP_WAVE"),
    Needed("vllm.v1.engine.core_client", "DPAsyncMPClient._ensure_stats_update_task"),
    Needed("vllm.v1.engine.core_client", "DPAsyncMPClient.add_request_async", ("request",)),
    Needed("vllm.v1.engine.core_client", "DPLBAsyncMPClient.get_core_engine_for_request", ("request",)),
    Needed("vllm.v1.engine.core_client", "DPLBAsyncMPClient.process_engine_outputs", ("outputs",)),
)

FOR_RESTARTS = (
    Needed(
        "vllm.v1.engine.utils",
        "CoreEngineProcManager.__init__",
        (
            *("local_engine_count", "start_index", "local_start_index", "vllm_config", "local_client"),
            *("handshake_address", "client_handshake_address"),
        ),
    ),
    Needed("vllm.v1.engine.utils", "CoreEngineProcManager.monitor_engine_liveness"),
    Needed("vllm.v1.engine.utils", "wait_for_engine_startup", ("launch",)),
    Needed("vllm.v1.engine.utils", "EngineHandshakeMetadata", ("addresses", "parallel_config")),
    Needed("vllm.v1.engine.utils", "get_mp_context"),
    Needed("vllm.utils.network_utils", "get_open_zmq_ipc_path"),
    Needed("vllm.v1.engine.core", "EngineCoreProc._send_engine_dead"),
    Needed("vllm.v1.engine.core_client", "DPLBAsyncMPClient._call_utility_async", ("method", "args", "engine")),
    Needed("vllm.v1.engine.async_llm", "AsyncLLM._run_output_handler"),
    Needed("vllm.v1.engine.output_processor", "OutputProcessor.abort_requests", ("request_ids", "internal")),
    Needed("vllm.v1.engine.output_processor", "RequestOutputCollector.put", ("output",)),
    Needed("vllm.exceptions", "GracefulHTTPError", ("message", "http_status")),
)
"""What restarts of a rank need beside."""


def why_no_restart() -> str | None:
    """Why a rank that dies is not started again in the vLLM of this process; None if it is."""
    if problem := _first_missing(FOR_RESTARTS):
        return f"vLLM {import_module('vllm').__version__} {problem}"
    try:
        dry_run_of_deaths()
    except Exception as e:
        return f"a dry run failed: {type(e).__name__}: {e}"
    return None


def why_not(any_version: bool = False) -> str | None:
    """Why the plugin must stay off in the vLLM of this process; None if it may run.

    Args:
        any_version: try releases before `OLDEST` too. The check has to pass all the same.
    """
    version = import_module("vllm").__version__
    if release_of(version) < OLDEST and not any_version:
        oldest = ".".join(map(str, OLDEST))
        return f"vLLM {version} is older than {oldest}; DPSHM_ANY_VLLM=1 tries it anyway"
    if problem := _first_missing(NEEDED):
        return f"vLLM {version} {problem}"
    try:
        dry_run()
    except Exception as e:
        return f"vLLM {version} failed a dry run of the hooks: {type(e).__name__}: {e}"
    if version.partition("+")[0] not in TESTED:
        logger.info("dpshm: vLLM %s passed the self-check; tested were %s", version, ", ".join(TESTED))
    return None


def release_of(version: str) -> tuple[int, ...]:
    """The numbers with which a version begins: (0, 33, 0) of ``0.33.0rc1+cpu``. A development build has few."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def _first_missing(all_needed: Iterable[Needed]) -> str | None:
    return next(filter(None, map(_missing, all_needed)), None)


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
