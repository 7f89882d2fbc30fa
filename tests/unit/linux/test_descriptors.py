"""What is said of descriptors that ran out, and what is not."""

from __future__ import annotations

import errno
import os

import pytest

from dpshm import SegmentError, SettingError, TooManyFiles
from dpshm.linux.descriptors import CONTEXT_FDS, check_spare, explained
from tests.support import Remote, RemoteError, count_fds


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_comes_of_it_names_the_limit(number: int, wrapped: bool):
    """Guards against an error that does not say that a limit was reached, or which one."""
    error: Exception = OSError(number, os.strerror(number))
    if wrapped:
        error, error.__cause__ = SegmentError(f"cannot open it: {error}"), error
    says = rf"{os.strerror(number)}.* of \d+ that this process may have: raise"
    with pytest.raises(TooManyFiles, match=says), explained():
        raise error


def test_other_errors_pass():
    """Guards against a wrong setting, or a folder that is not there, that is taken for a limit."""
    for error in (SettingError("dp_size is 0"), FileNotFoundError(errno.ENOENT, "none")):
        with pytest.raises(type(error)) as caught, explained():
            raise error
        assert caught.value is error


def test_what_a_context_needs_is_looked_for_and_given_back(using):
    """Guards against a process that libzmq ends, and against a look that uses up what it looks for."""
    before = count_fds()
    check_spare()
    assert count_fds() <= before
    remote = using(Remote())
    remote.run(
        """
import resource
from dpshm.linux.descriptors import check_spare
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
for _ in range(spare - 1):
    os.close(taken.pop())
""",
        spare=CONTEXT_FDS,
    )
    with pytest.raises(RemoteError, match="Too many open files"):
        remote.run("check_spare()")
    remote.run("os.close(taken.pop())\ncheck_spare()\ncheck_spare()")
