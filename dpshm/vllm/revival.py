"""The launcher's part in the death of a rank that is on its own: the server stays up, the rank is started again.

vLLM ends the server when the process of any engine ends. Dense ranks do not need each other, so here the hook on
``CoreEngineProcManager.monitor_engine_liveness`` goes on watching the others and starts the dead one again, with
the arguments of its first start. vLLM's launcher answers the handshake of engines only while the server starts;
this module has a socket of its own for the new process, and tells it the same addresses. API servers learn of the
death and of the return by themselves (`dpshm.vllm.away`).

A rank comes back as it was at the start of the server: adapters that were loaded later, and a pause, are not
there. Where that, or anything else, would not be right, the server ends as it does without dpshm, and `why_end`
says why.
"""

from __future__ import annotations

import copy
import inspect
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgspec
import zmq

from dpshm.board.board import Board
from dpshm.board.words import VERDICT_MASK
from dpshm.errors import DpshmError
from dpshm.rules.liveness import Verdict
from dpshm.vllm.find import owner_name
from dpshm.vllm.log import logger
from dpshm.vllm.options import Options
from dpshm.vllm.supervisor import WatchedCoordinator

ARGUMENTS, KEEPER = "_dpshm_arguments", "_dpshm_keeper"
"""Attributes of a manager of engine processes: what it was made with, and its `Keeper`, or why it has none."""
MAX_RESTARTS = 5
"""Starts of one rank within `WINDOW_S`; then it stays away."""
WINDOW_S = 600.0
PAUSE_S = 1.0
"""The pause before the second start of a rank within the window; it doubles with each."""
POLL_MS = 500
_start_lock = threading.Lock()


