"""The rules of the waves with one row lost or spoilt. They show that the exploration can fail, and why each row is
there.

Each mutant names the bounds in which it is explored and what the exploration says about it. Two kinds of bounds
tell two things: without faults and ticks, what messages are needed for; with them, what the ticks are needed
for. Rows whose loss does no harm in any bounds are in `SPARE`: they save time.

    python -m tests.property.mutants                  # all of them, and what becomes of each: a few minutes
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from dpshm.rules.waves import (
    AllIdle,
    AllPaused,
    CoordinatorState,
    EngineState,
    FirstRequest,
    Phase,
    RankConnected,
    RanksIdle,
    RanksSplit,
    RequestArrived,
    Resumed,
    SeenRunning,
    StartReceived,
    WakeTimer,
    WaveCompleted,
    WaveStarted,
    handle_coordinator,
    handle_engine,
)
from tests.property.exploration import ABSENCE, CHANGES, MESSAGES, REPLACED, describe, explore, result
from tests.property.group_parts import Bounds, Rules

WAITS = "waits in a collective"
FALLS = "the wave falls"
GOES_ON = "a rank paused by the user goes on"
RUNNING_FOR_EVER = "the phase stays RUNNING"
WAKING_FOR_EVER = "the phase stays WAKING"
BEHIND = "the coordinator's wave stays behind"
ROUND = "it goes round"

FAULTS = Bounds(messages=1)
NAMED = MESSAGES._replace(exclude_named=True, repeat_start=True)
PAUSES = FAULTS._replace(pauses=True)
STOCK = REPLACED._replace(stock=True, repeat_start=True)
JOINING = CHANGES._replace(restarts=False, repeat_start=True)


class Mutant(NamedTuple):
    """Rules that lack something.

    Attributes:
        name: what they lack, or do wrong.
        bounds: where that shows, or does not.
        check: words of what the exploration says; None: nothing.
        rules: the rules.
    """

    name: str
    bounds: Bounds
    check: str | None
    rules: Rules


def coordinator_without(row: Callable[[CoordinatorState, Any], bool]) -> Rules:
    """Rules whose coordinator does nothing where `row` is true."""

    def coordinator(state: CoordinatorState, event: Any, **options: bool) -> Any:
        return (state, []) if row(state, event) else handle_coordinator(state, event, **options)

    return Rules(coordinator=coordinator)


def engine_without(row: Callable[[EngineState, Any], bool]) -> Rules:
    """Rules whose engines do nothing where `row` is true."""

    def engine(state: EngineState, event: Any, dp_rank: int) -> Any:
        return (state, []) if row(state, event) else handle_engine(state, event, dp_rank)

    return Rules(engine=engine)


def silent_engine(row: Callable[[EngineState, Any], bool]) -> Rules:
    """Rules whose engines send nothing where `row` is true."""

    def engine(state: EngineState, event: Any, dp_rank: int) -> Any:
        after, commands = handle_engine(state, event, dp_rank)
        return after, [] if row(state, event) else commands

    return Rules(engine=engine)


def set_back_by_message(state: CoordinatorState, event: Any, **options: bool) -> Any:
    """A coordinator that believes the newest message rather than the highest wave."""
    if isinstance(event, WaveStarted) and event.wave < state.wave:
        return CoordinatorState(event.wave, Phase.RUNNING), []
    return handle_coordinator(state, event, **options)


def set_back_by_start(state: EngineState, event: Any, dp_rank: int) -> Any:
    """An engine that takes a START of an old wave."""
    if isinstance(event, StartReceived) and not state.paused and event.wave < state.wave:
        return EngineState(event.wave, running=True), []
    return handle_engine(state, event, dp_rank)


def set_back_by_stamp(state: EngineState, event: Any, dp_rank: int) -> Any:
    """An engine that takes the wave of a request's stamp, be it old."""
    after, commands = handle_engine(state, event, dp_rank)
    return (after._replace(wave=event.wave), commands) if isinstance(event, RequestArrived) else (after, commands)


def woken_while_paused(state: EngineState, event: Any, dp_rank: int) -> Any:
    """An engine that START wakes although the user paused it."""
    return handle_engine(
        state._replace(paused=False) if isinstance(event, StartReceived) else state, event, dp_rank
    )


def run_while_paused(state: EngineState, event: Any, dp_rank: int) -> Any:
    """An engine that a request wakes although the user paused it."""
    return handle_engine(
        state._replace(paused=False) if isinstance(event, RequestArrived) else state, event, dp_rank
    )


def deaf_to_stamps(state: EngineState, event: Any, dp_rank: int) -> Any:
    """An engine that stays in its own wave, whatever a request is stamped with."""
    if isinstance(event, RequestArrived):
        event = RequestArrived(state.wave)
    return handle_engine(state, event, dp_rank)


def is_a(*kinds: type) -> Callable[[Any, Any], bool]:
    """Whether the event is of one of these kinds."""
    return lambda _, event: isinstance(event, kinds)


def compared(kind: type[Any], how: int, *phases: Phase) -> Callable[[CoordinatorState, Any], bool]:
    """Whether the event is of that kind, its wave over (1), at (0) or under (-1) the coordinator's."""

    def row(state: CoordinatorState, event: Any) -> bool:
        return (
            isinstance(event, kind)
            and (event.wave > state.wave) - (event.wave < state.wave) == how
            and (not phases or state.phase in phases)
        )

    return row


