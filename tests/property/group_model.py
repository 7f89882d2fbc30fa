"""A group as a graph: every state that messages, ranks, users and faults can bring it into, and what may follow.

The rules are the real ones (`dpshm.rules.waves`, `dpshm.rules.reconciler`); this module is the world around them.

**Ranks** step together. A rank that runs is `OUT`, where it takes messages, then `IN` the collective of a step,
where it takes none and waits until all are in. The collective's result is the same for all: *step* (someone
has work, or was asked to pause), *idle*, or *pause* (all were asked). A rank that has not yet come to look at
an idle or pause is `DONE`; the others may be awake again by then. After a step all are `OUT`: no rank can tell
when a rank looks at a step. A resume is a barrier over the paused ranks, so it leaves them `DONE` too.

**Front-ends** read the control word, or heard of it, at any time in the past: so a request carries any wave up to
the coordinator's, and comes with a first request or without, and with a first request START comes or does not:
the front-end rings the ranks, for any wave up to the coordinator's. They have no other state, hence there may be
any number of them; what is bounded is how many requests are open at once.

**Messages** that are in flight form sets: they arrive in any order, late, and, if `Bounds.faults`, again or
never. That covers links that keep order, and it covers a coordinator that restarts: its state is on the board, and
what was sent to it or not yet sent by it is lost. START to a rank is one message of that rank's own; the one that
a START excludes gets none, as the rule would ignore it.

**Ticks** know no time here. While faults are possible, every event that `WaveReconciler` can give rise to may
happen at any time, `RanksSplit` and `RanksIdle` with the wave of any rank: this covers rows that were read while
they changed, rows of dead ranks that were left out, a clock that jumped, and a look that another has overtaken.

**Left alone**, after any state that can be reached, the group has no more faults, requests or users, but for one
who resumes whom he paused (`Group.alone`). Links keep order now, as ZMQ's do: a rank's messages come in the
order in which it sends them, and so does START. It is the real `WaveReconciler` that looks: once at any time,
which is what `SeenRunning` needs, and look after look when nothing else can happen any more, since messages and
steps are faster than `resend_interval`. Whatever else was still in flight has come by then, or comes first: both
are moves of the group before it is left alone.

**Patience.** Ranks that were restarted or added may run in a wave that is over for the others. START tells them
the wave, but one that waits in a collective cannot hear it. If that very collective agrees that all are idle,
the rank takes the START afterwards, wakes alone, and is one wave late again: for ever, if each step is an
agreement. Ranks that agree in some steps only (vLLM's in every 32nd) take START in the steps between, and then
all are in one wave. With `Bounds.patient` they do: no two agreements without a step between, and no rank enters
a collective while START is in flight to it.

**Without a coordinator.** With `Bounds.absence` the coordinator stops at any time, for a time or for ever. What is
sent to it waits. A rank that a request wakes rings the others, and front-ends ring for any wave up to that of the
rows. A group whose coordinator stays away must come to rest all the same, once a front-end has rung for the wave
of the rows, which it does with its next request; nothing is asked of the phase then. A ring is not lost here.

**Connections.** With `Bounds.replaced` another coordinator takes over at any time. What was in flight to or from
the old one is lost, and each rank connects when it likes; START that is sent before does not reach it. With
`Bounds.stock` all ranks but 0 are stock engines: the coordinator does not see what their rows would say, and they
have no doorbell. Their reports are not lost: a PUSH socket keeps what the old coordinator did not accept.

**Waves** are counted from the coordinator's. The rules see only differences of waves (a test checks that), so the
graph has no last wave; `Bounds.waves` says how many different ones there may be at once. A message so old that
no state makes it more than noise is left out, and all others that are older than the receiver count as one wave
older; both are asked of the rules in use, and a test checks them.

Ranks but 0 are interchangeable: they are kept in order. Each rank's state, with all that is in flight from and to
it, is one number; a world is ``(head, rank 0, the others...)``.
"""

from __future__ import annotations

from functools import lru_cache

