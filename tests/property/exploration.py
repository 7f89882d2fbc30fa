"""Explores a group (`tests.property.group_model`) breadth first and checks every state that it finds.

A *move* must never break a promise of the rules: no wave falls, no rank that the user paused goes on by itself.

From every state the group must *come to rest* once it is left alone: no more faults, no more requests, and the
user resumes whom he paused. Not on some path but on every one, in whatever order things happen: the moves
of a group that is left alone must form no cycle, and where they end all requests have been run, all ranks are
idle, none waits for another, the phase is `PAUSED` and the coordinator knows the highest wave. If the user paused
all ranks and does not resume them, the phase must become `PAUSED` as well.

Both together are what is asked: a rank that waits in a collective which another never enters, a request that is
never run, a phase that latches, are ends that are no rest; an exchange of messages for ever is a cycle.

    python -m tests.property.exploration                       # all of `FULL`: tens of minutes
    python -m tests.property.exploration --engines 3 --frontends 2 --waves 3 --messages 1 --faults --ticks
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from tests.property.group_model import Group
from tests.property.group_parts import Bounds, Rules, Violation, World

MESSAGES = Bounds(faults=False, ticks=False, messages=9)
"""No message is lost, and the rows are not scanned: messages alone must suffice."""
CHANGES = Bounds(restarts=True, scaling=True, patient=True, messages=1)
REPLACED = MESSAGES._replace(ticks=True, messages=2, replaced=True)
ABSENCE = MESSAGES._replace(ticks=True, messages=3, absence=True)

QUICK = {
    "messages alone": MESSAGES._replace(engines=3),
    "faults": Bounds(frontends=2, messages=1),
    "faults, 3 engines": Bounds(engines=3, messages=1),
    "pauses": Bounds(pauses=True, messages=1),
    "restarts": CHANGES._replace(scaling=False),
    "scaling": CHANGES._replace(restarts=False),
    "first requests exclude whom they name": Bounds(exclude_named=True, repeat_start=True, messages=1),
    "coordinators are replaced": REPLACED,
    "stock ranks connect late": REPLACED._replace(stock=True, repeat_start=True),
    "no coordinator, for a time or for ever": ABSENCE,
    "no coordinator for a time, and faults": Bounds(absence=True, messages=1),
}
"""What the suite explores."""
FULL = {
    "messages alone": MESSAGES._replace(engines=3, frontends=2, waves=3),
    "faults, 3 engines, 2 front-ends": Bounds(engines=3, frontends=2, waves=3, messages=1),
    "START repeated": Bounds(engines=3, repeat_start=True, messages=1),
    "many messages": Bounds(frontends=2, waves=3, messages=3),
    "scaling, 3 engines": CHANGES._replace(engines=3, waves=3, restarts=False),
    "stock ranks connect late, 3 engines": REPLACED._replace(stock=True, repeat_start=True, engines=3, messages=1),
    "no coordinator for several waves": ABSENCE._replace(waves=3),
    "restarts, pauses and scaling": CHANGES._replace(pauses=True),
    "pauses, 3 engines": Bounds(engines=3, pauses=True, messages=1),
    "restarts, many messages": CHANGES._replace(scaling=False, messages=3),
    "restarts, pauses and scaling, 3 engines, no requests": CHANGES._replace(engines=3, frontends=0, pauses=True),
}
"""What ``python -m tests.property.exploration`` explores."""


class Found(NamedTuple):
    """A state from which something goes wrong.

    Attributes:
        check: what is wrong, in words.
        trace: how it came about, a line a move, the state after it in brackets.
    """

    check: str
    trace: list[str]


class Outcome(NamedTuple):
    """What an exploration found.

    Attributes:
        states: how many states it found.
        alone: how many states it saw of groups that are left alone.
        found: the first thing that is wrong, one of the shortest ways to it; None if nothing is.
        complete: whether it has seen every state within the bounds.
        seconds: how long it took.
    """

    states: int
    alone: int
    found: Found | None
    complete: bool
    seconds: float


def explore(
    bounds: Bounds,
    rules: Rules | None = None,
    *,
    most: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Outcome:
    """Finds and checks every state within the bounds.

    Args:
        bounds: how far to go.
        rules: a mutant; default the real rules.
        most: states after which to stop.
        progress: called now and then with states found, states still to be looked at, states left alone.
    """
    collects = gc.isenabled()
    gc.disable()  # nothing here refers back, and looking for what does would take half of the time
    try:
        return _explore(bounds, rules, most, progress)
    finally:
        if collects:
            gc.enable()


def _explore(
    bounds: Bounds, rules: Rules | None, most: int | None, progress: Callable[[int, int, int], None] | None
) -> Outcome:
    began = time.monotonic()
    group = Group(bounds, rules)
    rest = Rest(group)
    parents: dict[World, World | None] = {group.initial: None}
    layer = [group.initial]
    try:
        world = group.initial
        rest.check(world)
        while layer:
            following = []
            for done, world in enumerate(layer):
                for _, new in group.moves(world):
                    if new not in parents:
                        parents[new] = world
                        following.append(new)
                        rest.check(new)
                if progress and not done % 4096:
                    progress(len(parents), len(layer) - done + len(following), len(rest.calm))
                if most is not None and len(parents) >= most:
                    return Outcome(len(parents), len(rest.calm), None, False, time.monotonic() - began)
            layer = following
        found = None
    except Violation as e:
        found = Found(str(e), _trace(group, parents, world))
    except Restless as e:
        found = Found(e.check, [*_trace(group, parents, e.path[0][1], parent=world), *e.lines(group)])
    return Outcome(len(parents), len(rest.calm), found, found is None, time.monotonic() - began)


class Restless(Exception):
    """A group that was left alone need not come to rest."""

    def __init__(self, check: str, path: list[tuple[str, World]]) -> None:
        super().__init__(check)
        self.check = check
        self.path = path  # its first world is the one in which faults were still possible

    def lines(self, group: Group) -> list[str]:
        """The path, in words."""
        return ["--- left alone ---", *(f"{label} [{group.describe(world)}]" for label, world in self.path[1:])]


class Rest:
    """Checks that groups come to rest on every path; what it has seen it need not look at again.

    Attributes:
        calm: worlds from which every path leads to rest.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.calm: set[World] = set()

    def check(self, world: World) -> None:
        """Raises Restless if some path from this world, left alone, has no end, or one that is no rest."""
        for start in self._group.left_alone(world):
            if start not in self.calm:
                self._walk(world, start)

    def _walk(self, world: World, start: World) -> None:
        calm = self.calm
        path = [("it is left alone", start)]
        on_path = {start}
        waiting = [self._next(world, path)]
        while waiting:
            moves = waiting[-1]
            if not moves:
                waiting.pop()
                _, done = path.pop()
                on_path.discard(done)
                calm.add(done)
                continue
            label, new = moves.pop()
            if new in calm:
                continue
            path.append((label, new))
            if new in on_path:
                raise Restless("the group never comes to rest: it goes round", [("", world), *path])
            on_path.add(new)
            waiting.append(self._next(world, path))

    def _next(self, world: World, path: list[tuple[str, World]]) -> list[tuple[str, World]]:
        moves = self._group.alone(path[-1][1])
        if not moves and (wrong := self._group.at_rest(path[-1][1])):
            raise Restless("; ".join(wrong), [("", world), *path])
        return moves


