"""The launcher's part: dpshm's coordinator where vLLM starts its own, in a process that imports dpshm alone.

vLLM watches the process of its coordinator and ends the server when that ends. A coordinator of dpshm that dies
can be started again: the new one takes the live board over, with wave and bookings, and binds the same
addresses, to which everybody reconnects. So what vLLM is given to watch is a stand-in that ends only when a
restart has failed.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from dpshm.board import segment
from dpshm.coordinator.settings import Settings
from dpshm.errors import SegmentError, SettingError
from dpshm.service.child import START_TIMEOUT_S, STOP_TIMEOUT_S, CoordinatorProcess
from dpshm.version import __version__
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options

GROUP_PREFIX = "vllm-"
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
RESTART_PAUSE_S = 0.2
FRONTENDS_TO_SPARE = 8


def coordinator_factory(stock: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """What stands for the class ``DPCoordinator``: gives ours, or the stock one if ours cannot be had."""

    def dp_coordinator(parallel_config: Any, *args: Any, **kwargs: Any) -> Any:
        if reason := _why_stay_out(parallel_config):
            logger.info("dpshm stays out: %s", reason)
            return stock(parallel_config, *args, **kwargs)
        waves = bool(kwargs.get("enable_wave_coordination", args[0] if args else True))
        try:
            _sweep_the_dead()
            coordinator = WatchedCoordinator(**_settings(parallel_config, waves, options))
        except Exception:
            logger.warning("dpshm's coordinator did not start: vLLM starts its own", exc_info=True)
            return stock(parallel_config, *args, **kwargs)
        _announce(coordinator.settings, parallel_config, options)
        return coordinator

    return dp_coordinator


def _sweep_the_dead() -> None:
    """Removes the boards of servers that were killed: their names hold a pid, so nobody else would."""
    for group in segment.groups():
        if group.startswith(GROUP_PREFIX):
            _sweep(group)


def _sweep(group: str) -> None:
    with suppress(SegmentError, SettingError):  # another user's, or alive: locks decide
        if segment.sweep(group):
            logger.info("dpshm: removed what the dead group %r left", group)


def _why_stay_out(parallel_config: Any) -> str | None:
    envs = import_module("vllm.envs")
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        return "the Rust front-end (VLLM_USE_RUST_FRONTEND) chooses engines by itself, no Python hook reaches it"
    if getattr(parallel_config, "enable_elastic_ep", False):
        return "elastic expert parallelism runs with one API server, which sees all that it sends; nothing to gain"
    return None


def _settings(parallel_config: Any, waves: bool, options: Options) -> dict[str, Any]:
    external = getattr(parallel_config, "data_parallel_external_lb", False)
    hybrid = getattr(parallel_config, "data_parallel_hybrid_lb", False)
    api_servers = getattr(parallel_config, "_api_process_count", 1)
    return {
        "group": options.group or f"{GROUP_PREFIX}{os.getpid()}",
        "dp_size": parallel_config.data_parallel_size,
        "dp_size_local": parallel_config.data_parallel_size_local,
        "balancing": "external" if external else "hybrid" if hybrid else "internal",
        "host": parallel_config.data_parallel_master_ip,
        # vLLM's own coordinator binds that address without keys, and its engines have none: the same network is
        # trusted as without dpshm, which must not refuse what works.
        "insecure": True,
        "waves": waves,
        "counts_with_kv": _counts_have_kv(),
        "max_frontends": max(64, parallel_config.data_parallel_size + api_servers + FRONTENDS_TO_SPARE),
        "stall_timeout_s": options.stall_timeout_s,
    }


def _counts_have_kv() -> bool:
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


class StandIn:
    """A process as vLLM's monitor wants it, through all restarts of the one behind it.

    Attributes:
        name: for messages.
        sentinel: a descriptor that is readable once the coordinator has ended for good.
        exitcode: None until then.
    """

    def __init__(self, process: CoordinatorProcess) -> None:
        self.process = process
        self.name = "dpshm-coordinator"
        self.exitcode: int | None = None
        # An eventfd, not a pipe: forked engines keep the other end of a pipe open, and it would never end.
        self.sentinel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = threading.Event()

    @property
    def pid(self) -> int:
        """The present process."""
        return self.process.proc.pid

    def is_alive(self) -> bool:
        """Whether there is a coordinator, or may be one again."""
        return self.exitcode is None

    def terminate(self) -> None:
        """Asks the present process to end, for good."""
        self.end(0)
        self.process.proc.terminate()

    def kill(self) -> None:
        """Ends the present process, for good."""
        self.end(-9)
        self.process.proc.kill()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end, for `timeout` seconds at most."""
        self._ended.wait(timeout)

    def end(self, exitcode: int) -> None:
        """From now on there is no coordinator any more; whoever watches hears of it."""
        if self.exitcode is None:
            self.exitcode = exitcode
            self._ended.set()
            os.eventfd_write(self.sentinel, 1)


