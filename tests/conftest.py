"""Fixtures that every test may use: a group name of its own, and handles that never outlive the test."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from enum import EnumType
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import none

from dpshm.board import files
from dpshm.board.sweep import sweep
from tests.e2e.load import CommandLine
from tests.support import leftovers

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As under nohup and many CI wrappers. Tests send SIGINT to themselves and to children, which inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, and how long it takes to make one, is the machine's affair. Each run has the same.
settings.register_profile("dpshm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dpshm")

_PREFIX = f"test{os.getpid()}-"
_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _own_directory() -> Iterator[None]:
    """A directory of segments for this process: any start removes dead groups, also those that a test needs."""
    path = tempfile.mkdtemp(prefix="dpt-", dir=files.directory())
    os.chmod(path, 0o1777)  # as /dev/shm: some tests are of another user
    before = os.environ.get("DPSHM_DIR")
    os.environ["DPSHM_DIR"] = path
    yield
    if before is None:
        del os.environ["DPSHM_DIR"]
    else:
        os.environ["DPSHM_DIR"] = before
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays(_own_directory: None) -> Iterator[None]:
    """Fails the run if any of its groups is left in the directory of segments."""
    yield
    assert leftovers(_PREFIX) == []


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the environment forbids ``__pycache__``, the processes that tests start share compiled code elsewhere.

    There are hundreds of them, and each would compile dpshm anew.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent  # all workers of this run have it
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")


@pytest.fixture(scope="session", autouse=True)
def _fork_server(_own_directory: None, _compiled_once: None) -> None:
    """Starts the fork server before any test: its processes have its environment, folder and limits.

    Otherwise they would have those of the first test that needs such a process, for the rest of the run.
    """
    forkserver.ensure_running()


@pytest.fixture(autouse=True)
def _numpy_asks_no_enumeration() -> Iterator[None]:
    """Fails a test in which dpshm gives numpy a member of an enumeration.

    numpy asks the type of an operand for its attributes, and forgets every exception of that. Up to Python 3.11 an
    enumeration answers in Python, where a signal handler may raise: that process would never hear of its SIGTERM.
    """
    stock = vars(EnumType).get("__getattr__")
    if stock is None:
        yield
        return
    asked = []

    def note(kind: EnumType, name: str) -> Any:
        if name.startswith("__array_"):
            caller = sys._getframe(1)
            asked.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return stock(kind, name)

    # Not the fixture `monkeypatch`: made before all others, it would put the environment back after them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnumType, "__getattr__", note)
        yield
    assert [place for place in asked if f"{os.sep}dpshm{os.sep}" in place] == []


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name leaves room for sockets, wherever TMPDIR is: their paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dpt-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def group() -> Iterator[str]:
    """A group's name that no other test and no other run uses; fails a test that leaves something of it."""
    name = f"{_PREFIX}{next(_numbers):05d}"
    yield name
    left = leftovers(name)
    if files.segment_path(name).exists():
        sweep(name)
    assert left == []


@pytest.fixture
def using(group: str) -> Iterator[Callable[[Any], Any]]:
    """`using(x)` gives `x` back and closes it when the test ends, the newest first."""
    with ExitStack() as stack:
        yield lambda x: stack.enter_context(closing(x))


@pytest.fixture(scope="session")
def line() -> Iterator[CommandLine]:
    """For ``dpshm`` commands that end by themselves: `line.run("stat", "--schema")`, without a start each."""
    with closing(CommandLine()) as made:
        yield made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The soak first: its minute then goes by beside the others."""
    items.sort(key=lambda item: item.name != "test_soak")


def pytest_collection_finish() -> None:
    """What was collected stays: tests that ask for a collection of garbage do not look at all of it each time.

    Hypothesis makes its source of random numbers first: it warns of one to which nothing seems to refer, and what
    is frozen is not seen to refer to anything.
    """
    given(none())(lambda _: None)()
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says at the end of a run what explorations have seen: a number that is silently small proves little.

    One line for each ``record_property("explored", ...)``. Here, since the process that tells for several knows no
    other conftest.
    """
    lines = [
        value
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
        if name == "explored"
    ]
    if lines:
        terminalreporter.section("explored")
        for line in lines:
            terminalreporter.write_line(line)
