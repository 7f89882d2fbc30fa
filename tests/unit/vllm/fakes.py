"""A small vLLM: one engine core of each kind and one client of each kind, with the names that the plugin hooks.

The fakes keep what the plugin relies on: which method calls which, in which order, and what each leaves behind.
They have no model, no sockets between client and core, and no threads.
The fixture `vllm` takes hooks off the classes after each test.
"""

from __future__ import annotations

import enum
import queue
from collections import deque
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import zmq

from dpshm.net.context import context

Outputs = tuple[dict[int, SimpleNamespace] | None, bool]
"""What a step gives: outputs by client, None if a batch was queued; and whether the model ran."""
LATE = "late interaction"
"""The `pooling_params` of a request whose engine vLLM derives from its query."""


class RequestType(enum.Enum):
    """``EngineCoreRequestType``."""

    ADD = b"\x00"
    ABORT = b"\x01"
    WAKEUP = b"\x05"


class Request:
    """``EngineCoreRequest`` and the scheduler's ``Request`` in one."""

    def __init__(
        self,
        request_id: str,
        prompt: int = 4,
        max_tokens: int = 2,
        *,
        rank: int | None = None,
        pooling: object = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids: list[int] | None = list(range(prompt))
        self.num_prompt_tokens = prompt
        self.num_computed_tokens = 0
        self.max_tokens = max_tokens
        self.made = 0
        self.data_parallel_rank = rank
        self.pooling_params = pooling
        self.client_index = 0
        self.current_wave = 0
        self.ended = False

    def is_finished(self) -> bool:
        """Whether it finished or was aborted."""
        return self.ended


class Scheduler:
    """Computes prompts in chunks, gives each request a token a step, and tells one step later who finished."""

    chunk = 64

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.untold: set[str] = set()
        self.kv_cache_usage = 0.25
        self.paused = False

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting)."""
        return len(self.running), len(self.waiting)

    def get_kv_cache_usage(self) -> float:
        """The fraction in use."""
        return self.kv_cache_usage

    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    def has_requests(self) -> bool:
        """The same, or there is still something to tell."""
        return bool(self.requests or self.untold)

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def end(self, request_id: str) -> None:
        """A request finished, or was aborted."""
        request = self.requests.pop(request_id)
        request.ended = True
        for part in (self.waiting, self.running):
            if request in part:
                part.remove(request)
        self.untold.add(request_id)

    def step(self) -> Outputs:
        """One step: (outputs by client, whether the model ran)."""
        if not self.requests:
            self.untold.clear()
            return {}, False
        self.running += self.waiting
        self.waiting.clear()
        outputs: dict[int, SimpleNamespace] = {}
        for request in list(self.running):
            left = request.num_prompt_tokens - request.num_computed_tokens
            request.num_computed_tokens += min(left, self.chunk) if left > 0 else 1
            if left > self.chunk:
                continue
            request.made += 1
            done = request.made == request.max_tokens
            of_client = outputs.setdefault(request.client_index, SimpleNamespace(outputs=[]))
            of_client.outputs.append(SimpleNamespace(new_token_ids=[7], finish_reason="length" if done else None))
            if done:
                self.end(request.request_id)
        return outputs, True


def _count_tokens(token_ids: list[int] | None, embeds: list[float] | None) -> int:
    if token_ids is None and embeds is None:
        raise ValueError("no prompt")
    return len(token_ids or embeds or ())


class EngineCoreProc:
    """A rank that is on its own (dense)."""

    def __init__(
        self,
        stats_address: str | None,
        engine_index: int = 0,
        inputs: Iterable[str] = (),
        queued_batches: bool = False,
    ) -> None:
        self.frontend_stats_publish_address = stats_address
        self.engine_index = engine_index
        self.addresses = SimpleNamespace(inputs=list(inputs))
        self.scheduler = Scheduler()
        self.input_queue: queue.Queue[tuple[RequestType, Any]] = queue.Queue()
        self.batch_queue: deque[Any] | None = deque() if queued_batches else None
        self.step_fn = self.step_with_batch_queue if queued_batches else self.scheduler.step
        self.engines_running = False
        self.last_counts = (0, 0)
        self.reported: list[tuple[int, int]] = []
        self.answered: list[object] = []
        self.dummy_batches = 0
        self.body: Callable[[], Any] = self.turn

    def run_busy_loop(self) -> Any:
        """The test's `body` stands for the loop."""
        return self.body()

    def turn(self) -> None:
        """The loop once round, without waiting for work."""
        self._process_input_queue()
        if self.has_work():
            self._maybe_publish_request_counts()
            self._process_engine_step()
            self._maybe_publish_request_counts()

    def has_work(self) -> bool:
        """Whether to step."""
        return self.engines_running or self.scheduler.has_requests() or bool(self.batch_queue)

    def is_scheduler_paused(self) -> bool:
        """Whether the user paused this rank."""
        return self.scheduler.paused

    def step_with_batch_queue(self) -> Outputs:
        """Queues a batch in one call, and gives its outputs in the next."""
        if self.batch_queue:
            return self.batch_queue.pop(), False
        outputs, executed = self.scheduler.step()
        if not executed:
            return outputs, False
        assert self.batch_queue is not None
        self.batch_queue.append(outputs)
        return None, True

    def execute_dummy_batch(self) -> None:
        """A step without requests, to keep step with the others."""
        self.dummy_batches += 1

    def _maybe_publish_request_counts(self) -> None:
        counts = self.scheduler.get_request_counts()
        if counts != self.last_counts:
            self.last_counts = counts
            self.reported.append(counts)

    def _process_input_queue(self) -> None:
        while not self.input_queue.empty():
            self._handle_client_request(*self.input_queue.get_nowait())

    def _process_engine_step(self) -> bool:
        return self.step_fn()[1]

    def _handle_client_request(self, request_type: RequestType, request: Any) -> None:
        if request_type is RequestType.ADD:
            self.add_request(*request)
        elif request_type is RequestType.ABORT:
            for request_id in request:
                self.scheduler.end(request_id)

    def add_request(self, request: Request, wave: int) -> None:
        """Queues a request."""
        self.scheduler.add(request)

    def _handle_request_preproc_error(self, request: Request) -> None:
        self.answered.append(request.request_id)

    def _handle_mm_cache_miss(self, request: Request, err: object) -> None:
        self.answered.append((request.request_id, err))


