"""Processes that run out of file descriptors: they are told so, and libzmq ends none where we can help it.

libzmq calls abort() where it cannot make the epoll of its I/O thread. So before a context gets its first socket,
`check_spare` sees whether there are as many descriptors as it needs; and what runs into the limit anywhere else
raises one error, which names the limit (`explained`).

It also calls abort() where it cannot accept a connection to an ipc socket, and that cannot be seen beforehand. A
coordinator of 400 ranks, with two connections and a pidfd each, needs more than the usual 1024 descriptors: so the
processes that are a coordinator's own take all that they may have (`raise_limit`). Should one end all the same, it
is a coordinator that was killed.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from dpshm.errors import TooManyFiles

CONTEXT_FDS = 8
"""What a context and its first socket open, and two more: measured with libzmq 4.3.5."""


def check_spare() -> None:
    """Raises OSError (EMFILE) unless this process may open `CONTEXT_FDS` descriptors more."""
    opened: list[int] = []
    try:
        while len(opened) < CONTEXT_FDS:
            opened.append(os.eventfd(0, os.EFD_CLOEXEC))
    finally:
        for fd in opened:
            os.close(fd)


def raise_limit() -> None:
    """Lets this process have as many descriptors as it may ever have. For processes of our own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def explained() -> Iterator[None]:
    """Turns the system's "too many open files", wherever it comes from, into `TooManyFiles`."""
    try:
        yield
    except Exception as e:
        numbers = {getattr(error, "errno", None) for error in (e, e.__cause__)}
        if not numbers & {errno.EMFILE, errno.ENFILE}:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise TooManyFiles(
            f"{e}: no file descriptor is left, of {limit} that this process may have: raise the limit (ulimit -n, "
            "systemd's LimitNOFILE), or find what keeps files open: ls -l /proc/PID/fd"
        ) from None
