"""The two wave machines against each other: messages late, lost, doubled and out of order; ranks and coordinator
restarted; pauses by the user. Whatever happened, once losses stop, all work is done and the group comes to rest.

The tick is the real one (`dpshm.rules.reconciler.WaveReconciler`), in simulated time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpshm.board.words import pack_control, pack_state, unpack_control, unpack_state
from dpshm.rules.reconciler import RowState, WaveReconciler
from dpshm.rules.waves import (
    MAX_WAVE,
    AllIdle,
    AllPaused,
    Attached,
    CoordinatorEvent,
    CoordinatorState,
    EngineEvent,
    EngineState,
    FirstRequest,
    Phase,
    PublishState,
    RankConnected,
    RanksIdle,
    RanksSplit,
    RequestArrived,
    Resumed,
    SeenRunning,
    SendWaveCompleted,
    SendWaveStarted,
    StartReceived,
    StartWave,
    WakeTimer,
    WaveCompleted,
    WaveStarted,
    handle_coordinator,
    handle_engine,
)

deterministic = settings(deadline=None, derandomize=True, max_examples=300)
WAVES = st.integers(0, 6)
RANKS = st.integers(0, 3)
COORDINATOR_EVENTS = st.one_of(
    st.builds(FirstRequest, st.none() | RANKS, WAVES),
    st.builds(WaveCompleted, WAVES),
    st.builds(WaveStarted, RANKS, WAVES),
    st.builds(SeenRunning, RANKS, WAVES),
    st.just(RankConnected()),
    st.builds(WakeTimer, st.booleans()),
    st.builds(RanksSplit, WAVES),
    st.builds(RanksIdle, WAVES),
)
LATER_ENGINE_EVENTS = st.one_of(
    st.builds(RequestArrived, WAVES),
    st.builds(StartReceived, WAVES, st.none() | RANKS),
    st.builds(AllIdle),
    st.builds(AllPaused),
    st.builds(Resumed, st.booleans()),
)


@deterministic
@given(events=st.lists(COORDINATOR_EVENTS, max_size=30), named=st.booleans())
def test_the_coordinators_wave_never_falls(events: list[CoordinatorEvent], named: bool):
    """Guards against a stale message that turns the wave back, and against an event that counts twice."""
    state = CoordinatorState()
    for event in events:
        after, commands = handle_coordinator(state, event, exclude_named=named)
        assert after.wave >= state.wave
        assert handle_coordinator(after, event, exclude_named=named)[0] == after
        assert all(c.wave == after.wave for c in commands if isinstance(c, StartWave))
        heard = (after.wave, after.phase is Phase.RUNNING) != (state.wave, state.phase is Phase.RUNNING)
        assert PublishState() in commands or not heard
        state = after


@deterministic
@given(events=st.lists(LATER_ENGINE_EVENTS, max_size=30), dp_rank=RANKS, wave=WAVES)
def test_an_engines_wave_never_falls(events: list[EngineEvent], dp_rank: int, wave: int):
    """Guards against an engine that goes back to a wave that is over, and against an event that counts twice."""
    state, _ = handle_engine(EngineState(9), Attached(wave), dp_rank)
    assert state == EngineState(wave)
    for event in events:
        after, commands = handle_engine(state, event, dp_rank)
        assert after.wave >= state.wave
        assert not (after.running and after.paused)
        assert handle_engine(after, event, dp_rank)[0] == after
        assert all(c.wave in (state.wave, after.wave) for c in commands)
        state = after


class Group:
    """A coordinator, its engines, and everything that is in flight between them.

    Args:
        dp_size: number of engines.
        named: the coordinator leaves the engine that a first request names out of its START.
        repeat_start: it sends START again when the first engine confirms a wake-up.
        without: kinds of events, or of engines' commands, that never get through: what a mutant lacks.
        wave: where all begin.
    """

    def __init__(
        self,
        dp_size: int,
        *,
        named: bool = False,
        repeat_start: bool = False,
        without: Iterable[type] = (),
        wave: int = 0,
    ) -> None:
        self.named = named
        self.repeat_start = repeat_start
        self.without = tuple(without)
        self.now = 0
        self.state = CoordinatorState(wave)
        self.heard = self.state  # what a front-end knows that hears publications instead of reading the board
        self.watch = WaveReconciler(200, 1000)
        self.engines = [EngineState(wave) for _ in range(dp_size)]
        self.work = [0] * dp_size  # steps to do
        self.asked = [False] * dp_size  # by the user, to pause
        self.result: list[Callable[[int], None] | None] = [None] * dp_size  # of a collective, not yet looked at
        self.to_coordinator: list[CoordinatorEvent] = []
        self.to_engines: list[tuple[int, StartReceived]] = []
        self.requests: list[tuple[int, int]] = []  # (rank, stamp)
        self.published: list[CoordinatorState] = []
        self.commands = 0

    # The machines.

    def coordinate(self, event: CoordinatorEvent) -> None:
        """The coordinator takes an event."""
        if isinstance(event, self.without):
            return
        self.state, commands = handle_coordinator(
            self.state, event, exclude_named=self.named, repeat_start=self.repeat_start
        )
        self.state = CoordinatorState(*unpack_control(pack_control(*self.state)))  # the board's
        self.commands += len(commands)
        for command in commands:
            if isinstance(command, StartWave):
                start = StartReceived(command.wave, command.exclude)
                self.to_engines += [(i, start) for i in range(len(self.engines))]
            elif isinstance(command, PublishState):
                self.published.append(self.state)

    def tell(self, i: int, event: EngineEvent) -> None:
        """An engine takes an event."""
        self.engines[i], commands = handle_engine(self.engines[i], event, i)
        self.commands += len(commands)
        for command in commands:
            if isinstance(command, self.without):
                continue
            if isinstance(command, SendWaveStarted):
                self.to_coordinator.append(WaveStarted(i, min(command.wave, MAX_WAVE)))
            elif isinstance(command, SendWaveCompleted):
                self.to_coordinator.append(WaveCompleted(min(command.wave, MAX_WAVE - 1)))

    # What may happen; `k` picks one of several.

    def request(self, k: int) -> None:
        """A front-end sends a request."""
        i = k % len(self.engines)
        wave, phase = self.state if k & 4 else self.heard
        self.requests.append((i, wave))
        if phase is Phase.PAUSED:
            self.to_coordinator.append(FirstRequest(i, wave))

    def arrive(self, k: int) -> None:
        """A request reaches its engine, unless that waits in a collective."""
        at = k % len(self.requests)
        i, stamp = self.requests[at]
        if self.result[i] is None:
            del self.requests[at]
            self.work[i] += 1 + k % 2
            self.tell(i, RequestArrived(stamp))

    def refuse(self, k: int) -> None:
        """A request is refused before the engine's scheduler hears of it."""
        del self.requests[k % len(self.requests)]

    def hear(self, k: int, *, again: bool = False) -> None:
        """A message reaches the coordinator."""
        at = k % len(self.to_coordinator)
        event = self.to_coordinator[at] if again else self.to_coordinator.pop(at)
        self.coordinate(event)

    def start(self, k: int, *, again: bool = False) -> None:
        """A START reaches an engine, unless that waits in a collective."""
        at = k % len(self.to_engines)
        i, event = self.to_engines[at]
        if self.result[i] is None:
            if not again:
                del self.to_engines[at]
            self.tell(i, event)

    def lose(self, k: int) -> None:
        """One of the messages that may be lost is lost."""
        for messages in (self.to_coordinator, self.to_engines, self.published)[k % 3 :]:
            if messages:
                del messages[k % len(messages)]
                return

    def publication(self, k: int) -> None:
        """A front-end hears a publication; they come in order."""
        self.heard = self.published.pop(0)

    def reduce(self, k: int) -> None:
        """All ranks are in the collective, and it ends; each looks at the result when it comes to it."""
        together = all(e.running for e in self.engines)
        asleep = not any(e.running for e in self.engines)
        if any(self.result) or not (together or (asleep and all(self.asked))):
            return
        if all(self.asked):
            self.result = [self._pause] * len(self.engines)
        elif any(self.work) or any(self.asked):
            self.result = [self._step] * len(self.engines)
        else:
            self.result = [self._idle] * len(self.engines)

    def _pause(self, i: int) -> None:
        self.asked[i] = False
        self.tell(i, AllPaused())

    def _step(self, i: int) -> None:
        self.work[i] = max(0, self.work[i] - 1)

    def _idle(self, i: int) -> None:
        self.tell(i, AllIdle())

    def look_at_result(self, k: int) -> None:
        """A rank takes the result of its collective."""
        i = k % len(self.engines)
        act, self.result[i] = self.result[i], None
        if act is not None:
            act(i)

    def ask_to_pause(self, k: int) -> None:
        """The user asks one rank to pause; the others will be asked, or not."""
        self.asked[k % len(self.engines)] = not self.engines[k % len(self.engines)].paused

    def resume(self, k: int) -> None:
        """The user resumes all ranks, past a barrier over them."""
        if any(e.paused for e in self.engines) and not any(self.result):
            self.asked = [False] * len(self.engines)
            event = Resumed(any(self.work))
            self.result = [lambda i: self.tell(i, event)] * len(self.engines)

    def restart_engine(self, k: int) -> None:
        """An engine dies and comes back; its requests die with it."""
        i = k % len(self.engines)
        self.work[i], self.asked[i], self.result[i] = 0, False, None
        self.tell(i, Attached(self.state.wave))

    def restart_coordinator(self, k: int) -> None:
        """A new coordinator takes the board over; what was in flight to the old one is lost."""
        self.watch = WaveReconciler(200, 1000)
        self.to_coordinator.clear()

    def tick(self, k: int) -> None:
        """100 ms pass, and the coordinator looks at the rows."""
        self.now += 100
        words = [pack_state(e.wave, int(e.running)) for e in self.engines]
        rows = [RowState(i, *unpack_state(word)[:2]) for i, word in enumerate(words)]
        for event in self.watch.events(self.now, self.state, rows):
            self.coordinate(event)

    def happens(self, what: str, k: int) -> None:
        """One of the above, where it can."""
        needs = {"arrive": self.requests, "refuse": self.requests, "publication": self.published}
        needs |= dict.fromkeys(("hear", "hear again"), self.to_coordinator)
        needs |= dict.fromkeys(("start", "start again"), self.to_engines)
        if needs.get(what, True):
            method, _, again = what.partition(" ")
            getattr(self, method)(k, **({"again": True} if again else {}))

    # The end.

    def one_round(self) -> None:
        """All messages in flight arrive, every rank that can step steps, and 100 ms pass."""
        for _ in range(len(self.to_coordinator)):
            self.hear(0)
        for _ in range(len(self.published)):
            self.publication(0)
        for _ in range(len(self.to_engines)):
            self.start(0)
        for _ in range(len(self.requests)):
            self.arrive(0)
        self.resume(0)
        self.reduce(0)
        for i in range(len(self.engines)):
            self.look_at_result(i)
        self.tick(0)

    def at_rest(self) -> bool:
        """Whether no work is left, and every rank and the coordinator know it."""
        messages = self.to_coordinator or self.to_engines or self.requests or self.published
        engines = any(e.running or e.paused for e in self.engines)
        highest = min(max(e.wave for e in self.engines), MAX_WAVE)
        return not (messages or engines or any(self.work)) and (
            self.state.phase is Phase.PAUSED and self.state.wave >= highest
        )

    def comes_to_rest(self) -> bool:
        """Whether, from now on without losses, all work is done and the group then stays at rest."""
        self.asked = [False] * len(self.engines)
        for _ in range(200):
            self.one_round()
            if self.at_rest():
                break
        commands, state = self.commands, self.state
        for _ in range(20):
            self.one_round()
        return self.at_rest() and (self.commands, self.state) == (commands, state)


