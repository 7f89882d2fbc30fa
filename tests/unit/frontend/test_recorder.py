"""The decision recorder: what is kept can be read back as it was seen."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpshm import Engine, Frontend
from dpshm.board import files
from dpshm.board.layout import PAGE_BYTES
from dpshm.board.words import pack_load
from dpshm.errors import SettingError
from dpshm.frontend.recorder import MAX_SLOTS, RING_BYTES, Recorder, default_path, read, slot_bytes
from dpshm.policies import Request, View
from dpshm.policies.columns import VECTOR_FROM, ArrayRows, ArrayWork, ListColumns, ListWork, columns_of
from dpshm.rules.liveness import Verdict
from tests.support import LoneBoard

NOW = 123_456_789_000


def view_of(rng: random.Random, n: int, *, with_work: bool, now_ns: int = NOW) -> View:
    """A view with numbers of every size, in the form of a group of so many ranks."""

    def column() -> list[int]:
        return [rng.randrange(1 << rng.randrange(1, 63)) for _ in range(n)]

    ranks = rng.sample(range(n), rng.randint(1, n))
    load, requests = [pack_load(rng.randrange(9), rng.randrange(99), rng.random()) for _ in range(n)], column()
    work = ListWork(
        column(), [[NOW] * n, [5] * n, [700] * n], [column()[:1] * 7 for _ in range(n)], now_ns, n % 2 == 1
    )
    own = [rng.randrange(9) for _ in range(n)]
    weights = rng.choice([None, [rng.uniform(0.1, 10) for _ in range(n)]])
    return View(columns_of(ListColumns(ranks, load, requests, own, 4, work if with_work else None, weights)))


def plain(view: View) -> object:
    """A view as lists, to compare."""

    def listed(columns: object) -> list[object]:
        if isinstance(columns, ArrayRows):
            return [columns.counts.tolist(), columns.steps.tolist()]
        items = (getattr(columns, name) for name in columns.__struct_fields__)
        nested = (ListWork, ArrayWork, ArrayRows)
        return [listed(x) if isinstance(x, nested) else np.asarray(x).tolist() for x in items]

    return listed(view.columns)


@pytest.mark.parametrize("with_work", [False, True])
@pytest.mark.parametrize("n", [1, 8, VECTOR_FROM])
def test_what_was_seen_is_what_is_read(tmp_path, n, with_work):
    """Guards against a replay that asks about something else than what was decided."""
    rng, path = random.Random(n), tmp_path / "ring"
    recorder = Recorder.create(path, engines=n, group="g", frontend=3, slots=8)
    kept = []
    for i in range(8):
        view = view_of(rng, n, with_work=with_work, now_ns=NOW + i)
        cached = rng.choice([None, [rng.randrange(1 << 31) for _ in range(n)]])
        request = Request(rng.randrange(1 << 31), rng.choice([None, rng.randrange(1 << 63)]), cached)
        choice = int(view.ranks[-1])
        recorder.record(NOW + i, view, request, choice, [NOW + i - 7] * n)
        kept.append((view, request, choice))
    recorder.close()
    header, decisions = read(path)
    assert (header.group, header.frontend, header.engines, header.slots, header.pid) == ("g", 3, n, 8, os.getpid())
    assert [d.number for d in decisions] == list(range(1, 9))
    for d, (view, request, choice) in zip(decisions, kept, strict=True):
        assert plain(d.view) == plain(view)
        assert type(d.view.columns) is type(view.columns)
        assert (d.request, d.choice, d.age_ns) == (request, choice, [7] * n)


def test_the_oldest_make_room(tmp_path):
    """Guards against a ring that grows, stops, or mixes old and new."""
    rng, path = random.Random(1), tmp_path / "ring"
    recorder = Recorder.create(path, engines=4, group="g", frontend=0, slots=5)
    size = path.stat().st_size
    for i in range(13):
        recorder.record(i, view_of(rng, 4, with_work=True), Request(i), 0, [0] * 4)
        decisions = read(path)[1]
        # Those whose choice (0) was not among the random ranks are not taken for whole.
        assert {d.request.prompt_tokens for d in decisions} <= set(range(max(0, i - 4), i + 1))
    assert path.stat().st_size == size


def test_a_record_of_the_largest_numbers_fits(tmp_path):
    """Guards against a slot that runs over into the next."""
    for n in (1, 8, 64):
        path = tmp_path / str(n)
        recorder = Recorder.create(path, engines=n, group="g", frontend=0, slots=2)
        top = (1 << 63) - 1
        work = ListWork([top] * n, [[top] * n] * 3, [[top] * 7] * n, top)
        view = View(ListColumns(list(range(n)), [top] * n, [top] * n, [top] * n, top, work, [1 / 3] * n))
        for _ in range(2):
            recorder.record(top, view, Request(top, top, [top] * n), 0, [top] * n)
        assert len(read(path)[1]) == 2


def test_a_slot_that_is_being_filled_is_left_out(tmp_path):
    """Guards against half a record that is taken for a whole one."""
    path = tmp_path / "ring"
    recorder = Recorder.create(path, engines=2, group="g", frontend=0, slots=4)
    view = View(ListColumns([0, 1], [0, 0], [0, 0], [0, 0], 1))
    for i in range(4):
        recorder.record(i, view, Request(i), 0, [0, 0])
    whole = path.read_bytes()
    second = PAGE_BYTES + 8 + slot_bytes(2)
    for broken in (
        whole[:second] + bytes(8) + whole[second + 8 :],  # its number is cleared
        whole[: second + 8] + b"\xff" * 8 + whole[second + 16 :],  # its length is not one
        whole[: second + 20] + b"\xc1" * 12 + whole[second + 32 :],  # its bytes are of two
    ):
        path.write_bytes(broken)
        assert [d.request.prompt_tokens for d in read(path)[1]] == [0, 2, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no decision ring"),
        (b"x" * 9000, "is no decision ring"),
        (
            b"DPSHMREC\x07\0\0\0\x02\0\0\0{}" + bytes(9000),
            "is a decision ring of version 7, and this dpshm reads 3",
        ),
        (b"DPSHMREC\x03\0\0\0\x02\0\0\0{}" + bytes(9000), "the header cannot be read"),
    ],
)
def test_another_file_is_refused(tmp_path, data, message):
    """Guards against figures made of a file that holds no decisions."""
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(SettingError, match=message):
        read(path)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_ring(path):
    """Guards against a read that has no end, and takes all memory."""
    with pytest.raises(SettingError, match=f"{path} is no file"):
        read(Path(path))


def test_the_groups_name_in_a_ring_is_printable(tmp_path):
    """Guards against a recording that another user made, whose text a terminal obeys."""
    path = tmp_path / "ring"
    Recorder.create(path, engines=2, group="ggggggggggg", frontend=0, slots=4)
    path.write_bytes(path.read_bytes().replace(b'"ggggggggggg"', b'"g\\u001b[31m"'))
    assert read(path)[0].group == "g\N{REPLACEMENT CHARACTER}[31m"


def test_a_ring_that_is_cut_off_is_refused(tmp_path):
    """Guards against a copy that was interrupted and is read as if it were whole."""
    path = tmp_path / "ring"
    Recorder.create(path, engines=2, group="g", frontend=0, slots=4)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SettingError, match="the file is cut off"):
        read(path)
    with pytest.raises(SettingError, match="cannot read the decision ring"):
        read(tmp_path / "none")


def test_only_a_ring_is_replaced(tmp_path):
    """Guards against `record="/dev/null"` by root, which made a file of the device, and against a user's file that
    is lost because a ring was given its name.
    """
    path = tmp_path / "file"
    kept = (lambda: path.write_text("a user's"), lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/null"))
    for make in kept:
        make()
        before = path.lstat()
        with pytest.raises(
            SettingError, match=f"cannot make the decision ring {path}: something else has that name"
        ):
            Recorder.create(path, engines=2, group="g", frontend=0)
        assert os.path.samestat(path.lstat(), before)
        assert os.listdir(tmp_path) == ["file"]
        path.unlink()
    path.touch()  # as tempfile makes it
    for _ in range(2):
        Recorder.create(path, engines=2, group="g", frontend=0).close()
        assert read(path)[0].group == "g"


def test_a_ring_that_cannot_be_made(tmp_path):
    """Guards against a draft that is left behind, and against an error without the file's name."""
    (tmp_path / "ring").mkdir()
    with pytest.raises(SettingError, match=r"cannot make the decision ring .*ring"):
        Recorder.create(tmp_path / "ring", engines=2, group="g", frontend=0)
    assert os.listdir(tmp_path) == ["ring"]
    for wrong in (tmp_path / "ring" / "no" / "ring", Path("")):
        with pytest.raises(SettingError, match="decision ring"):
            Recorder.create(wrong, engines=2, group="g", frontend=0)
    with pytest.raises(SettingError, match="0 slots"):
        Recorder.create(tmp_path / "other", engines=2, group="g", frontend=0, slots=0)


