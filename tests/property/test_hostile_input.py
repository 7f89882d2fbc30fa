"""Every option and every file to the command line: a result or one line of error, never a traceback."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import Coordinator, Engine, Frontend
from dpshm.board import layout
from dpshm.cli import COMMANDS, load_command, main
from dpshm.coordinator.settings import Settings, make_settings
from dpshm.errors import SettingError
from dpshm.frontend import recorder
from dpshm.ops.replay import replay as replay_decisions
from dpshm.ops.replay import summarise
from dpshm.policies import by_name
from dpshm.service.serve import read_config
from dpshm.sim.workloads.traces import TraceError, read_trace
from tests.support import LoneBoard

thorough = settings(deadline=None, derandomize=True, max_examples=150)
ARGUMENT = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["-1", "0", "1", "1e9", "nan", "inf", "9" * 5000, "3-1", "4-", "x:y", "../..", "/dev/null", "least_work"]
    ),
    st.sampled_from(
        ["vllm,least_work:x=1", "round_robin:", "\udc80\udcff", "/proc/self/mem", "-", "--", "", "0:2", "1:1:1"]
    ),
)
ENDLESS = {"coordinator", "demo", "simulate"}
"""Commands that would do what they are told: they always get a file that is not what they want."""


def options(name: str) -> list[str]:
    """A command's options, by the names of its function's parameters, and some that it has not."""
    command = load_command(name)
    names = [f"--{p.replace('_', '-')}" for p in inspect.signature(command).parameters]
    return [*names, "--json", "-g", "-i", "--no-wait", "--force", "--help", "--no-such"]


def run(arguments: list[str]) -> int:
    """Runs ``dpshm`` here; its exit status. Anything but an exit is a bug that a user would see as a traceback."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="")
    before = sys.argv
    sys.argv = ["dpshm", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    finally:
        sys.argv = before
    err.seek(0)
    said = err.read()
    assert "Traceback" not in said
    out.seek(0)
    assert code == 0 or said or out.read(), "it failed without a word"
    return code


@pytest.fixture
def rubbish(tmp_path: Path) -> Path:
    """A file that no command wants."""
    path = tmp_path / "rubbish"
    path.write_bytes(bytes(range(256)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_to_every_command(name: str, rubbish: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against a traceback, or success, for a value that means nothing; no group is here to be found."""
    monkeypatch.setenv("DPSHM_DIR", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    file = "--config" if name == "coordinator" else "--trace"

    @settings(thorough, max_examples=20)
    @given(
        words=st.lists(st.tuples(st.sampled_from(options(name)), ARGUMENT), max_size=4),
        bare=st.lists(ARGUMENT, max_size=2),
    )
    def call(words, bare):
        arguments = [name, *(word for pair in words for word in pair), *bare]
        if name in ENDLESS:
            arguments[1:1] = [file, str(rubbish)]
            arguments = [a for i, a in enumerate(arguments) if i < 3 or a != file]
        assert run(arguments) in (0, 1, 2, 4)

    call()


NESTED = b'{"x":' * 3000
LINES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"TIMESTAMP,ContextTokens,GeneratedTokens",
            b"2023-11-16 18:17:03.9799600,4808,10",
            b"9999-12-31 23:59:59+00:01,1,1",
            b"0001-01-01 00:00:00+23:59,1,1",
            b'{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}',
            b'{"timestamp": 1e308, "input_length": 1, "output_length": 0}',
            b'{"timestamp": 1e999, "input_length": 1, "output_length": 0}',
            b'{"timestamp": 1, "input_length": 1, "output_length": 0, "hash_ids": [1e400]}',
            NESTED,
            NESTED.replace(b"x", b"timestamp"),
            b"\xef\xbb\xbf",
            b"\x1f\x8b\x08",
        ]
    ),
    st.builds(
        lambda t, i, o: json.dumps({"timestamp": t, "input_length": i, "output_length": o}).encode(),
        st.one_of(st.integers(), st.floats(), st.none()),
        st.one_of(st.integers(), st.floats(), st.text(max_size=3)),
        st.integers(),
    ),
)


@pytest.mark.slow
def test_any_trace(tmp_path: Path):
    """Guards against a trace that ends the reader with anything but an error that names its line, or gives nan."""
    path = tmp_path / "trace"

    @settings(thorough, max_examples=400)
    @given(lines=st.lists(LINES, max_size=5), end=st.sampled_from([b"", b"\n", b"\r\n", b"\0"]))
    def read(lines, end):
        path.write_bytes(b"\n".join(lines) + end)
        try:
            arrivals = read_trace(path).arrivals
        except TraceError as e:
            assert str(path) in str(e)  # noqa: PT017
            assert "\n" not in str(e)  # noqa: PT017
            return
        assert arrivals[0].time_s == 0.0
        assert all(a.time_s <= b.time_s < float("inf") for a, b in itertools.pairwise(arrivals))
        assert all(a.prompt_tokens >= 1 and a.output_tokens >= 1 for a in arrivals)

    read()


def test_any_settings(tmp_path: Path):
    """Guards against a settings file that ends the coordinator with a traceback, or that is half understood."""
    path = tmp_path / "dpshm.toml"
    values = st.one_of(
        st.integers(), st.floats(), st.booleans(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
    )

    @settings(thorough, max_examples=300)
    @given(
        data=st.binary(max_size=80),
        given_=st.dictionaries(st.sampled_from([*Settings.__struct_fields__, "x"]), values, max_size=6),
    )
    def read(data, given_):
        path.write_bytes(data)
        with suppress(SettingError):
            make_settings(**read_config(path))
        with suppress(SettingError):
            assert make_settings(**{"group": "g", "dp_size": 2, **given_}).dp_size >= 1

    read()


@pytest.mark.slow
def test_any_decision_ring(tmp_path: Path, group, using):
    """Guards against a ring, torn by who wrote it or damaged since, that `dpshm replay` cannot report on."""
    using(Coordinator(group=group, dp_size=2))
    path = tmp_path / "ring"

    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    frontend = using(Frontend.attach(group, policy="least_work", record=path))
    for i in range(6):
        _booked = frontend.route(i + 1, dp_rank=None)
        engines[0].publish(waiting=i, running=1)
    frontend.close()
    assert run(["replay", str(path), "--json"]) == 0
    start = path.read_bytes()[: 3 * layout.PAGE_BYTES]
    used = [i for i, byte in enumerate(start) if byte]
    size = path.stat().st_size

    @settings(thorough, max_examples=60)
    @given(
        at=st.one_of(st.integers(0, len(start)), st.sampled_from(used)),
        data=st.binary(min_size=1, max_size=12),
        policy=st.sampled_from(["least_work", "least_loaded", "vllm", "power_of_two"]),
        cut=st.one_of(st.none(), st.none(), st.integers(0, 2 * layout.PAGE_BYTES)),
    )
    def replay(at, data, policy, cut):
        with path.open("r+b") as f:
            f.write(start)
            f.truncate(size)
            f.seek(at)
            f.write(data)
            if cut is not None:
                f.truncate(cut)
        with suppress(SettingError):
            header, decisions = recorder.read(path)
            summarise(header.group, header.frontend, policy, replay_decisions(decisions, by_name(policy)))

    replay()


def test_a_board_is_not_a_ring(group, using):
    """Guards against one of our files that is taken for another."""
    board = using(LoneBoard(group))
    assert run(["replay", str(board.segment.path)]) == 2
