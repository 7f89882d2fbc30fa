"""The launcher's part: dpshm's coordinator where vLLM starts its own, in a process that imports dpshm alone.

The factory stands for vLLM's class ``DPCoordinator``. It gives a handle with the same methods
(`dpshm.vllm.supervisor`), or calls the class itself where dpshm cannot help or does not start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dpshm.board import files
from dpshm.coordinator.settings import Settings
from dpshm.errors import DpshmError
from dpshm.linux import processes
from dpshm.version import __version__
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options
from dpshm.vllm.supervisor import WatchedCoordinator

GROUP_PREFIX = "vllm-"
PREFIXES, NAMES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""Which variables vLLM copies to Ray actors, beside its own: by prefix, and by name."""
FRONTENDS_TO_SPARE = 8
"""Rows for front-ends beyond one for each rank and API server: restarted servers, and tools."""


def coordinator_factory(stock: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The hook on ``DPCoordinator``: makes our coordinator, or the stock one if ours does not start."""

    def dp_coordinator(parallel_config: Any, *args: Any, **kwargs: Any) -> Any:
        if reason := _why_stay_out(parallel_config):
            logger.info("dpshm stays out: %s", reason)
            return stock(parallel_config, *args, **kwargs)
        waves = bool(kwargs.get("enable_wave_coordination", args[0] if args else True))
        try:
            settings = _settings(parallel_config, waves, options)
            if options.group is None:
                settings["group"] = _free_name(settings["group"])
            coordinator = WatchedCoordinator(**settings)
        except DpshmError as e:
            logger.warning("dpshm's coordinator did not start: %s. vLLM starts its own", e)
            return stock(parallel_config, *args, **kwargs)
        except Exception:
            logger.warning("dpshm's coordinator did not start: vLLM starts its own", exc_info=True)
            return stock(parallel_config, *args, **kwargs)
        coordinator.log_summaries(options.log_s)
        _announce(coordinator.settings, parallel_config, options)
        if missing := not_for_actors(parallel_config, os.environ):
            logger.warning(
                "dpshm: vLLM does not pass %s to Ray actors: set them where `ray start` runs too, or set %s=DPSHM",
                *(", ".join(missing), PREFIXES),
            )
        return coordinator

    return dp_coordinator


def not_for_actors(parallel_config: Any, environ: Mapping[str, str]) -> list[str]:
    """The variables of dpshm that are set here and do not reach engines, because these are Ray actors."""
    if getattr(parallel_config, "data_parallel_backend", None) != "ray":
        return []
    prefixes = tuple(filter(None, map(str.strip, environ.get(PREFIXES, "").split(","))))
    names = {name.strip() for name in environ.get(NAMES, "").split(",")}
    ours = [name for name in environ if name.startswith("DPSHM") and name not in names]
    return sorted(name for name in ours if not (prefixes and name.startswith(prefixes)))


def _free_name(group: str) -> str:
    """A default name, or one with this user's number where another user has a board of that name.

    Such a board may be stale: only its owner can remove it, and pids come again.
    """
    try:
        owner = files.segment_path(group).stat().st_uid
    except OSError:
        return group
    return group if owner == os.geteuid() else f"{group}-u{os.geteuid()}"


def _why_stay_out(parallel_config: Any) -> str | None:
    envs = import_module("vllm.envs")
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        return "the Rust front-end (VLLM_USE_RUST_FRONTEND) chooses engines, and no Python hook reaches it"
    if getattr(parallel_config, "enable_elastic_ep", False):
        return "elastic expert parallelism runs with one API server, which knows all loads already"
    return None


def _settings(parallel_config: Any, waves: bool, options: Options) -> dict[str, Any]:
    external = getattr(parallel_config, "data_parallel_external_lb", False)
    hybrid = getattr(parallel_config, "data_parallel_hybrid_lb", False)
    api_servers = getattr(parallel_config, "_api_process_count", 1)
    return {
        "group": options.group or f"{GROUP_PREFIX}{processes.tag(os.getpid())}",
        "dp_size": parallel_config.data_parallel_size,
        "dp_size_local": parallel_config.data_parallel_size_local,
        "balancing": "external" if external else "hybrid" if hybrid else "internal",
        "host": parallel_config.data_parallel_master_ip,
        # vLLM's own coordinator binds that address without keys, and its engines have none. dpshm trusts the same
        # network, so that a server starts with dpshm wherever it starts without.
        "insecure": True,
        "waves": waves,
        "counts_with_kv": counts_have_kv(),
        "max_frontends": max(64, parallel_config.data_parallel_size + api_servers + FRONTENDS_TO_SPARE),
        "stall_timeout_s": options.stall_timeout_s,
    }


def counts_have_kv() -> bool:
    """Whether this vLLM's own front-ends expect the KV-cache usage beside the counts: after 0.24."""
    try:
        stock = import_module("vllm.v1.engine.coordinator").EngineState()
    except (ImportError, AttributeError):
        return True
    return len(stock.request_counts) > 2


def _announce(settings: Settings, parallel_config: Any, options: Options) -> None:
    shadow = ", shadow: vLLM chooses, dpshm compares" if options.mode == "shadow" else f", policy {options.policy}"
    logger.info(
        "dpshm %s coordinates group %r: %d ranks, %d API servers, %s load balancing, waves %s%s. "
        "`dpshm top` shows it, DPSHM=0 turns it off",
        __version__,
        settings.group,
        settings.dp_size,
        getattr(parallel_config, "_api_process_count", 1),
        settings.balancing,
        "on" if settings.waves else "off",
        shadow,
    )
