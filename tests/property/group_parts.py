"""What a group is made of (`tests.property.group_model`): bounds, ranks, numbers for them, and what is noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from dpshm.rules.waves import (
    AllIdle,
    AllPaused,
    CoordinatorEvent,
    CoordinatorState,
    EngineEvent,
    EngineState,
    FirstRequest,
    Phase,
    RequestArrived,
    Resumed,
    StartReceived,
    WaveCompleted,
    WaveStarted,
    handle_coordinator,
    handle_engine,
)

BASE = 1000  # the coordinator's wave when the rules are asked: far from both ends
OUT, IN, DONE = range(3)
NOTHING, IDLE, PAUSE, RESUME, RESUME_TO_WORK = range(5)
RESULTS: tuple[EngineEvent | None, ...] = (None, AllIdle(), AllPaused(), Resumed(False), Resumed(True))

World = tuple[int, ...]
Move = tuple[str, World]


class Violation(Exception):
    """A rule did what it must never do; the message says what."""


class Bounds(NamedTuple):
    """How far the exploration goes.

    Attributes:
        engines: ranks; with `scaling` at most so many.
        frontends: requests that are open at once, in flight or in a queue.
        waves: different waves that a rank may be in, as seen from the coordinator: itself and so many less one
            in either direction.
        messages: START in flight to a rank at once, and messages from a rank.
        faults: messages are lost and doubled, ticks come at any time.
        ticks: the coordinator looks at the rows.
        restarts: ranks die and come back.
        pauses: the user pauses ranks, some or all, and resumes them.
        scaling: ranks are added and taken away.
        exclude_named: the coordinator's setting.
        repeat_start: as `handle_coordinator` is told.
        patient: there is a step between two agreements, and START is faster than a step; see the module.
        stock: ranks but 0 are stock engines: their rows show no wave.
        replaced: the coordinator is replaced: what was in flight is lost, and ranks connect again one by one.
        absence: the coordinator stops for any time, or for ever. What is sent to it waits.
    """

    engines: int = 2
    frontends: int = 1
    waves: int = 2
    messages: int = 3
    faults: bool = True
    ticks: bool = True
    restarts: bool = False
    pauses: bool = False
    scaling: bool = False
    exclude_named: bool = False
    repeat_start: bool = False
    patient: bool = False
    stock: bool = False
    replaced: bool = False
    absence: bool = False


class Rules(NamedTuple):
    """The rules to explore: the real ones, or a mutant of them.

    Attributes:
        coordinator: as `handle_coordinator`.
        engine: as `handle_engine`.
        rings: a rank that a request wakes rings the others.
        rows_tell: front-ends without a coordinator ring for the wave of the rows, and not of the control word.
    """

    coordinator: Callable[..., Any] = handle_coordinator
    engine: Callable[..., Any] = handle_engine
    rings: bool = True
    rows_tell: bool = True


class Head(NamedTuple):
    """What is not a rank's.

    Attributes:
        phase: the coordinator's.
        result: of the newest collective, while a rank has not looked at it.
        rang: an unanswered wake-up was repeated; it is given up next.
        kept: the user will not resume the ranks.
        stepped: ranks that are left alone have made a step since they last agreed.
        away: the coordinator is stopped.
        lasting: and does not go on.
    """

    phase: int
    result: int = NOTHING
    rang: bool = False
    kept: bool = False
    stepped: bool = False
    away: bool = False
    lasting: bool = False


class Rank(NamedTuple):
    """One rank, and what is in flight from and to it. Waves are counted from the coordinator's."""

    leads: bool  # it is rank 0
    wave: int = 0
    running: bool = False
    paused: bool = False
    place: int = OUT
    asked: bool = False  # by the user, to pause
    work: int = 0  # steps that its requests need
    requests: tuple[int, ...] = ()  # to it: their stamps
    starts: tuple[int, ...] = ()  # to it: START
    started: tuple[int, ...] = ()  # from it: WaveStarted
    completed: tuple[int, ...] = ()  # from it: WaveCompleted
    first: tuple[int, ...] = ()  # FirstRequest that names it (any, if the name makes no difference)
    connected: bool = True


T = TypeVar("T")


class Numbers(Generic[T]):
    """Numbers things from 0 on, equal ones alike; `simplify` is applied first."""

    def __init__(self, simplify: Callable[[T], T] = lambda item: item) -> None:
        self._items: list[T] = []
        self._at: dict[T, int] = {}
        self._simplify = simplify

    def of(self, item: T) -> int:
        """The item's number."""
        number = self._at.get(item)
        if number is None:
            simple = self._simplify(item)
            number = self._at.setdefault(simple, len(self._items))
            if number == len(self._items):
                self._items.append(simple)
            self._at[item] = number
        return number

    def __getitem__(self, number: int) -> T:
        return self._items[number]