from dpshm.rules.reconciler import RowState, WaveReconciler
from dpshm.rules.waves import (
    CoordinatorEvent,
    CoordinatorState,
    FirstRequest,
    Phase,
    RankConnected,
    RanksIdle,
    RanksSplit,
    SeenRunning,
    StartWave,
    WakeTimer,
    WaveStarted,
)
from tests.property.group_parts import (
    BASE,
    DONE,
    IDLE,
    IN,
    NOTHING,
    OUT,
    PAUSE,
    RESULTS,
    RESUME,
    RESUME_TO_WORK,
    Bounds,
    Facts,
    Head,
    Move,
    Numbers,
    Part,
    Rank,
    Rules,
    Violation,
    World,
    describe_rank,
    name_of,
    ordered,
    with_rank,
)
from tests.property.rank_moves import Ranks

RESEND, TIMEOUT, LOOK = 200, 1000, 100
LOOK_AT_NOTHING, STEP, WAIT_FOR_LOOK = 0, 10, 11


class Group(Ranks):
    """The graph for given bounds and rules."""

    def __init__(self, bounds: Bounds, rules: Rules | None = None) -> None:
        super().__init__(bounds, rules or Rules())
        self._heads: Numbers[Head] = Numbers()
        # What is asked of the coordinator is asked once.
        for name in ("_decided", "_looks", "_plan", "_watched"):
            setattr(self, name, lru_cache(None, typed=True)(getattr(self, name)))

    @property
    def initial(self) -> World:
        """All ranks asleep in one wave, nothing in flight."""
        others = [self._rank(Rank(False))] * (self.bounds.engines - 1)
        return (self._heads.of(Head(Phase.PAUSED)), self._rank(Rank(True)), *others)

    def head(self, world: World) -> Head:
        """The part of a world that is not the ranks'."""
        return self._heads[world[0]]

    def ranks(self, world: World) -> list[Rank]:
        """The ranks of a world."""
        return [self._ranks[i] for i in world[1:]]

    # What may happen.

    def moves(self, world: World) -> list[Move]:  # noqa: C901, PLR0912 - a branch for each move
        """Everything that may happen next, faults and users included, within the bounds."""
        bounds, ids = self.bounds, world[1:]
        facts = [self._facts[i] for i in ids]
        out = self._collective(world, facts, alone=False)
        away = self._heads[world[0]].away
        room = sum(f.open for f in facts) < bounds.frontends
        for at, i in enumerate(ids):
            if at > 1 and i == ids[at - 1]:
                continue  # does what its equal does
            for label, new in self._own_moves(i, True):
                out.append((label, self._woken(world, at, new)))
            if not away:
                for label, event, new in self._mail(i, bounds.faults):
                    self._coordinate(out, label, world, event, at, rank=new)
                self._connect(out, world, at)
            if room:
                out += self._sent(world, at)
            if bounds.restarts:
                out.append(("a rank restarts", self._settled(with_rank(world, at, self._revived(i)))))
        if bounds.absence:
            head = self._heads.of(self._heads[world[0]]._replace(away=not away))
            out.append((f"the coordinator {'goes on' if away else 'stops'}", (head, *ids)))
        if bounds.replaced and not away:
            cut = [self._disconnected(i) for i in ids]
            out.append(("the coordinator is replaced", (world[0], *ordered(cut))))
        if bounds.faults and bounds.ticks and not away:
            phase = self._heads[world[0]].phase
            for at in range(len(ids)):
                for label, event in self._looks(phase, facts[at].row, at == 0) if facts[at].shows else ():
                    self._coordinate(out, label, world, event, at)
        if bounds.scaling:
            out += self._scaled(world)
        return [move for move in out if move[1] != world and self._inside(move[1])]

    def _sent(self, world: World, at: int) -> list[Move]:
        """A request to that rank: alone, with a first request, or with that and START to all or to the others."""
        out: list[Move] = []
        oldest = min(-1, *(self._facts[i].row[0] for i in world[1:]))
        newest = max(0, *(self._facts[i].row[0] for i in world[1:])) if self.bounds.absence else 0
        for label, new in self._new_requests(world[1 + at]):
            sent = [*world[1 : 1 + at], new, *world[2 + at :]]
            out.append((label, (world[0], *ordered(sent))))
            for wave in range(oldest, newest + 1):
                ids = list(sent)
                if not self.bounds.exclude_named:
                    ids[0] = self._named(ids[0], wave)
                    out.append((f"{label}, and a first request({wave})", (world[0], *ordered(ids))))
                rung = [self._rung(i, wave) if self._facts[i].shows else i for i in ids]
                out.append((f"{label}, and all are rung for wave {wave}", (world[0], *ordered(rung))))
                rung[at] = ids[at]
                out.append((f"{label}, and the others are rung for wave {wave}", (world[0], *ordered(rung))))
        return out

    def alone(self, world: World) -> list[Move]:
        """What happens next if nothing goes wrong any more and no user does anything but resume paused ranks."""
        ids = world[1:]
        facts = [self._facts[i] for i in ids]
        out = self._collective(world, facts, alone=True)
        away = self._heads[world[0]].away
        for at, i in enumerate(ids):
            if at > 1 and i == ids[at - 1]:
                continue
            for label, new in self._own_moves(i, False):
                out.append((label, self._woken(world, at, new)))
            if not away:
                for label, event, new in self._mail(i, False):
                    self._coordinate(out, label, world, event, at, rank=new)
                self._connect(out, world, at)
        if self.bounds.ticks and not away:
            rows = tuple([f.row for f in facts if f.shows])
            for event, at in self._watched(world[0], rows)[0]:
                self._coordinate(out, "look", world, event, at)
            out = [move for move in out if move[1] != world]
            if not out:
                out += self._look_long(world, rows)
        return out or (self._rung_again(world, facts) if away else [])

    def left_alone(self, world: World) -> list[World]:
        """The worlds in which `alone` begins: the user is done; and, if all ranks are paused, is not yet."""
        head = self._heads[world[0]]
        if head.away and not head.lasting:
            back = self.left_alone((self._heads.of(head._replace(away=False)), *world[1:]))
            if self.bounds.faults:
                return back  # a ring may be lost, and there is no coordinator to repeat it
            return back + self.left_alone((self._heads.of(head._replace(lasting=True)), *world[1:]))
        parts = [self._facts[i].part for i in world[1:]]
        done = world
        if any(part.asked for part in parts):
            ids = [self._rank(self._ranks[i]._replace(asked=False)) for i in world[1:]]
            done = (world[0], *ordered(ids))
        if all(part.paused and part.place == OUT for part in parts):
            head = self._heads[world[0]]
            return [done, (self._heads.of(head._replace(kept=True)), *done[1:])]
        return [done]

    def at_rest(self, world: World) -> list[str]:
        """What is wrong with a world in which nothing happens any more; empty if nothing is."""
        head, ranks = self.head(world), self.ranks(world)
        running = [r for r in ranks if r.running]
        wrong = []
        if any(r.place == IN for r in ranks) and len(running) < len(ranks):
            wrong.append("a rank waits in a collective that another will never enter")
        if any(r.work or r.requests for r in ranks) and not head.kept:
            wrong.append("a request is never run")
        if head.away:
            return wrong
        if head.phase != Phase.PAUSED:
            wrong.append(f"the phase stays {Phase(head.phase).name}")
        if running and head.phase == Phase.PAUSED:
            wrong.append("the phase stays PAUSED while a rank runs")
        if any(r.wave > 0 for r in ranks):
            wrong.append("the coordinator's wave stays behind")
        return wrong

    def describe(self, world: World) -> str:
        """A world in words."""
        head, ranks = self.head(world), self.ranks(world)
        result = f", result {RESULTS[head.result]}" if head.result else ""
        return "; ".join(
            [f"{Phase(head.phase).name}{result}", *(describe_rank(i, r) for i, r in enumerate(ranks))]
        )

    def _woken(self, world: World, at: int, new: int) -> World:
        """The world with another rank at that place; a rank that a request woke has rung the others."""
        before, after = self._ranks[world[1 + at]], self._ranks[new]
        rings = self.bounds.absence and self.rules.rings and after.work > before.work
        if not (rings and after.running and not before.running):
            return with_rank(world, at, new)
        ids = [new if k == at else self._rung(i, after.wave) for k, i in enumerate(world[1:])]
        return (world[0], *ordered(ids))

    def _rung_again(self, world: World, facts: list[Facts]) -> list[Move]:
        """The next request of a front-end that knows that it has no coordinator: it rings if a rank sleeps."""
        wave = max(0, *(f.row[0] for f in facts)) if self.rules.rows_tell else 0
        if not any(f.part.running for f in facts) or all(f.row == (wave, True) for f in facts):
            return []
        after = (world[0], *ordered([self._rung(i, wave) for i in world[1:]]))
        return [("a front-end rings all", after)] if after != world else []

    def _connect(self, out: list[Move], world: World, at: int) -> None:
        """A rank connects to the new coordinator."""
        i = world[1 + at]
        if not self._facts[i].connected:
            made = with_rank(world, at, self._connected(i))
            where = made.index(self._connected(i), 1) - 1
            self._coordinate(out, "a rank connects", made, self._event(RankConnected()), where)

    # Collectives: over all ranks.

    def _collective(self, world: World, facts: list[Facts], *, alone: bool) -> list[Move]:
        """A collective ends, or a rank looks at its result."""
        out: list[Move] = []
        for label, head, what in self._plan(world[0], tuple([f.part for f in facts]), alone):
            ids = [self._does(i, do) for i, do in zip(world[1:], what, strict=True)]
            out.append((label, self._settled((head, *ordered(ids)))))
        return out

    def _does(self, i: int, do: int) -> int:
        if do == LOOK_AT_NOTHING:
            return i
        if do == STEP:
            return self._stepped(i)
        return self._set_done(i) if do == WAIT_FOR_LOOK else self._looked(i, do)

    def _plan(self, head_number: int, parts: tuple[Part, ...], alone: bool) -> list[tuple[str, int, list[int]]]:
        """Which collectives may end, and what each rank then does: one of the constants, or a result to take."""
        head, n = self._heads[head_number], len(parts)
        if head.result:
            return [
                (f"a rank looks: {RESULTS[head.result]}", head_number, [head.result * (k == at) for k in range(n)])
                for at, part in enumerate(parts)
                if part.place == DONE
            ]
        patient = self.bounds.patient
        plan: list[tuple[str, Head, list[int]]] = []
        if all(part.place == IN for part in parts):
            everybody = [WAIT_FOR_LOOK] * n
            must_step = alone and patient and not head.stepped
            if all(part.asked for part in parts):
                plan.append(("all agree to pause", head._replace(result=PAUSE, stepped=False), everybody))
            elif not any(part.work or part.asked for part in parts):
                plan.append(("all agree that all are idle", head._replace(result=IDLE, stepped=False), everybody))
            if plan and must_step:
                plan.clear()
            if not plan or (patient and not alone):
                plan.append(("all step", head._replace(stepped=alone and patient), [STEP] * n))
        elif any(p.asked for p in parts) and all(not p.running and (p.asked or p.paused) for p in parts):
            asked = [WAIT_FOR_LOOK * part.asked for part in parts]
            plan.append(("sleeping ranks agree to pause", head._replace(result=PAUSE), asked))
        if (not head.kept if alone else self.bounds.pauses) and any(part.paused for part in parts):
            result = RESUME_TO_WORK if any(part.work for part in parts) else RESUME
            paused = [WAIT_FOR_LOOK * part.paused for part in parts]
            plan.append(("the user resumes", head._replace(result=result), paused))
        return [(label, self._heads.of(new), what) for label, new, what in plan]

    def _settled(self, world: World) -> World:
        """The result is forgotten once all have looked at it."""
        head = self._heads[world[0]]
        if head.result and not any(self._facts[i].part.place == DONE for i in world[1:]):
            return (self._heads.of(head._replace(result=NOTHING)), *world[1:])
        return world

    # The coordinator.

    def _coordinate(
        self, out: list[Move], label: str, world: World, event: int, at: int, *, rank: int = -1
    ) -> None:
        """The coordinator takes an event that came from, or names, the rank at a place, which becomes `rank`."""
        head, grown, starts = self._decided(world[0], event, at)
        ids = list(world[1:])
        if rank >= 0:
            ids[at] = rank
        if grown:
            ids = [self._shifted(n, grown) for n in ids]
        for wave, exclude in starts:
            ids = [n if k == exclude else self._with_start(n, wave) for k, n in enumerate(ids)]
        out.append((label, (head, *ordered(ids))))

    def _decided(
        self, head_number: int, event_number: int, at: int
    ) -> tuple[int, int, list[tuple[int, int | None]]]:
        """The head, how much the wave grows, and START as (wave, exclude)."""
        head, event = self._heads[head_number], self._events[event_number][1]
        if isinstance(event, FirstRequest | WaveStarted | SeenRunning):
            event = event._replace(engine=at)
        after, commands = self.rules.coordinator(
            CoordinatorState(BASE, Phase(head.phase)),
            event,
            exclude_named=self.bounds.exclude_named,
            repeat_start=self.bounds.repeat_start,
        )
        grown = after.wave - BASE
        if grown < 0:
            raise Violation(f"the wave falls: {Phase(head.phase).name} {event} -> {after}")
        if grown or after.phase != head.phase:
            head = head._replace(phase=int(after.phase), rang=False)
        starts = [(c.wave - after.wave, c.exclude) for c in commands if isinstance(c, StartWave)]
        return self._heads.of(head), grown, starts

    def _looks(self, phase: int, row: tuple[int, bool], once: bool) -> list[tuple[str, int]]:
        """Every event that a look could give rise to on account of this row; `once`: and without any."""
        wave, running = row
        events: list[CoordinatorEvent] = [RanksSplit(BASE + wave), RanksIdle(BASE + wave)]
        if running:
            events.append(SeenRunning(0, BASE + wave))
        if phase == Phase.WAKING and once:
            events += [WakeTimer(expired=False), WakeTimer(expired=True)]
        return [(f"look: {name_of(event)}", self._event(event)) for event in events]

    def _watched(self, head_number: int, rows: tuple[tuple[int, bool], ...]) -> list[list[tuple[int, int]]]:
        """What the real watch says, look by look, of rows that stay as they are: (event, rank that it names)."""
        watch = WaveReconciler(RESEND, TIMEOUT)
        stock = self.bounds.engines - 1 if self.bounds.stock else 0
        state = CoordinatorState(BASE, Phase(self._heads[head_number].phase))
        shown = [RowState(at, BASE + wave, running) for at, (wave, running) in enumerate(rows)]
        times = range(0, TIMEOUT + RESEND + 1, LOOK)
        looks = [watch.events(now, state, shown, unobserved_ranks=stock) for now in times]
        return [[(self._event(event), getattr(event, "engine", 0)) for event in events] for events in looks]

    def _look_long(self, world: World, rows: tuple[tuple[int, bool], ...]) -> list[Move]:
        """Nothing else can happen, so looks follow each other until one has an effect; or none ever has."""
        rang = self._heads[world[0]].rang
        for events in self._watched(world[0], rows):
            said = [self._events[event][1] for event, _ in events]
            rings = any(isinstance(event, WakeTimer) for event in said)
            if rang and WakeTimer(expired=False) in said:
                continue  # it has had its effect
            after = world
            for event, at in events:
                done: list[Move] = []
                self._coordinate(done, "", after, event, at)
                after = done[0][1]
            if after != world:
                head = self._heads[after[0]]
                if rings and head.phase == Phase.WAKING:
                    after = (self._heads.of(head._replace(rang=True)), *after[1:])
                return [(f"long look: {', '.join(map(name_of, said))}", after)]
        return []

    # Ranks added and taken away.

    def _scaled(self, world: World) -> list[Move]:
        """Ranks come and go while none is in a collective: changing the group is a collective of its own."""
        ids = world[1:]
        if any(self._ranks[i].place != OUT for i in ids):
            return []
        out: list[Move] = []
        if len(ids) < self.bounds.engines:
            out.append(("a rank is added", (world[0], *ordered([*ids, self._rank(Rank(False))]))))
        for at, i in enumerate(ids):
            rank = self._ranks[i]
            if at and not rank.running and not rank.work:
                out.append(("a rank is taken away", (world[0], *ids[:at], *ids[at + 1 :])))
        return out

    # Bounds.

    def _inside(self, world: World) -> bool:
        return all(self._facts[i].inside for i in world[1:])
