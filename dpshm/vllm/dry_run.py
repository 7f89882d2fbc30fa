"""A dry run of the hooks on the classes of the vLLM of this process, before any of them is put in.

A name with the right parameters may still do something else than the hooks rely on. So each hook runs once on an
object of the release's own class, made without its constructor: it has the few attributes that the hooks touch,
and every other attribute is blank. The methods are the release's, and the requests too. There is no board, no
socket, no thread and no model. A check that fails raises, and its message says what the release does instead.

    Scheduler.get_request_counts           (running, waiting), in this order
    DPEngineCoreProc                       the engine's link counts a request that comes out of the input queue,
                                           times the step, and leaves the object as it was
    DPLBAsyncMPClient                      the API server's link chooses, and vLLM notes and sends to that engine
                                           without a notice of its own; finished requests leave vLLM's record
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from http import HTTPStatus
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import msgspec

from dpshm.board.words import pack_control
from dpshm.errors import DpshmError
from dpshm.rules.waves import Phase
from dpshm.vllm.board_link import BoardLink
from dpshm.vllm.engine_link import EngineLink
from dpshm.vllm.options import Options

WAVE = 7
CHOSEN = 1
"""The rank that the dry run's board chooses; vLLM's own choice would be rank 0."""


class DryRunFailed(DpshmError):
    """The release does something else than the hooks rely on."""


class Blank:
    """Stands for whatever a release reads beside what the hooks touch: false, empty, and callable."""

    def __call__(self, *_: Any, **__: Any) -> Blank:
        return self

    def __getattr__(self, name: str) -> Blank:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Blank:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def dry_run() -> None:
    """Runs each hook once.

    Raises:
        DryRunFailed: the release does something else than a hook relies on.
        Exception: whatever the release's code raised.
    """
    _counts()
    _engine()
    _client()


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DryRunFailed(f"{what} is {found!r}, and dpshm expects {expected!r}")


def _blank(kind: type, **attributes: Any) -> Any:
    """An object of a class made below `kind`, without its constructor."""

    def missing(_: Any, name: str) -> Blank:
        if name.startswith("__"):
            raise AttributeError(name)
        return Blank()

    made: Any = object.__new__(type(kind.__name__, (kind,), {"__getattr__": missing, "__del__": lambda _: None}))
    vars(made).update(attributes)
    return made


def _request() -> Any:
    """A request as an API server sends it; fields that it must have and the hooks do not touch are None."""
    kind = import_module("vllm.v1.engine").EngineCoreRequest
    needed = {f.name: None for f in msgspec.structs.fields(kind) if f.required}
    parameters = import_module("vllm").SamplingParams(max_tokens=1)
    known = {"request_id": "dry run", "prompt_token_ids": [5, 6, 7], "sampling_params": parameters}
    return kind(**needed | known | {"arrival_time": 0.0})


def _counts() -> None:
    scheduler = _blank(import_module("vllm.v1.core.sched.scheduler").Scheduler, running=[0, 0], waiting=[0])
    _expect("Scheduler.get_request_counts() with 2 running and 1 waiting", scheduler.get_request_counts(), (2, 1))


class _Timer(Blank):
    """A row's timer that counts the steps that begin."""

    begun = 0

    def __enter__(self) -> Blank:
        self.begun += 1
        return self


class _Row:
    """An engine's row that keeps what is written to it."""

    def __init__(self) -> None:
        self.received: list[tuple[int | None, int]] = []
        self.published: list[tuple[int, int]] = []
        self.timer = _Timer()
        header = SimpleNamespace(waves=False)  # so no doorbell
        self.board = SimpleNamespace(
            segment=SimpleNamespace(header=header), frontend_incarnation=[], frontends_used=lambda: 0
        )
        self.board.frontend_incarnation = SimpleNamespace(sum=lambda: 0)

    def show(self, *_: Any, **__: Any) -> None:
        """Drops what the waves are in."""

    def publish(self, *, waiting: int, running: int, **_: Any) -> None:
        """Keeps a load."""
        self.published.append((waiting, running))

    def count_received(self, frontend: int | None, tokens: int) -> None:
        """Keeps a receipt."""
        self.received.append((frontend, tokens))

    def finished(self, _: int) -> None:
        """Drops a count."""

    def step(self, **_: Any) -> Any:
        """The timer of all steps."""
        return self.timer

    def close(self) -> None:
        """Has nothing to give up."""


class _Scheduler(Blank):
    """A scheduler that queues."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []

    def add_request(self, request: Any) -> None:
        """Queues a request."""
        self.requests[request.request_id] = request

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting)."""
        return 0, len(self.requests)

    def has_requests(self) -> bool:
        """Whether there is any."""
        return bool(self.requests)

    has_unfinished_requests = has_requests

    def get_kv_cache_usage(self) -> float:
        """None is in use."""
        return 0.0


