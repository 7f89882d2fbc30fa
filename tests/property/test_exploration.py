"""All states of a group within some bounds, the real rules in it, and what becomes of mutants of the rules.

The suite explores small bounds; ``python -m tests.property.exploration`` explores the large ones.
"""

from __future__ import annotations

from itertools import product

import pytest

from dpshm.rules.waves import (
    AllIdle,
    AllPaused,
    Attached,
    CoordinatorState,
    EngineState,
    FirstRequest,
    Phase,
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
from tests.property.exploration import CHANGES, MESSAGES, QUICK, Rest, Restless, describe, explore, main, result
from tests.property.group_model import Group
from tests.property.group_parts import BASE, IN, Bounds, World
from tests.property.mutants import CAUGHT, SPARE, Mutant

ENGINES = [EngineState(BASE, r, p) for r, p in product((False, True), repeat=2) if not (r and p)]
COORDINATORS = [CoordinatorState(BASE, phase) for phase in Phase]
SMALL = 12_000  # states: enough for each kind of move to have happened


@pytest.mark.slow
@pytest.mark.timeout(900)  # it only computes, and on a busy machine for long
@pytest.mark.parametrize("name", QUICK)
def test_every_group_comes_to_rest(name: str, record_property: pytest.RecordProperty):
    """Guards against a rank that waits for ever, a request that no rank runs, a phase that latches."""
    outcome = explore(QUICK[name])
    record_property("explored", f"{name} ({describe(QUICK[name])}): {result(outcome)}")
    assert outcome.found is None, "\n".join([outcome.found.check, *outcome.found.trace])
    assert outcome.complete
    assert outcome.states > 5_000


@pytest.mark.parametrize("mutant", CAUGHT, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant, record_property: pytest.RecordProperty):
    """Guards against an exploration that cannot fail, and against a check that some other failure sets off."""
    outcome = explore(mutant.bounds, mutant.rules)
    assert outcome.found is not None
    assert mutant.check is not None
    assert mutant.check in outcome.found.check
    assert outcome.found.trace
    record_property("explored", f"mutant {mutant.name!r}: {outcome.found.check}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", [m for m in SPARE if m.bounds is not CHANGES], ids=lambda mutant: mutant.name)
def test_a_rule_that_saves_time_is_not_needed_for_more(mutant: Mutant):
    """Guards against a rule that everybody believes to save time alone, and that something has come to lean on."""
    outcome = explore(mutant.bounds, mutant.rules)
    assert outcome.found is None, "\n".join([outcome.found.check, *outcome.found.trace])


@pytest.mark.parametrize(
    ("exclude_named", "repeat_start", "asleep"),
    [(False, False, []), (True, False, [0, 1]), (True, True, [0])],
    ids=["no rank excluded", "excluded", "excluded, START repeated"],
)
def test_a_first_request_that_was_refused(exclude_named: bool, repeat_start: bool, asleep: list[int]):
    """Guards against a rank that sleeps because the request of which everybody was told never reached it.

    Rank 0 confirms that it woke. If START is then repeated, it wakes whom the first one left out: any but rank 0.
    """
    group = Group(MESSAGES._replace(exclude_named=exclude_named, repeat_start=repeat_start))
    stuck = []
    for to in range(2):
        sent = [
            new
            for label, new in group.moves(group.initial)
            if label.startswith("a request is sent") and "rung" not in label
        ]
        (told,) = (w for w in sent if group.ranks(w)[to].requests and any(r.first == (0,) for r in group.ranks(w)))
        (refused,) = (new for label, new in group.moves(told) if label.endswith("a request is refused"))
        if _is_stuck(group, refused):
            stuck.append(to)
    assert stuck == asleep


def _is_stuck(group: Group, world: World) -> bool:
    """Whether a group may come to an end, once left alone, in which one rank waits for another."""
    try:
        Rest(group).check(world)
    except Restless as e:
        return "waits in a collective" in e.check
    return False


def test_agreeing_in_every_step_needs_ranks_in_one_wave():
    """Guards against forgetting why ranks must not agree in every step: a late one may wake others for ever."""
    outcome = explore(CHANGES._replace(patient=False))
    assert outcome.found is not None
    assert "it goes round" in outcome.found.check
    assert any("restarts" in line or "is added" in line for line in outcome.found.trace)


def test_a_pause_needs_the_ticks():
    """Guards against a proof that messages alone would do where START is dropped: a pause drops it."""
    outcome = explore(MESSAGES._replace(pauses=True))
    assert outcome.found is not None
    assert "waits in a collective" in outcome.found.check


@pytest.mark.slow
def test_what_may_happen_does_happen():
    """Guards against an exploration that is small because its moves are not possible."""
    bounds = Bounds(restarts=True, pauses=True, scaling=True, messages=1)
    group = Group(bounds)
    seen, todo, labels = {group.initial}, [group.initial], set()
    for world in todo:
        for label, new in group.moves(world):
            labels.add(label.removeprefix("rank 0: ").removeprefix("a rank: "))
            if new not in seen and len(seen) < SMALL:
                seen.add(new)
                todo.append(new)
    assert labels >= {
        *("enters", "all step", "all agree that all are idle", "a rank looks: AllIdle()", "START(0) arrives"),
        *(
            "a request is sent",
            "a request is sent, and a first request(0)",
            "a request is sent, and all are rung for wave -1",
            "a request is sent, and the others are rung for wave 0",
            "request(0) arrives",
            "a request is refused",
        ),
        *(
            "FirstRequest(0) arrives",
            "WaveStarted(0) arrives",
            "WaveCompleted(0) arrives",
        ),
        *(
            "one of first is lost",
            "one of starts is lost",
            "one of started is lost",
            "one of completed is lost",
        ),
        *("look: SeenRunning(0)", "look: RanksSplit(0)", "look: RanksIdle(1)", "look: WakeTimer(True)"),
        *(
            "the user asks to pause",
            "the user takes it back",
            "all agree to pause",
            "sleeping ranks agree to pause",
        ),
        *("the user resumes", "a rank looks: Resumed(has_work=True)", "a rank restarts"),
        *("a rank is added", "a rank is taken away"),
    }
    for world in seen:
        ranks = group.ranks(world)
        assert all(rank.running for rank in ranks if rank.place == IN)  # only who runs waits in a collective


def test_the_rules_see_only_differences_of_waves():
    """Guards against rules that depend on the number of the wave, which the exploration does not know."""
    for by, state in product((0, 1, 977), COORDINATORS):
        for event in (
            *(kind(1, BASE + d) for kind in (FirstRequest, WaveStarted, SeenRunning) for d in (-2, -1, 0, 1, 2)),
            *(kind(BASE + d) for kind in (WaveCompleted, RanksSplit, RanksIdle) for d in (-2, -1, 0, 1, 2)),
            *(WakeTimer(expired) for expired in (False, True)),
        ):
            moved = event._replace(wave=event.wave + by) if hasattr(event, "wave") else event
            after, commands = handle_coordinator(state, event)
            expected = (after._replace(wave=after.wave + by), _moved(commands, by))
            assert handle_coordinator(state._replace(wave=BASE + by), moved) == expected
    for by, state, rank in product((0, 1, 977), ENGINES, (0, 1)):
        for event in (
            *(kind(BASE + d) for kind in (Attached, RequestArrived) for d in (-2, -1, 0, 1, 2)),
            *(StartReceived(BASE + d, None) for d in (-2, -1, 0, 1, 2)),
            *(AllIdle(), AllPaused(), Resumed(False), Resumed(True)),
        ):
            moved = event._replace(wave=event.wave + by) if hasattr(event, "wave") else event
            after, commands = handle_engine(state, event, rank)
            expected = (after._replace(wave=after.wave + by), _moved(commands, by))
            assert handle_engine(state._replace(wave=BASE + by), moved, rank) == expected


def _moved(commands, by):
    return [c._replace(wave=c.wave + by) if hasattr(c, "wave") else c for c in commands]


def test_what_the_exploration_leaves_out_changes_nothing():
    """Guards against a message that is left out as noise, or taken as one wave old, and is neither."""
    for state, rank, back in product(ENGINES, (0, 1), (1, 2, 3)):
        assert handle_engine(state, StartReceived(BASE - back, None), rank) == (state, [])
        assert handle_engine(state, RequestArrived(BASE - back), rank) == handle_engine(
            state, RequestArrived(BASE), rank
        )
        for wave in (BASE, BASE + 1):
            assert handle_engine(state, StartReceived(wave, rank), rank) == (state, [])  # whom START excludes
    for state, back in product(COORDINATORS, (1, 2, 3)):
        assert handle_coordinator(state, WaveCompleted(BASE - back)) == (state, [])
        older = handle_coordinator(state, WaveStarted(1, BASE - back))
        assert older == handle_coordinator(state, WaveStarted(0, BASE - 1))
        late = FirstRequest(0, BASE - back)
        assert handle_coordinator(state, late, repeat_start=False) == (state, [])
        assert handle_coordinator(state, late) == handle_coordinator(state, FirstRequest(0, BASE - 1))


def test_ranks_but_the_first_are_alike():
    """Guards against taking ranks for each other that are not."""
    events = [
        StartReceived(BASE, None),
        RequestArrived(BASE),
        AllIdle(),
        AllPaused(),
        Resumed(True),
        Attached(BASE),
    ]
    for state, event in product(ENGINES, events):
        assert handle_engine(state, event, 1) == handle_engine(state, event, 2)


def test_the_command(capsys: pytest.CaptureFixture[str]):
    """Guards against a command that does not run, or does not say what it saw."""
    assert main(["--engines", "1"]) == 0
    assert "all come to rest" in capsys.readouterr().out
    assert main(["--pauses", "--messages", "9"]) == 1
    assert "the user resumes" in capsys.readouterr().out