def _trace(
    group: Group, parents: dict[World, World | None], world: World, parent: World | None = None
) -> list[str]:
    """The moves from the beginning to a world, in words; `parent` is where it was found if it is not in yet."""
    worlds = [world]
    before = parents.get(world, parent)
    while before is not None:
        worlds.append(before)
        before = parents[before]
    worlds.reverse()
    lines = [f"[{group.describe(worlds[0])}]"]
    for a, b in pairwise(worlds):
        label = next(label for label, new in group.moves(a) if new == b)
        lines.append(f"{label} [{group.describe(b)}]")
    return lines


# The command.


def describe(bounds: Bounds) -> str:
    """The bounds in words."""
    flags = [name for name in bounds._fields if getattr(bounds, name) is True]
    numbers = [f"{getattr(bounds, name)} {name}" for name in ("engines", "frontends", "waves", "messages")]
    return ", ".join([*numbers, *(flags or ["no faults"])])


def result(outcome: Outcome) -> str:
    """What an exploration found, in words."""
    ended = "all come to rest" if outcome.complete else outcome.found.check if outcome.found else "stopped early"
    return f"{outcome.states:,} states ({outcome.alone:,} left alone) in {outcome.seconds:.1f} s: {ended}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Explores the given bounds, or all of `FULL`; 1 if anything is wrong, and how it comes about."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.property.exploration", description=__doc__.split("\n")[0]
    )
    for name, default in Bounds._field_defaults.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--name", choices=FULL, help="one of the named bounds; without any option, all of them")
    parser.add_argument("--most", type=int, help="stop after so many states")
    given = sys.argv[1:] if arguments is None else arguments
    options = vars(parser.parse_args(given))
    name, most = options.pop("name"), options.pop("most")
    if name:
        todo = {name: FULL[name]}
    else:
        todo = FULL if not given or set(given) == {"--most", str(most)} else {"given": Bounds(**options)}
    wrong = 0
    for title, bounds in todo.items():
        print(f"{title}: {describe(bounds)}", flush=True)
        outcome = explore(bounds, most=most, progress=_Progress())
        print(f"  {result(outcome)}", flush=True)
        if outcome.found:
            wrong += 1
            print("\n".join(f"    {line}" for line in outcome.found.trace), flush=True)
    return int(wrong > 0)


class _Progress:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 10

    def __call__(self, states: int, waiting: int, alone: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 10
            print(f"  ... {states:,} states, {waiting:,} of them to look at; {alone:,} left alone", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
