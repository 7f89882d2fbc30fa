"""One rank of a group (`tests.property.group_model`): its own moves, and the events that concern it alone.

Ranks are numbers here. Equal ranks with equal messages in flight have the same number, so the moves of a rank are
computed once and then looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from dpshm.rules.waves import (
    Attached,
    CoordinatorEvent,
    EngineEvent,
    EngineState,
    FirstRequest,
    RequestArrived,
    Resumed,
    SendWaveStarted,
    StartReceived,
    WaveCompleted,
    WaveStarted,
)
from tests.property.group_parts import (
    BASE,
    DONE,
    IN,
    OUT,
    PAUSE,
    RESULTS,
    Bounds,
    Facts,
    Noise,
    Numbers,
    Rank,
    Rules,
    Violation,
    facts_of,
    less,
    name_of,
)


def _with_lists(rank: Rank, lists: Mapping[str, tuple[int, ...]]) -> Rank:
    """A rank with other messages in some of its lists, by the name of the list."""
    return Rank(**{**rank._asdict(), **lists})


class Ranks:
    """The ranks of a group, by number."""

    def __init__(self, bounds: Bounds, rules: Rules) -> None:
        self.bounds = bounds
        self.rules = rules
        self._ranks: Numbers[Rank] = Numbers(Noise(rules, bounds).without)
        self._events: Numbers[tuple[type, CoordinatorEvent]] = Numbers()
        self._facts: list[Facts] = []
        for name in ("_shifted", "_told", "_own_moves", "_mail", "_new_requests", "_named", "_with_start"):
            setattr(self, name, lru_cache(None, typed=True)(getattr(self, name)))
        for name in ("_revived", "_looked", "_stepped", "_set_done"):
            setattr(self, name, lru_cache(None, typed=True)(getattr(self, name)))

    def _rank(self, rank: Rank) -> int:
        number = self._ranks.of(rank)
        if number == len(self._facts):
            rank = self._ranks[number]
            self._facts.append(facts_of(rank, self.bounds))
        return number

    def _event(self, event: CoordinatorEvent) -> int:
        return self._events.of((type(event), event))  # a tuple equals any other of the same items

    def _looked(self, i: int, result: int) -> int:
        event = RESULTS[result]
        assert event is not None
        rank = self._ranks[self._told(i, event)]
        return self._rank(rank._replace(place=OUT, asked=rank.asked and result != PAUSE))

    def _stepped(self, i: int) -> int:
        rank = self._ranks[i]
        return self._rank(rank._replace(place=OUT, work=max(0, rank.work - 1)))

    def _set_done(self, i: int) -> int:
        return self._rank(self._ranks[i]._replace(place=DONE))

    def _told(self, i: int, event: EngineEvent) -> int:
        """The rank takes an event; what it sends is in flight."""
        rank = self._ranks[i]
        before = EngineState(BASE + rank.wave, rank.running, rank.paused)
        after, commands = self.rules.engine(before, event, 0 if rank.leads else 1)
        if after.wave < before.wave and not isinstance(event, Attached):
            raise Violation(f"the wave falls: {before} {event} -> {after}")
        if before.paused and not after.paused and not isinstance(event, Resumed | Attached):
            raise Violation(f"a rank paused by the user goes on: {before} {event} -> {after}")
        if after.running and after.paused:
            raise Violation(f"a rank runs and is paused: {before} {event} -> {after}")
        started, completed = set(rank.started), set(rank.completed)
        for command in commands:
            (started if isinstance(command, SendWaveStarted) else completed).add(command.wave - BASE)
        return self._rank(
            rank._replace(
                wave=after.wave - BASE,
                running=after.running,
                paused=after.paused,
                started=tuple(started),
                completed=tuple(completed),
            )
        )

    def _own_moves(self, i: int, everything: bool) -> list[tuple[str, int]]:  # noqa: C901 - one branch for each move
        """What changes nothing but this rank: it takes a message, or enters; a message is lost; the user asks."""
        rank, faults = self._ranks[i], everything and self.bounds.faults
        out: list[tuple[str, int]] = []
        if rank.place == OUT:
            for at, wave in enumerate(rank.starts if faults else rank.starts[:1]):
                woken = i if faults else self._rank(rank._replace(starts=less(rank.starts, at)))
                out.append((f"START({wave}) arrives", self._told(woken, StartReceived(BASE + wave, None))))
            for at, stamp in enumerate(rank.requests):
                left = rank._replace(requests=less(rank.requests, at), work=rank.work + 1)
                out.append(
                    (f"request({stamp}) arrives", self._told(self._rank(left), RequestArrived(BASE + stamp)))
                )
            if rank.running and not (rank.starts and self.bounds.patient and not everything):
                out.append(("enters", self._rank(rank._replace(place=IN))))
            if everything and self.bounds.pauses and not rank.paused:
                asked = self._rank(rank._replace(asked=not rank.asked))
                out.append(("the user takes it back" if rank.asked else "the user asks to pause", asked))
        if everything:
            for at in range(len(rank.requests)):
                out.append(("a request is refused", self._rank(rank._replace(requests=less(rank.requests, at)))))
        if faults:
            for name in ("starts", "started", "completed", "first"):
                for at in range(len(getattr(rank, name))):
                    left_over = less(getattr(rank, name), at)
                    out.append((f"one of {name} is lost", self._rank(_with_lists(rank, {name: left_over}))))
        return [(f"{'rank 0' if rank.leads else 'a rank'}: {label}", new) for label, new in out]

    def _mail(self, i: int, again: bool) -> list[tuple[str, int, int]]:
        """Each message to the coordinator, and the rank without it, or with it if it may come again."""
        rank = self._ranks[i]
        sent = [(wave, name) for name in ("started", "completed") for wave in getattr(rank, name)]
        sent.sort(key=lambda message: (message[0], message[1] == "completed"))  # the order in which it sends them
        out: list[tuple[str, CoordinatorEvent, Rank]] = []
        for wave, name in sent if again else sent[:1]:
            left = _with_lists(rank, {name: tuple(w for w in getattr(rank, name) if w != wave)})
            event: CoordinatorEvent = WaveCompleted(BASE + wave)
            if name == "started":
                event = WaveStarted(0, BASE + wave)
            out.append((f"{name_of(event)} arrives", event, left))
        for at, wave in enumerate(rank.first):
            event = FirstRequest(0, BASE + wave)
            out.append((f"{name_of(event)} arrives", event, rank._replace(first=less(rank.first, at))))
        return [(label, self._event(event), i if again else self._rank(left)) for label, event, left in out]

    def _new_requests(self, i: int) -> list[tuple[str, int]]:
        rank = self._ranks[i]
        stamps = range(min(rank.wave - 1, -1), 1)
        new = [rank._replace(requests=(*rank.requests, stamp)) for stamp in stamps]
        if self.bounds.exclude_named:
            new += [r._replace(first=(*rank.first, wave)) for r in new for wave in (-1, 0)]
        return [("a request is sent", at) for at in dict.fromkeys(self._rank(r) for r in new)]

    def _revived(self, i: int) -> int:
        """Another process of that rank: what it held and what was in flight to it by START is gone."""
        rank = self._ranks[i]
        fresh = rank._replace(running=False, paused=False, place=OUT, asked=False, work=0, starts=())
        return self._told(self._rank(fresh), Attached(BASE))

    def _with_start(self, i: int, wave: int) -> int:
        rank = self._ranks[i]
        if not rank.connected:
            return i
        return self._rank(rank._replace(starts=(*rank.starts, wave)))

    def _rung(self, i: int, wave: int) -> int:
        rank = self._ranks[i]
        return self._rank(rank._replace(starts=(*rank.starts, wave)))

    def _disconnected(self, i: int) -> int:
        """The coordinator was replaced: what was in flight is lost, and the rank is not yet connected."""
        lost: dict[str, tuple[int, ...]] = {"starts": (), "first": ()}
        if self._facts[i].shows:  # a stock rank's PUSH socket sends what the dead coordinator did not accept
            lost |= {"started": (), "completed": ()}
        return self._rank(_with_lists(self._ranks[i]._replace(connected=False), lost))

    def _connected(self, i: int) -> int:
        return self._rank(self._ranks[i]._replace(connected=True))

    def _shifted(self, i: int, by: int) -> int:
        """The coordinator's wave has grown: all counts from it fall."""
        rank = self._ranks[i]
        fields = ("requests", "starts", "started", "completed", "first")
        lists = {name: tuple(wave - by for wave in getattr(rank, name)) for name in fields}
        return self._rank(_with_lists(rank._replace(wave=rank.wave - by), lists))

    def _named(self, i: int, wave: int) -> int:
        rank = self._ranks[i]
        return self._rank(rank._replace(first=(*rank.first, wave)))