@pytest.mark.parametrize("policy", ["least_loaded", "least_work", "affinity"])
@pytest.mark.parametrize("where", [True, "named"])
def test_a_frontend_records_its_decisions(group, using, tmp_path, policy, where):
    """Guards against a recorder that sees another view than the policy did: each choice must come out again."""
    from dpshm.policies import by_name

    using(LoneBoard(group, watched=False, dp_size=3))
    engines = [using(Engine.attach(group, rank)) for rank in range(3)]
    record = True if where is True else tmp_path / "ring"
    frontend = using(Frontend.attach(group, policy=policy, record=record))
    path = default_path(group, frontend.index) if where is True else Path(record)
    routes = []
    for i in range(60):
        engines[i % 3].publish(waiting=i % 5, running=i % 7, prefill_backlog=100 * i)
        with engines[i % 2].step(prefill_tokens=i, batch=2):
            routes.append(frontend.route(10 * i, key=i % 4 or None))
    header, decisions = read(path)
    assert (header.group, header.frontend) == (group, frontend.index)
    assert [d.choice for d in decisions] == [route.dp_rank for route in routes]
    assert [by_name(policy)(d.view, d.request) for d in decisions] == [d.choice for d in decisions]
    assert all(age >= 0 for d in decisions[3:] for age in d.age_ns)
    assert all(d.view.has_work for d in decisions)  # whatever the policy needs
    files.sockets_path(group)
    if where is True:
        frontend.close()
        path.unlink()
        path.parent.rmdir()


