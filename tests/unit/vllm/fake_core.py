"""Fakes of vLLM's requests, scheduler and engine cores, and a way to run a body as the busy loop.

The fakes keep what the plugin relies on: which method calls which, in which order, and what each leaves behind.
They have no model, no sockets between client and core, and no threads.
"""

from __future__ import annotations

import enum
import queue
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import msgspec

from dpshm import Board
from dpshm.vllm.engine_core import busy_loop
from tests.unit.vllm.fake_cache import BlockPool, FullAttentionManager, kv_cache_manager

Outputs = tuple[dict[int, SimpleNamespace] | None, bool]
"""What a step gives: outputs by client, None if a batch was queued; and whether the model ran."""
INPUTS = ("tcp://127.0.0.1:1111", "tcp://127.0.0.1:2222")
"""The addresses at which cores get the requests of API servers 0 and 1."""
HOOKED = ("_process_input_queue", "_handle_client_request", "_process_engine_step", "execute_dummy_batch")
"""The methods that the plugin hides in every core."""


class RequestType(enum.Enum):
    """``EngineCoreRequestType``."""

    ADD = b"\x00"
    ABORT = b"\x01"
    START_DP_WAVE = b"\x02"
    WAKEUP = b"\x05"


class EventType(enum.IntEnum):
    """``EngineCoreEventType``."""

    QUEUED = 1
    SCHEDULED = 2
    PREEMPTED = 3


class Status(enum.IntEnum):
    """``RequestStatus``."""

    WAITING = 1
    RUNNING = 2
    FINISHED = 3


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
        tokens: list[int] | None = None,
        session_id: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids: list[int] | None = list(range(prompt)) if tokens is None else tokens
        self.num_prompt_tokens = prompt if tokens is None else len(tokens)
        self.prefill_stats: SimpleNamespace | None = SimpleNamespace(num_cached_tokens=0)
        self.sampling_params: object = None
        self.mm_features: list[object] | None = None
        self.lora_request: object = None
        self.cache_salt: str | None = None
        self.session_id = session_id
        self.num_computed_tokens = 0
        self.max_tokens = max_tokens
        self.made = 0
        self.data_parallel_rank = rank
        self.pooling_params = pooling
        self.client_index = 0
        self.current_wave = 0
        self.status = Status.WAITING

    def is_finished(self) -> bool:
        """Whether it finished or was aborted."""
        return self.status is Status.FINISHED

    @classmethod
    def from_engine_core_request(cls, sent: SentRequest, _block_hasher: object) -> Request:
        """The scheduler's request of one that was sent."""
        return cls(sent.request_id, len(sent.prompt_token_ids or ()))


class SentRequest(msgspec.Struct):
    """``EngineCoreRequest`` as it is sent: what the plugin's self-check makes of it."""

    request_id: str
    prompt_token_ids: list[int] | None
    sampling_params: object
    arrival_time: float
    priority: int
    client_index: int = 0
    current_wave: int = 0
    data_parallel_rank: int | None = None
    pooling_params: object = None


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
        self.kv_cache_manager = kv_cache_manager(BlockPool(enable_caching=False))

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

    @property
    def cache(self) -> FullAttentionManager | None:
        """The prefix cache, if there is one."""
        if not self.kv_cache_manager.block_pool.enable_caching:
            return None
        manager: FullAttentionManager = self.kv_cache_manager.coordinator.single_type_managers[0]
        return manager

    def add_request(self, request: Request) -> None:
        """Queues a request."""
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def end(self, request_id: str) -> None:
        """A request finished, or was aborted."""
        request = self.requests.pop(request_id)
        request.status = Status.FINISHED
        if self.cache is not None:
            self.cache.end(request_id)
        for part in (self.waiting, self.running):
            if request in part:
                part.remove(request)
        self.untold.add(request_id)

    def schedule(self) -> None:
        """Takes in what waits, finds what is cached of it, and gives blocks to prompts that end in this step."""
        for request in self.waiting:
            if self.cache is not None:
                request.num_computed_tokens = hit = self.cache.hit(request)
                assert request.prefill_stats is not None
                request.prefill_stats.num_cached_tokens = hit
            request.status = Status.RUNNING
        self.running += self.waiting
        self.waiting.clear()
        for request in self.running:
            left = request.num_prompt_tokens - request.num_computed_tokens
            if self.cache is not None and not request.made and left <= self.chunk:
                self.cache.computed(request)

    def step(self) -> Outputs:
        """One step: (outputs by client, whether the model ran)."""
        if not self.requests:
            self.untold.clear()
            return {}, False
        self.schedule()
        outputs: dict[int, SimpleNamespace] = {}
        for request in list(self.running):
            left = request.num_prompt_tokens - request.num_computed_tokens
            request.num_computed_tokens += min(left, self.chunk) if left > 0 else 1
            if left > self.chunk:
                continue
            request.made += 1
            done = request.made == request.max_tokens
            of_client = outputs.setdefault(request.client_index, SimpleNamespace(outputs=[]))
            of_client.outputs.append(
                SimpleNamespace(new_token_ids=[7], finish_reason="length" if done else None, events=None)
            )
            if done:
                self.end(request.request_id)
        return outputs, True


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
        self.scheduler.add_request(request)

    def _handle_request_preproc_error(self, request: Request) -> None:
        self.answered.append(request.request_id)

    def _handle_request_validation_error(self, request: Request, error: object) -> None:
        self.answered.append((request.request_id, error))

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

    def _handle_client_request(self, request_type: RequestType, request: Any) -> None:
        if request_type is not RequestType.START_DP_WAVE:
            super()._handle_client_request(request_type, request)
        elif not self.scheduler.paused and request[0] >= self.current_wave:
            self.current_wave, self.engines_running = request[0], True


def run(core: EngineCoreProc, body: Callable[[], Any]) -> Any:
    """Runs `body()` where vLLM runs the busy loop of that core."""
    core.body = body
    return busy_loop(type(core).run_busy_loop)(core)


def send(core: EngineCoreProc, request: Request, client_index: int = 1, wave: int = 0) -> None:
    """Puts a request into the core's input queue, as its input thread does."""
    request.client_index = client_index
    core.input_queue.put((RequestType.ADD, (request, wave)))


def hooked(core: EngineCoreProc) -> list[str]:
    """Which methods of the core are hidden."""
    return [name for name in HOOKED if name in vars(core)]


def failing(scheduler: Scheduler) -> None:
    """Makes the next publish after a step fail, as a release with another scheduler would."""
    scheduler.get_kv_cache_usage = lambda: 1 / 0  # type: ignore[method-assign]


def row(board: Board, rank: int = 0) -> Any:
    """A row of the board by column names."""
    return board.snapshot()[rank]


def counters(board: Board, *names: str) -> tuple[int, ...]:
    """Some figures of rank 0's row."""
    return tuple(int(row(board)[name]) for name in names)
