"""What an engine writes to its row: hooks on one engine core, run by the thread that owns its scheduler.

    _process_input_queue              publishes before the loop waits for work, and before a step if something came
                                      or the wave changed since the last step
    _process_engine_step              publishes after each step
    _handle_client_request            counts a request from the input queue as received from its API server, and
                                      publishes the queue that it entered; a request that wakes the rank up wakes
                                      the others too (`dpshm.vllm.bells`)
    _handle_request_preproc_error,    the input thread refuses a request: the hook notes it there and wakes the
    _handle_request_validation_error, busy loop, which counts it
    _handle_mm_cache_miss
    _maybe_publish_request_counts     sends nothing: the row replaces the message to the coordinator
    step_fn, execute_dummy_batch      mark the step as begun, time it, count its tokens

The prefix cache is mirrored in the rank's index (`dpshm.vllm.prefix_cache`).

The wave stays vLLM's own, with its rules and its messages. The row shows the state of those rules.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from dpshm.engine.remote import CarriedRow
from dpshm.engine.row import EngineRow
from dpshm.engine.step import StepTimer
from dpshm.vllm.backlog import PrefillBacklog
from dpshm.vllm.bells import Bells
from dpshm.vllm.instance import InstanceHooks
from dpshm.vllm.log import logger
from dpshm.vllm.prefix_cache import PrefixCache
from dpshm.vllm.received import Received

ALONE = "_dpshm_alone"
"""The attribute of a core that has a row, and no waves: it may die without the others."""
SHOW_CACHE_EVERY = 8
"""Steps between two looks of a busy engine at how full its cache and its index are. People read that, and no
decision; an engine that is idle or was told something looks at once."""
REFUSALS = ("_handle_request_preproc_error", "_handle_request_validation_error", "_handle_mm_cache_miss")
"""The methods with which vLLM's input thread refuses a request; older ones lack the second (up to
0.32) or the third."""


class EngineLink:
    """One engine and its row.

    The hook on a refusal runs in the input thread and `_hear` also in that of the bells; all other methods in the
    busy loop's.
    """

    def __init__(self, core: Any, row: EngineRow) -> None:
        self._core = core
        self._row: EngineRow | None = row
        self._scheduler = core.scheduler
        self._backlog = PrefillBacklog(import_module("vllm.v1.request").RequestStatus.RUNNING)
        self._received = Received(core, row)
        self._prefix = PrefixCache.open(row, core.scheduler, core.engine_index)
        self._expected = self._cached_tokens = self._held_tokens = 0
        self._steps = 0
        self._timer = row.step()  # the same object for all steps
        self._step: StepTimer | None = None
        self._counts: tuple[int, int] | None = None  # (running, waiting) after a step, until a message comes
        self._is_changed = False  # a message was handled since the last publish
        self._is_more_changed = True  # a step was made since, or a message handled that does more than add
        self._usage = 0.0  # of the KV cache, as published
        self._lockstep = hasattr(core, "current_wave")
        self._shown_wave: tuple[int, bool] = 0, False
        self._shown_state: tuple[int, bool, bool] = -1, False, False  # wave, running, paused; none yet
        engine = import_module("vllm.v1.engine")
        types, self._preempted = engine.EngineCoreRequestType, engine.EngineCoreEventType.PREEMPTED
        self._add, self._start_wave = types.ADD, types.START_DP_WAVE
        self._hooks = InstanceHooks(core)
        self._bells: Bells | None = None
        self._publish()
        if not isinstance(row, CarriedRow) and row.board.segment.header.waves and self._lockstep:
            self._bells = Bells(row.board, row.dp_rank, self._hear)
        try:
            self._hook()
        except BaseException:
            self._hooks.remove()
            self._close_bells()
            raise

    def close(self) -> None:
        """Takes the hooks off and gives the row up."""
        row, self._row = self._row, None
        try:
            self._hooks.remove()
            self._core.step_fn = self._stock_step_fn
            self._close_bells()
            if self._prefix is not None:
                self._prefix.close()
        finally:
            if row is not None:
                row.close()

    def _close_bells(self) -> None:
        bells, self._bells = self._bells, None
        if bells is not None:
            bells.close()

    # The hooks. Each calls the method that it hides exactly once, also when code of dpshm raises.

    def _hook(self) -> None:
        core, put = self._core, self._hooks.put
        process_input_queue, process_engine_step = core._process_input_queue, core._process_engine_step
        step_fn, execute_dummy_batch = core.step_fn, core.execute_dummy_batch

        def _process_input_queue() -> Any:
            if not core.has_work():
                self._safely(self._publish)
            result = process_input_queue()
            if self._is_changed or self._wave() != self._shown_wave:
                self._safely(self._publish)
            return result

        def _process_engine_step() -> Any:
            result = process_engine_step()
            self._is_more_changed = True
            self._safely(self._publish)
            return result

        def step() -> Any:
            return self._timed(step_fn, dummy=False)

        def dummy_batch() -> Any:
            return self._timed(execute_dummy_batch, dummy=True)

        put("_process_input_queue", _process_input_queue)
        put("_handle_client_request", self._handling(core._handle_client_request))
        put("_process_engine_step", _process_engine_step)
        if hasattr(core, "_maybe_publish_request_counts"):  # in lockstep ranks; after 0.24 in all
            put("_maybe_publish_request_counts", lambda: None)
        put("execute_dummy_batch", dummy_batch)
        for name in REFUSALS:
            if hasattr(core, name):
                put(name, self._refusing(getattr(core, name)))
        # `step_fn` is an attribute of the instance already, not a method: `close` stores the old value again.
        self._stock_step_fn = step_fn
        core.step_fn = step

    def _handling(self, stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(request_type: Any, request: Any) -> Any:
            asleep = self._bells is not None and self._is_asleep()
            is_added = request_type == self._add
            if is_added:
                self._safely(self._count_received, request[0])
            result = stock(request_type, request)
            self._is_changed, self._counts = True, None
            self._is_more_changed = self._is_more_changed or not is_added
            self._safely(self._handled, request_type, request, asleep)
            return result

        return handle

    def _refusing(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(request: Any, *args: Any, **kwargs: Any) -> Any:
            # Noted before the answer is sent: an API server expects that a request which is over was counted.
            self._received.note_refused(request)
            return stock(request, *args, **kwargs)

        return refuse

    def _safely(self, function: Callable[..., None], *args: Any) -> None:
        """Runs code of dpshm while the link has its row; if the code raises, logs that and gives the row up."""
        if self._row is None:
            return
        try:
            function(*args)
        except Exception:
            logger.warning(
                "dpshm: engine %d gives its row up and reports to the coordinator from now on",
                self._core.engine_index,
                exc_info=True,
            )
            self._give_up()

    def _give_up(self) -> None:
        core = self._core
        vars(core)[ALONE] = False
        try:
            self.close()
        except Exception:
            logger.debug("dpshm: the row could not be closed", exc_info=True)
        if hasattr(core, "_maybe_publish_request_counts"):
            core.last_counts = None  # report now, also unchanged counts: without a report no rank is chosen
            core._maybe_publish_request_counts()

    # What is published.

    def _publish(self) -> None:
        row, core, scheduler = self._row, self._core, self._scheduler
        assert row is not None
        if self._received.refused:
            self._received.count_refused()
        if self._step is not None and not core.has_work():
            self._forget_step()  # its requests were aborted
        if self._counts is None:
            running, waiting = scheduler.get_request_counts()
            if not self._backlog.is_current(running, waiting):
                self._backlog.update(scheduler.running, waiting, scheduler.requests.values())
        else:
            running, waiting = self._counts
        wave, self._is_changed = self._wave(), False
        # A request that only came into the queue holds no blocks, and changes no state but that of an idle rank.
        if self._is_more_changed or wave != self._shown_wave or not self._shown_state[1]:
            self._is_more_changed, self._shown_wave = False, wave
            self._show_state(row, *wave, running)
            self._usage = scheduler.get_kv_cache_usage()
            if self._prefix is not None:
                self._show_cache(self._prefix, running)
        row.publish(
            waiting=waiting,
            running=running,
            kv_cache_usage=self._usage,
            prefill_backlog=max(0, self._backlog.tokens),
            step=self._steps,
        )

    def _wave(self) -> tuple[int, bool]:
        """What the busy loop changes beside its steps and messages: the wave, and whether it runs."""
        core = self._core
        return core.current_wave if self._lockstep else 0, core.engines_running

    def _show_state(self, row: EngineRow, wave: int, steps: bool, running: int) -> None:
        # Not `has_work`: that is also true while the engine has only to tell which requests finished. It is in the
        # next wave by then, and would wake all ranks for nothing.
        paused = self._core.is_scheduler_paused()
        is_running = bool(steps or (running and not paused) or self._scheduler.has_unfinished_requests())
        if (state := (wave, is_running, paused)) != self._shown_state:
            self._shown_state = state
            row.show(wave, running=is_running, paused=paused)

    def _show_cache(self, prefix: PrefixCache, running: int) -> None:
        if (cached := self._backlog.cached) != self._cached_tokens:
            prefix.cache.found(cached - self._cached_tokens)
            self._cached_tokens = cached
        if not running or self._counts is None or self._steps % SHOW_CACHE_EVERY == 1:
            prefix.show()

    def _count_received(self, added: Any) -> None:
        self._expected = self._received.count(added.client_index, added.request_id, added.num_prompt_tokens)

    def _handled(self, request_type: Any, request: Any, was_asleep: bool) -> None:
        core = self._core
        if request_type == self._add and (added := request[0]).request_id in self._scheduler.requests:
            self._backlog.add(added, self._expected)
            if was_asleep and self._bells is not None and not core.is_scheduler_paused():
                self._bells.ring(core.current_wave)
        elif not core.has_work():
            self._publish()  # the loop goes on waiting, and no other hook would publish

    def _is_asleep(self) -> bool:
        """Whether this rank neither steps nor has a request that will make it step."""
        return not (self._core.engines_running or self._scheduler.has_unfinished_requests())

    def _hear(self, wave: int) -> None:
        """Another rank of this node woke up in a wave: START, as the coordinator would send it."""
        self._core.input_queue.put_nowait((self._start_wave, (wave, None)))

    # Steps.

    def _timed(self, stock: Callable[[], Any], *, dummy: bool) -> Any:
        if not (dummy or self._scheduler.requests or self._core.batch_queue):
            return stock()  # it only tells which requests finished, or has nothing to do
        self._safely(self._begin_step)
        result = stock()
        self._safely(self._end_step, None if dummy else result)
        return result

    def _begin_step(self) -> None:
        if self._step is None:
            step = self._step = self._timer
            step.prefill_tokens, step.batch, step.held_tokens = 0, 0, self._held_tokens
            step.__enter__()

    def _end_step(self, result: Any) -> None:
        """Counts a step; `result` is the result of ``step_fn``, None after a dummy batch."""
        assert self._row is not None
        assert self._step is not None
        tokens, told = 0, []
        for of_client in (result[0] or {}).values() if result is not None else ():
            outputs = of_client.outputs
            tokens += sum([len(output.new_token_ids) for output in outputs])
            told += [output for output in outputs if output.finish_reason is not None or output.events]
        if told:
            self._count_told(told)
        scheduler = self._scheduler
        counts = scheduler.get_request_counts()
        prefilled = self._backlog.update(scheduler.running, counts[1], scheduler.requests.values())
        self._counts = counts if result is not None else None
        self._held_tokens = sum([request.num_computed_tokens for request in scheduler.running])
        if result is not None and not tokens and not prefilled:
            if not self._core.batch_queue:
                self._forget_step()  # it only told which requests had finished
            return  # with a queued batch the step goes on until its outputs are here
        step, self._step = self._step, None
        step.batch, step.prefill_tokens, step.held_tokens = tokens, prefilled, self._held_tokens
        step.__exit__(None, None, None)
        self._steps += 1

    def _count_told(self, outputs: list[Any]) -> None:
        """Counts the requests that finished or lost their place; events come only while vLLM logs its stats."""
        assert self._row is not None
        finished = preempted = 0
        for output in outputs:
            finished += output.finish_reason is not None
            for event in output.events or ():
                preempted += event.type is self._preempted
        if finished:
            self._row.finished(finished)
        if preempted:
            self._row.preempted(preempted)

    def _forget_step(self) -> None:
        if self._step is not None:
            self._step.forget()
            self._step = None