@pytest.mark.parametrize("dp_size", [3, VECTOR_FROM])
@pytest.mark.parametrize("policy", ["least_loaded", "power_of_two"])
def test_weights_are_replayed(group, using, tmp_path, policy, dp_size):
    """Guards against a replay that takes unlike ranks for equal ones, and so chooses otherwise than was chosen."""
    from dpshm.policies import by_name

    using(LoneBoard(group, engines=dp_size, dp_size=dp_size)).mark(range(dp_size), Verdict.ALIVE)
    frontend = using(Frontend.attach(group, policy=policy, record=tmp_path / "ring", weights={0: 4.0, 2: 0.5}))
    routes = [frontend.route() for _ in range(60)]
    _, decisions = read(tmp_path / "ring")
    assert decisions[0].view.weights == [4.0, 1.0, 0.5, *[1.0] * (dp_size - 3)]
    assert [by_name(policy)(d.view, d.request) for d in decisions] == [route.dp_rank for route in routes]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_record_with_weights_that_cannot_be_is_left_out(tmp_path, weight):
    """Guards against a damaged recording that ends a replay with a division by zero."""
    path = tmp_path / "ring"
    recorder = Recorder.create(path, engines=2, group="g", frontend=0, slots=4)
    for weights in ([1.0, weight], [1.0], [1.0, 2.0]):
        view = View(ListColumns([0, 1], [0, 0], [1, 1], [0, 0], 1, None, weights))
        recorder.record(NOW, view, Request(1), 0, [0, 0])
    assert [d.view.weights for d in read(path)[1]] == [[1.0, 2.0]]