class DPEngineCoreProc(EngineCoreProc):
    """A rank in lockstep: it has waves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.current_wave = 0

    def run_busy_loop(self) -> Any:
        """As above; a method of its own, since the plugin hooks both."""
        return self.body()

    def turn(self) -> None:
        """The loop once round: steps with the others, and ends the wave when there is nothing left."""
        self._process_input_queue()
        if not self.has_work():
            return
        if not self._process_engine_step():
            self.execute_dummy_batch()
        self._maybe_publish_request_counts()
        self.engines_running = self.scheduler.has_unfinished_requests()
        if not self.engines_running:
            self.current_wave += 1

    def add_request(self, request: Request, wave: int) -> None:
        """A request of a later wave moves this rank there."""
        super().add_request(request, wave)
        self.current_wave = max(self.current_wave, wave)


class DPAsyncMPClient:
    """A client with one engine."""

    def __init__(self, stats_address: str | None, ranks: Iterable[int] = (0, 1), client_index: int = 0) -> None:
        self.stats_update_address = stats_address
        self.client_index = client_index
        self.engine_ranks_managed = list(ranks)
        self.core_engines = [rank.to_bytes(2, "little") for rank in ranks]
        self.input_socket = context().socket(zmq.ROUTER)
        self.input_socket.bind("tcp://127.0.0.1:*")
        self.current_wave, self.engines_running = 0, False
        self.listening = False
        self.sent: list[tuple[str, bytes, int]] = []
        self.first_requests: list[bytes] = []
        self.on_send: Callable[[], object] | None = None

    @property
    def address(self) -> str:
        """Where engines connect."""
        endpoint = self.input_socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.decode()

    def close(self) -> None:
        """Ends the socket."""
        self.input_socket.close()

    def _ensure_stats_update_task(self) -> None:
        self.listening = True

    async def add_request_async(self, request: Request) -> None:
        """Stamps, chooses, sends; tells the coordinator if the ranks were paused."""
        self._ensure_stats_update_task()
        request.current_wave = self.current_wave
        request.client_index = self.client_index
        engine = self.get_core_engine_for_request(request)
        if not self.engines_running:
            self.first_requests.append(engine)
        if self.on_send is not None:
            self.on_send()
        self.sent.append((request.request_id, engine, request.current_wave))

    def get_core_engine_for_request(self, request: Request) -> bytes:
        """The only one."""
        return self.core_engines[0]


class DPLBAsyncMPClient(DPAsyncMPClient):
    """A client that chooses; this one always takes the last engine, and keeps its own record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reqs_in_flight: dict[str, bytes] = {}

    def get_core_engine_for_request(self, request: Request) -> bytes:
        """The session's engine, the one asked for, or the last."""
        engine = self.reqs_in_flight.get(request.request_id)
        if engine is None:
            at = request.data_parallel_rank
            if at is None:
                at = late_interaction_engine(request.pooling_params, len(self.core_engines))
            engine = self.core_engines[-1 if at is None else at]
            self.reqs_in_flight[request.request_id] = engine
        return engine

    @staticmethod
    async def process_engine_outputs(client: DPLBAsyncMPClient, outputs: Any) -> None:
        """Finished requests leave the record."""
        for request_id in outputs.finished_requests or ():
            client.reqs_in_flight.pop(request_id, None)


def late_interaction_engine(pooling_params: object, engines: int) -> int | None:
    """The engine of a late-interaction query: the last but one."""
    return engines - 2 if pooling_params == LATE else None


HOOKED_CLASSES = (EngineCoreProc, DPEngineCoreProc, DPAsyncMPClient, DPLBAsyncMPClient)


class DPCoordinator:
    """vLLM's own."""

    def __init__(
        self, parallel_config: object, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        self.parallel_config = parallel_config


class Vllm:
    """The modules of a vLLM of some release.

    Attributes:
        modules: by name, as `sys.modules` has them.
        core: the module of engine cores.
        client: the module of clients.
        utils: the module with the coordinator's name.
    """

    def __init__(self, version: str = "0.32.0") -> None:
        self.modules: dict[str, ModuleType] = {}
        self._module("vllm", __version__=version)
        self._module("vllm.envs")
        self._module("vllm.utils", length_from_prompt_token_ids_or_embeds=_count_tokens)
        self._module("vllm.v1.engine", EngineCoreRequestType=RequestType)
        self._module("vllm.v1.core.sched.scheduler", Scheduler=Scheduler)
        self.core = self._module(
            "vllm.v1.engine.core", EngineCoreProc=EngineCoreProc, DPEngineCoreProc=DPEngineCoreProc
        )
        self.client = self._module(
            "vllm.v1.engine.core_client",
            DPAsyncMPClient=DPAsyncMPClient,
            DPLBAsyncMPClient=DPLBAsyncMPClient,
            get_late_interaction_engine_index=late_interaction_engine,
        )
        self.utils = self._module("vllm.v1.engine.utils", DPCoordinator=DPCoordinator)

    def _module(self, name: str, **names: object) -> ModuleType:
        module = self.modules[name] = ModuleType(name)
        vars(module).update(names)
        return module