class WatchedCoordinator:
    """vLLM's handle on a coordinator; starts it again when it dies.

    Takes the settings of `dpshm.coordinator.settings.Settings`.

    Attributes:
        settings: what the coordinator was told.
        proc: what vLLM watches.
        restarts: how many times it was started again.
    """

    def __init__(self, **settings: Any) -> None:
        process = CoordinatorProcess(**settings)
        self.settings = process.settings
        self.proc = StandIn(process)
        self.restarts = 0
        self._addresses = (process.get_stats_publish_address(), *process.get_engine_socket_addresses())
        self._pid = os.getpid()
        self._given = settings
        self._times: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._watch, name="dpshm-watch-coordinator", daemon=True)
        self._thread.start()

    def get_stats_publish_address(self) -> str:
        """Where front-ends connect."""
        return self._addresses[0]

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """(input, output) for engines."""
        return self._addresses[1], self._addresses[2]

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends the coordinator, for good; kills it after `timeout` seconds, at least 5."""
        if self._pid != os.getpid():
            return  # a forked child's copy of the handle
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(START_TIMEOUT_S)
        # vLLM often gives no time at all, and a coordinator that is killed leaves the board behind.
        self.proc.process.shutdown(max(timeout or 0.0, STOP_TIMEOUT_S))
        self.proc.end(0)
        _sweep(self.settings.group)

    # The watching thread.

    def _watch(self) -> None:
        while True:
            child = self.proc.process.proc
            poller = select.poll()
            for fd in (child.sentinel, self._stop_fd):
                poller.register(fd, select.POLLIN)
            if self._stop_fd in dict(poller.poll()):
                return
            exitcode = child.exitcode
            if self.proc.exitcode is not None:
                return  # vLLM asked for it
            if not exitcode:
                # It ended in good order and took the board along: somebody else told it to.
                logger.error("dpshm's coordinator (pid %d) was told to end by another than this server", child.pid)
                self.proc.end(1)
                return
            logger.warning(
                "dpshm's coordinator (pid %d) died, exit status %s: starting it again. Requests go on meanwhile",
                child.pid,
                exitcode,
            )
            if not self._start_again():
                self.proc.end(exitcode)
                return

    def _start_again(self) -> bool:
        now = time.monotonic()
        if len(self._times) == MAX_RESTARTS and now - self._times[0] < RESTART_WINDOW_S:
            logger.error(
                "dpshm's coordinator died %d times within %g s: giving up", MAX_RESTARTS + 1, RESTART_WINDOW_S
            )
            return False
        self._times.append(now)
        for attempt in range(MAX_RESTARTS):
            try:
                process = CoordinatorProcess(**self._given)
            except Exception:
                logger.log(
                    logging.WARNING if attempt + 1 < MAX_RESTARTS else logging.ERROR,
                    "dpshm's coordinator did not start again",
                    exc_info=True,
                )
                time.sleep(RESTART_PAUSE_S * 2**attempt)
                continue
            addresses = (process.get_stats_publish_address(), *process.get_engine_socket_addresses())
            if addresses != self._addresses:
                logger.error("the board was gone with dpshm's coordinator: nobody would find the new one")
                process.close()
                return False
            self.proc.process = process
            self.restarts += 1
            logger.info("dpshm's coordinator is back, pid %d", process.proc.pid)
            return True
        return False