NO_REQUEST_WAKES = silent_engine(is_a(RequestArrived))
NO_FIRST_REQUEST = coordinator_without(is_a(FirstRequest))
NO_WAVE_COMPLETED = silent_engine(is_a(AllIdle))
NO_CONFIRMATION = silent_engine(is_a(StartReceived))
NO_SEEN_RUNNING = coordinator_without(is_a(SeenRunning))
NO_TICK = coordinator_without(is_a(SeenRunning, WakeTimer, RanksSplit, RanksIdle))
NO_CATCHING_UP = engine_without(lambda state, event: isinstance(event, StartReceived) and state.running)

OLD_CONTROL = Rules(rows_tell=False)

CAUGHT = [
    Mutant("an engine that a request wakes says nothing", MESSAGES, WAITS, NO_REQUEST_WAKES),
    Mutant("an engine's WaveStarted is not heard", MESSAGES, WAITS, coordinator_without(is_a(WaveStarted))),
    Mutant(
        "WaveStarted in the coordinator's wave, paused",
        MESSAGES,
        WAITS,
        coordinator_without(compared(WaveStarted, 0, Phase.PAUSED)),
    ),
    Mutant("WaveStarted in a later wave", MESSAGES, WAITS, coordinator_without(compared(WaveStarted, 1))),
    Mutant("rank 0 does not tell of the end of a wave", MESSAGES, RUNNING_FOR_EVER, NO_WAVE_COMPLETED),
    Mutant(
        "no WaveCompleted in the coordinator's wave",
        MESSAGES,
        RUNNING_FOR_EVER,
        coordinator_without(compared(WaveCompleted, 0)),
    ),
    Mutant("a first request excludes the engine that it names", NAMED, WAITS, Rules()),
    Mutant(
        "START does not wake an idle engine",
        MESSAGES,
        WAITS,
        engine_without(lambda state, event: isinstance(event, StartReceived) and not state.running),
    ),
    Mutant("no tick", FAULTS, WAITS, NO_TICK),
    Mutant("no RanksSplit", FAULTS, WAITS, coordinator_without(is_a(RanksSplit))),
    Mutant("no RanksIdle", FAULTS, RUNNING_FOR_EVER, coordinator_without(is_a(RanksIdle))),
    Mutant(
        "no RanksIdle in a later wave, not running",
        FAULTS,
        BEHIND,
        coordinator_without(lambda state, event: isinstance(event, RanksIdle) and state.phase < Phase.RUNNING),
    ),
    Mutant("no WakeTimer", FAULTS, WAKING_FOR_EVER, coordinator_without(is_a(WakeTimer))),
    Mutant(
        "a wake-up is never given up",
        PAUSES,
        WAKING_FOR_EVER,
        coordinator_without(lambda _, event: isinstance(event, WakeTimer) and event.expired),
    ),
    Mutant("START wakes an engine that the user paused", PAUSES, GOES_ON, Rules(engine=woken_while_paused)),
    Mutant("a request wakes an engine that the user paused", PAUSES, GOES_ON, Rules(engine=run_while_paused)),
    Mutant("the newest message sets the wave, back too", MESSAGES, FALLS, Rules(coordinator=set_back_by_message)),
    Mutant("START of an old wave is taken", MESSAGES, FALLS, Rules(engine=set_back_by_start)),
    Mutant("an old stamp is taken", MESSAGES, FALLS, Rules(engine=set_back_by_stamp)),
    Mutant("a running engine does not take the wave of START", JOINING, ROUND, NO_CATCHING_UP),
    Mutant("ranks that connect hear no START", STOCK, WAITS, coordinator_without(is_a(RankConnected))),
    Mutant("front-ends believe the control word of a coordinator that is away", ABSENCE, WAITS, OLD_CONTROL),
    Mutant("no rank that a request wakes rings, and so", ABSENCE, WAITS, OLD_CONTROL._replace(rings=False)),
]
"""Rules whose loss does harm."""

SPARE = [
    Mutant("a rank that a request wakes rings no other", ABSENCE, None, Rules(rings=False)),
    Mutant("the stamp of a request", CHANGES, None, Rules(engine=deaf_to_stamps)),
    Mutant("rank 0's confirmation of START", CHANGES, None, NO_CONFIRMATION),
    Mutant("the front-ends' first requests", FAULTS, None, NO_FIRST_REQUEST),
    Mutant("SeenRunning", FAULTS, None, NO_SEEN_RUNNING),
    Mutant("an engine's own WaveStarted, given ticks", FAULTS, None, NO_REQUEST_WAKES),
    Mutant("rank 0's WaveCompleted, given ticks", FAULTS, None, NO_WAVE_COMPLETED),
    Mutant(
        "a wake-up is repeated before it is given up",
        PAUSES,
        None,
        coordinator_without(lambda _, event: isinstance(event, WakeTimer) and not event.expired),
    ),
    Mutant("engines that a resume wakes say so, given ticks", PAUSES, None, silent_engine(is_a(Resumed))),
    Mutant(
        "rank 0 tells of the end of a wave by a pause, given ticks", PAUSES, None, silent_engine(is_a(AllPaused))
    ),
]
"""Rules whose loss does no harm but costs time: another row, or the next tick, does what they do."""


def main() -> int:
    """Explores each mutant; 1 if one is not caught that should be, or one that should do no harm does."""
    wrong = 0
    for mutant in (*CAUGHT, *SPARE):
        outcome = explore(mutant.bounds, mutant.rules)
        said = outcome.found.check if outcome.found else None
        fine = said is None if mutant.check is None else said is not None and mutant.check in said
        wrong += not fine
        print(f"{'' if fine else 'WRONG: '}{mutant.name} ({describe(mutant.bounds)})", flush=True)
        print(f"  {result(outcome)}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