def _engine() -> None:
    engine, engine_core = import_module("vllm.v1.engine"), import_module("vllm.v1.engine.core")
    request = import_module("vllm.v1.request").Request.from_engine_core_request(_request(), None)
    scheduler, row = _Scheduler(), _Row()
    stepped: list[int] = []

    def step() -> tuple[dict[int, Any], bool]:
        stepped.append(1)
        return {}, True

    core = _blank(
        engine_core.DPEngineCoreProc,
        scheduler=scheduler,
        addresses=SimpleNamespace(inputs=[]),
        input_queue=queue.Queue(),
        output_queue=queue.Queue(),
        batch_queue=None,
        step_fn=step,
        engine_index=0,
        has_coordinator=True,
        engines_running=False,
        current_wave=0,
        process_input_queue_block=False,
        is_running=lambda: True,
        shutdown_state=getattr(getattr(engine_core, "EngineShutdownState", None), "RUNNING", Blank()),
        is_scheduler_paused=lambda: False,
        post_step=lambda _: None,
    )
    link = EngineLink(core, row)  # type: ignore[arg-type]
    try:
        core.input_queue.put((engine.EngineCoreRequestType.ADD, (request, WAVE)))
        core._process_input_queue()
        _expect("what was counted of a request in the input queue", row.received, [(None, 3)])
        _expect("the load after it", row.published[-1], (1, 0))
        _expect("the wave after it", core.current_wave, WAVE)
        core._process_engine_step()
        _expect(
            "the number of steps that _process_engine_step made, and that were timed",
            (len(stepped), row.timer.begun),
            (1, 1),
        )
    finally:
        failed = link._row is None
        link.close()
    _expect("whether the engine's link gave up", failed, False)


class _Board:
    """A front-end's handle that chooses one rank."""

    def __init__(self) -> None:
        segment = SimpleNamespace(header=SimpleNamespace(waves=True))
        self.board = SimpleNamespace(words=[pack_control(WAVE, Phase.PAUSED)], index=lambda _: 0, segment=segment)
        self.ended: list[str] = []

    def route(self, *_: Any, **__: Any) -> Any:
        """Chooses."""
        ended = self.ended
        return SimpleNamespace(
            dp_rank=CHOSEN,
            wave=WAVE,
            done=lambda _: ended.append("done"),
            cancel=lambda: ended.append("cancelled"),
        )

    def heard_from(self, _: int) -> None:
        """Has no coordinator to tell."""

    def expect_no_prompts(self) -> None:
        """Says nothing of prompts."""

    def wake(self, **_: Any) -> None:
        """Wakes no rank."""

    def close(self) -> None:
        """Has nothing to leave."""


async def _nothing(*_: Any, **__: Any) -> None:
    """Does nothing, at once."""


def _client() -> None:
    core_client = import_module("vllm.v1.engine.core_client")
    sent: list[tuple[Any, Any, int]] = []
    listened: list[int] = []
    told: list[Any] = []

    def send(kind: Any, request: Any, engine: Any = None) -> Any:
        sent.append((kind, engine, request.current_wave))
        return _nothing()

    async def tell(*args: Any) -> None:
        told.append(args)

    engines = [rank.to_bytes(2, "little") for rank in range(2)]
    client = _blank(
        core_client.DPLBAsyncMPClient,
        core_engines=engines,
        engine_ranks_managed=[0, 1],
        lb_engines=[[0, 0, 0.0], [9, 9, 0.9]],
        reqs_in_flight={},
        engine_inflight=Counter(),
        streaming_reqs=set(),
        eng_start_index=0,
        client_count=1,
        client_index=0,
        current_wave=0,
        engines_running=False,
        input_socket=SimpleNamespace(getsockopt=lambda _: b"dry run"),
        first_req_send_socket=SimpleNamespace(send=tell),
        _send_input=send,
        _ensure_output_queue_task=lambda: None,
        _ensure_stats_update_task=lambda: listened.append(1),
    )
    board = _Board()
    link = BoardLink(client, "dry run", Options(), attach=lambda *_, **__: board)
    try:
        _expect("what dp_engines_running says", client.dp_engines_running(), False)
        request = _request()
        _finish(client.add_request_async(request))
        _expect("where a request is sent", [(e, w) for _, e, w in sent], [(engines[CHOSEN], WAVE)])
        _expect("what vLLM notes of it", client.reqs_in_flight, {request.request_id: engines[CHOSEN]})
        _expect("the notices of a first request", told, [])
        _expect("whether a client listens before its first request", bool(listened), True)
        outputs = SimpleNamespace(finished_requests={request.request_id}, outputs=[], utility_output=None)
        _finish(core_client.DPLBAsyncMPClient.process_engine_outputs(client, outputs))
        _expect("what vLLM notes of a request that finished", client.reqs_in_flight, {})
        link.finished(outputs.finished_requests)
        _expect("what became of the booking", board.ended, ["done"])
    finally:
        link.close()


def _finish(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Runs a coroutine that waits for nothing, without an event loop."""
    with suppress(StopIteration):
        coroutine.send(None)
        coroutine.close()
        raise DryRunFailed(f"{coroutine!r} waits for something else than its send")


def dry_run_of_deaths() -> None:
    """Runs what an API server does with the request of a rank that died.

    Raises:
        DryRunFailed: the release does something else than `dpshm.vllm.away` relies on.
        Exception: whatever the release's code raised.
    """
    output_processor = import_module("vllm.v1.engine.output_processor")
    kind = import_module("vllm.sampling_params").RequestOutputKind.DELTA
    error = import_module("vllm.exceptions").GracefulHTTPError("dry run", HTTPStatus.SERVICE_UNAVAILABLE)
    _expect("the status of a GracefulHTTPError", int(error.http_status), int(HTTPStatus.SERVICE_UNAVAILABLE))
    queue = output_processor.RequestOutputCollector(kind, "dry run")
    queue.put(error)
    try:
        queue.get_nowait()
    except type(error) as e:
        _expect("what a request that failed raises", e, error)
    else:
        raise DryRunFailed("a request that failed raises nothing")