def made_manager(stock: Callable[..., None]) -> Callable[..., None]:
    """The hook on ``CoreEngineProcManager.__init__``: keeps the arguments as they are before vLLM changes them."""

    def __init__(manager: Any, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = dict(inspect.signature(stock).bind(manager, *args, **kwargs).arguments)
            del arguments["self"]
            config = arguments["vllm_config"]
            if config.parallel_config.data_parallel_size > 1 and not config.model_config.is_moe:
                vars(manager)[ARGUMENTS] = arguments | {"vllm_config": copy.deepcopy(config)}
        except Exception:
            logger.debug("dpshm: a rank that dies ends the server", exc_info=True)
        stock(manager, *args, **kwargs)

    return __init__


def waited_for_startup(stock: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The hook on ``wait_for_engine_startup``: all engines of a launch are there."""

    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        try:
            launch = kwargs["launch"] if "launch" in kwargs else args[-1]
            manager = launch.engine_manager
            if manager is not None:
                why = why_end(launch, options)
                vars(manager)[KEEPER] = why or Keeper(manager, launch.addresses, launch.coordinator.settings.group)
        except Exception:
            logger.debug("dpshm: a rank that dies ends the server", exc_info=True)
        return result

    return wait_for_engine_startup


def why_end(launch: Any, options: Options) -> str | None:
    """Why the death of a rank ends the server; None if it does not."""
    if not isinstance(launch.coordinator, WatchedCoordinator):
        return "this launcher has no coordinator of dpshm's"
    if not options.restart:
        return "DPSHM_RESTART is 0"
    if options.mode != "on":
        return "vLLM chooses"
    if launch.coordinator.settings.waves:
        return "ranks in lockstep cannot go on without each other"
    arguments = vars(launch.engine_manager).get(ARGUMENTS)
    if arguments is None:
        return "it is not known how its engines were started"
    config = arguments["vllm_config"]
    if getattr(config, "weight_transfer_config", None) is not None:
        return "a new process would not have the weights that were transferred since"
    if getattr(config.parallel_config, "enable_fault_tolerance", False):
        return "vLLM's own fault tolerance is on"
    if launch.coordinator.settings.balancing == "external":
        return "each rank has a server of its own"
    if not _can_spawn():
        return "a process that this program starts would run the program again"
    return None


def _can_spawn() -> bool:
    """Whether a process can be spawned, not forked: this one has threads by now."""
    if import_module("vllm.utils.system_utils").get_mp_context().get_start_method() == "spawn":
        return True  # the engines were
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None) or ""
    return os.path.basename(file) == "vllm" or (spec is not None and spec.name.startswith("vllm."))


def monitored(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """The hook on ``monitor_engine_liveness``, which returns when the server has to end."""

    def monitor_engine_liveness(manager: Any) -> None:
        keeper = vars(manager).get(KEEPER)
        if isinstance(keeper, Keeper):
            try:
                keeper.watch()
            except Exception:
                logger.warning("dpshm: from now on a rank that dies ends the server", exc_info=True)
            else:
                return
        stock(manager)
        if isinstance(keeper, str) and manager.failed_proc_name is not None:
            logger.warning("dpshm: %s died, and the server ends: %s", manager.failed_proc_name, keeper)

    return monitor_engine_liveness


class Keeper:
    """Keeps the engine processes of one launcher alive.

    Args:
        manager: vLLM's manager of them.
        addresses: vLLM's addresses of the API servers and of the coordinator.
        group: the group.
    """

    def __init__(self, manager: Any, addresses: Any, group: str) -> None:
        self._manager = manager
        self._arguments = vars(manager)[ARGUMENTS]
        self._addresses = addresses
        self._group = group
        self._first = self._arguments["start_index"]
        self._restarts: dict[int, deque[float]] = {}
        self._away: set[int] = set()  # places in the manager's list
        self._lost: set[int] = set()  # of those, the ones that stay away

    def watch(self) -> None:
        """Returns when the server is to end: it was told to, or no rank is left."""
        manager = self._manager
        while not manager.manager_stopped.is_set():
            alive = {p.sentinel: at for at, p in enumerate(manager.processes) if at not in self._away}
            poller = select.poll()
            for sentinel in alive:
                poller.register(sentinel, select.POLLIN)
            for sentinel, _ in poller.poll(POLL_MS):
                at = alive[sentinel]
                process = manager.processes[at]
                process.join()
                if manager.manager_stopped.is_set():
                    break
                why = "it ended in good order" if process.exitcode == 0 else self._why_not_restart(at)
                if why is None:
                    self._away.add(at)
                    logger.warning(
                        "dpshm: rank %d (pid %d) died, exit status %s: it is started again; serving goes on",
                        *(self._first + at, process.pid, process.exitcode),
                    )
                    threading.Thread(target=self._restart, args=(at,), name="dpshm-restart", daemon=True).start()
                    continue
                logger.warning("dpshm: %s died, and the server ends: %s", process.name, why)
                self._end(process)
            if len(self._lost) == len(manager.processes):
                self._end(manager.processes[0])
        manager.shutdown()

    def _end(self, process: Any) -> None:
        if process.exitcode != 0:
            self._manager.failed_proc_name = process.name
        self._manager.manager_stopped.set()

    def _why_not_restart(self, at: int) -> str | None:
        """Why the server ends: API servers must all notice the death by the board."""
        try:
            with Board.attach(self._group) as board:
                if not board.engine_incarnation[self._first + at]:
                    return "it had no row of the board"
                owners = {
                    board.owner_of(f)
                    for f in range(board.frontends_used())
                    if int(board.frontend_mark[f]) & VERDICT_MASK == Verdict.ALIVE
                }
        except DpshmError as e:
            return str(e)
        servers = [owner_name(i, address) for i, address in enumerate(self._addresses.inputs)]
        seen = sum(server in owners for server in servers)
        return None if seen == len(servers) else f"of {len(servers)} API servers {seen} choose by the board"

    # In a thread for each rank that died.

    def _restart(self, at: int) -> None:
        stopped = self._manager.manager_stopped
        rank, times = self._first + at, self._restarts.setdefault(at, deque(maxlen=MAX_RESTARTS))
        while True:
            now = time.monotonic()
            recent = sum(now - started < WINDOW_S for started in times)
            if recent == MAX_RESTARTS:
                logger.error(
                    "dpshm: rank %d died %d times within %g s and stays away. Restart the server to have it back",
                    *(rank, recent + 1, WINDOW_S),
                )
                self._lost.add(at)
                return
            if stopped.wait(PAUSE_S * 2 ** (recent - 1) if recent else 0.0):
                return
            times.append(time.monotonic())
            try:
                process = self._start(at)
            except Exception as e:
                if stopped.is_set():
                    return
                logger.warning("dpshm: rank %d did not start again: %s", rank, e)
                continue
            if process is not None:
                self._away.discard(at)
                logger.info(
                    "dpshm: rank %d is back after %.1f s, pid %d", rank, time.monotonic() - now, process.pid
                )
            return

    def _start(self, at: int) -> Any:
        """Starts the process of a rank, and answers its handshake; None if the server ends meanwhile."""
        manager, utils = self._manager, import_module("vllm.v1.engine.utils")
        address = import_module("vllm.utils.network_utils").get_open_zmq_ipc_path()
        with zmq.Context() as context, context.socket(zmq.ROUTER) as handshake:
            handshake.linger = 1000
            handshake.bind(address)
            try:
                with _start_lock:
                    if manager.manager_stopped.is_set():
                        return None
                    process = self._spawn(at, address)
                    manager.processes[at] = process  # the list that vLLM's manager shuts down
                if manager.manager_stopped.is_set():
                    process.terminate()
                    return None
                self._shake_hands(handshake, process, utils)
            finally:
                if address.startswith("ipc://") and os.path.exists(address[6:]):
                    os.unlink(address[6:])
        return process

    def _spawn(self, at: int, address: str) -> Any:
        arguments = self._arguments
        utils: Any = import_module("vllm.v1.engine.utils")
        context = utils.get_mp_context
        utils.get_mp_context = lambda: context().get_context("spawn")
        try:
            one = utils.CoreEngineProcManager(
                **arguments
                | {
                    "vllm_config": copy.deepcopy(arguments["vllm_config"]),
                    "local_engine_count": 1,
                    "start_index": arguments["start_index"] + at,
                    "local_start_index": arguments["local_start_index"] + at,
                    "handshake_address": address,
                    "client_handshake_address": None,
                }
            )
        finally:
            utils.get_mp_context = context
        one._finalizer.detach()  # the process belongs to the first manager
        return one.processes[0]

    def _shake_hands(self, handshake: zmq.Socket[bytes], process: Any, utils: Any) -> None:
        """Answers what an engine says at its start, as vLLM's launcher does.

        Raises:
            RuntimeError: the process ended, or the server ends.
        """
        poller = zmq.Poller()
        poller.register(handshake, zmq.POLLIN)
        poller.register(process.sentinel, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(POLL_MS))
            if self._manager.manager_stopped.is_set():
                raise RuntimeError("the server ends")
            if handshake in ready:
                identity, message = handshake.recv_multipart()
                status = msgspec.msgpack.decode(message)["status"]
                if status == "READY":
                    return
                answer = utils.EngineHandshakeMetadata(addresses=self._addresses, parallel_config={})
                handshake.send_multipart((identity, msgspec.msgpack.encode(answer)))
            elif process.sentinel in ready:
                process.join()
                raise RuntimeError(f"its process (pid {process.pid}) ended with exit status {process.exitcode}")