FAIR = ("request", "arrive", "hear", "start", "publication", "reduce", "look_at_result", "look_at_result", "tick")
UNFAIR = ("lose", "hear again", "start again", "refuse")
RARE = ("ask_to_pause", "resume", "restart_engine", "restart_coordinator")
STEPS = st.lists(st.tuples(st.sampled_from([*FAIR, *UNFAIR, *RARE]), st.integers(0, 23)), max_size=80)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(dp_size=st.integers(1, 4), steps=STEPS, named=st.booleans())
@example(dp_size=3, steps=[("request", 4), ("lose", 0), ("arrive", 0), ("lose", 0)], named=False)
def test_all_work_is_done_and_the_group_comes_to_rest(dp_size: int, steps: list[tuple[str, int]], named: bool):
    """Guards against a rank that sleeps on a request, one that runs alone, and a wave that never ends."""
    group = Group(dp_size, named=named, repeat_start=named)
    for what, k in steps:
        before = group.state.wave
        group.happens(what, k)
        assert group.state.wave >= before
    assert group.comes_to_rest(), (group.state, group.engines, group.work)


def search(tries: int, without: Iterable[type], *, losses: bool = True) -> Group | None:
    """A group that random events have brought into a state from which it does not come to rest."""
    rng = random.Random(0)
    kinds = [*FAIR * 3, *(UNFAIR * 2 + RARE if losses else ())]
    for _ in range(tries):
        group = Group(rng.randint(2, 4), without=without)
        for _ in range(rng.randint(10, 80)):
            group.happens(rng.choice(kinds), rng.randrange(24))
        if not group.comes_to_rest():
            return group
    return None