def test_every_policy_can_be_asked_about_a_recording(group, using, tmp_path):
    """Guards against a recording that lacks what another policy than the recorded one needs: tokens, or hits."""
    from dpshm.policies import NAMES, by_name

    board = using(LoneBoard(group, watched=False, dp_size=2))
    board.segment.sockets_path.mkdir(0o700)
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    cache = engines[1].open_cache(100)
    cache.insert(cache.hasher.fingerprints(range(32)))
    board.step_model[:2, 3:6] = (8_000_000, 200_000, 40_000)  # as both have learnt it
    frontend = using(Frontend.attach(group, policy="least_loaded", record=tmp_path / "ring"))
    frontend.choose(prompt=range(40))
    frontend.choose(40)
    _, decisions = read(tmp_path / "ring")
    assert [d.request.cached for d in decisions] == [[0, 32], None]
    assert by_name("least_work")(decisions[0].view, decisions[0].request) == 1
    for policy in NAMES:
        assert {by_name(policy)(d.view, d.request) for d in decisions} <= {0, 1}


@pytest.mark.parametrize("engines", [1, 2, 8, 64, 256, 1024])
def test_a_ring_is_small(tmp_path, engines):
    """Guards against a ring for the board's capacity: 141 MiB where a container has 64 for all of /dev/shm."""
    recorder = Recorder.create(tmp_path / "ring", engines=engines, group="g", frontend=0)
    size = (tmp_path / "ring").stat().st_size
    assert size <= max(RING_BYTES, PAGE_BYTES + 8 + slot_bytes(engines))
    assert recorder.header.slots == MAX_SLOTS or size + slot_bytes(engines) > RING_BYTES
    recorder.close()


def test_a_ring_grows_with_the_group(group, using, tmp_path):
    """Guards against records that run over their slots when a group is scaled."""
    board = using(LoneBoard(group, engines=40, dp_size=2))
    frontend = using(Frontend.attach(group, record=tmp_path / "ring"))
    frontend.choose(5)
    small = (tmp_path / "ring").stat().st_size
    board.marks.set_dp_size(40)
    board.mark(range(40), Verdict.ALIVE)
    chosen = [frontend.choose(i) for i in range(50)]
    header, decisions = read(tmp_path / "ring")
    assert (header.engines, [d.choice for d in decisions]) == (40, chosen)
    assert max(small, (tmp_path / "ring").stat().st_size) <= RING_BYTES


def test_a_ring_that_cannot_grow_ends_no_routing(group, using, tmp_path, caplog):
    """Guards against a full tmpfs that stops requests because their record has no room."""
    board = using(LoneBoard(group, engines=4, dp_size=2))
    (tmp_path / "folder").mkdir()
    frontend = using(Frontend.attach(group, record=tmp_path / "folder" / "ring"))
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").write_text("in the way")
    board.marks.set_dp_size(4)
    board.mark(range(4), Verdict.ALIVE)
    assert {frontend.choose(5) for _ in range(8)} == {0, 1, 2, 3}
    assert len([m for m in caplog.messages if "no decision is recorded any more" in m]) == 1


def test_a_frontend_without_its_ring_has_left(group, using):
    """Guards against an event of a front-end that died, where its attach failed."""
    board = using(LoneBoard(group))
    with pytest.raises(SettingError, match="cannot make the decision ring"):
        Frontend.attach(group, record="/nonexistent/x/ring")
    assert board.frontend_incarnation.tolist() == [1, 0, 0, 0]
    assert board.frontend_pid.tolist() == [0, 0, 0, 0]