class Part(NamedTuple):
    """What of a rank matters to a collective."""

    place: int
    running: bool
    paused: bool
    asked: bool
    work: bool


class Facts(NamedTuple):
    """What is asked of a rank again and again."""

    part: Part
    row: tuple[int, bool]
    open: int
    inside: bool
    connected: bool
    shows: bool


def facts_of(rank: Rank, bounds: Bounds) -> Facts:
    """The facts of a rank."""
    in_flight = max(len(rank.starts), len(rank.started) + len(rank.completed))
    return Facts(
        part=Part(rank.place, rank.running, rank.paused, rank.asked, rank.work > 0),
        row=(rank.wave, rank.running),
        open=len(rank.requests) + rank.work,
        connected=rank.connected,
        shows=rank.leads or not bounds.stock,
        inside=-bounds.waves < rank.wave < bounds.waves and in_flight <= bounds.messages,
    )


class Noise:
    """Which old messages change nothing, whatever state they come upon: asked of the rules."""

    def __init__(self, rules: Rules, bounds: Bounds) -> None:
        states = [EngineState(BASE, r, p) for r in (False, True) for p in (False, True) if not (r and p)]
        coordinators = [CoordinatorState(BASE, phase) for phase in Phase]
        old = BASE - 1
        self._start = all(
            rules.engine(s, StartReceived(old, None), rank) == (s, []) for s in states for rank in (0, 1)
        )
        self._stamp = all(
            rules.engine(s, RequestArrived(old), rank) == rules.engine(s, RequestArrived(BASE), rank)
            for s in states
            for rank in (0, 1)
        )
        self._started = all(rules.coordinator(s, WaveStarted(1, old)) == (s, []) for s in coordinators)
        self._completed = all(rules.coordinator(s, WaveCompleted(old)) == (s, []) for s in coordinators)
        again = bounds.repeat_start
        self._first = all(
            rules.coordinator(s, FirstRequest(1, old), repeat_start=again) == (s, []) for s in coordinators
        )

    def without(self, rank: Rank) -> Rank:
        """The rank without it; what is left of old messages is one wave old."""
        oldest = rank.wave - (0 if self._stamp else 1)
        return rank._replace(
            requests=tuple(sorted(max(stamp, oldest) for stamp in rank.requests)),
            starts=_newer(rank.starts, rank.wave, self._start),
            started=_newer(rank.started, 0, self._started),
            completed=_newer(rank.completed, 0, self._completed),
            first=_newer(rank.first, 0, self._first),
        )


def _newer(waves: tuple[int, ...], wave: int, old_is_noise: bool) -> tuple[int, ...]:
    if not waves:
        return waves
    if old_is_noise:
        return tuple(sorted({w for w in waves if w >= wave}))
    return tuple(sorted({max(w, wave - 1) for w in waves}))


def less(items: tuple[int, ...], at: int) -> tuple[int, ...]:
    """The items but one."""
    return items[:at] + items[at + 1 :]


def ordered(ids: list[int]) -> list[int]:
    """Ranks, those that are interchangeable in order."""
    return [ids[0], *sorted(ids[1:])] if len(ids) > 2 else ids


def with_rank(world: World, at: int, new: int) -> World:
    """The world with another rank at that place."""
    if at and len(world) > 3:
        ids = [*world[2 : at + 1], new, *world[at + 2 :]]
        ids.sort()
        return (*world[:2], *ids)
    return (*world[: at + 1], new, *world[at + 2 :])


def name_of(event: CoordinatorEvent) -> str:
    """An event in words."""
    wave = getattr(event, "wave", None)
    return f"{type(event).__name__}({wave - BASE if wave is not None else getattr(event, 'expired', '')})"


def describe_rank(at: int, rank: Rank) -> str:
    """A rank in words."""
    state = "paused" if rank.paused else "runs" if rank.running else "idle"
    place = ("", ", waits in the collective", ", has not looked at the result")[rank.place]
    rest = {
        "asked to pause": rank.asked,
        "work": rank.work,
        "requests": rank.requests,
        "START": rank.starts,
        "WaveStarted": rank.started,
        "WaveCompleted": rank.completed,
        "FirstRequest": rank.first,
        "not connected": not rank.connected,
    }
    more = "".join(f", {name} {value}" for name, value in rest.items() if value)
    return f"rank {at} {state} in wave {rank.wave:+d}{place}{more}"