TICK = (SeenRunning, WakeTimer, RanksSplit, RanksIdle)


def test_a_long_random_search_finds_nothing():
    """Guards against a stuck state that the shorter lists of the property above do not reach."""
    assert search(1500, ()) is None


def test_the_last_wave_goes_on():
    """Guards against a group that no request can wake any more: one bad message is enough to bring it to the end.

    A wave that does not fit its word saturates on the board; the machines have to agree with the board there.
    """
    group = Group(3, wave=MAX_WAVE - 2)
    for i in range(12):
        group.request(i % 3)
        assert group.comes_to_rest(), (i, group.state, group.engines, group.work)


def test_without_losses_no_tick_is_needed():
    """Guards against rules that lean on the tick where messages would do: each wake-up would be 200 ms late."""
    assert search(300, TICK, losses=False) is None


def test_what_the_board_shows_is_enough():
    """Guards against rules that believe in messages: with none from engines or front-ends, the rows must do."""
    assert search(300, (FirstRequest, SendWaveStarted, SendWaveCompleted)) is None


def test_an_engine_that_wakes_has_to_say_so():
    """Guards against leaving an engine's own message out because front-ends send theirs: they may not know."""
    assert search(1500, (SendWaveStarted, *TICK), losses=False) is not None


@pytest.mark.parametrize(
    "without",
    [TICK, (RanksSplit,), (RanksIdle,), (WakeTimer,)],
    ids=lambda kinds: "+".join(k.__name__ for k in kinds),
)
def test_what_a_mutant_lacks_is_missed(without: tuple[type, ...]):
    """Guards against a simulation that cannot fail: without these rules it must find a group that is stuck."""
    assert search(1500, without) is not None
