"""What a forked child gives up: descriptors that would speak for its parent after the parent's death.

A child has a copy of every descriptor of its parent. A copy keeps a lock held, a port bound and a connection open,
so a parent that is dead would look alive. Three things prevent that:

- `PrivateFd` and `give_up`: descriptors that children close before any other code of theirs runs.
- `give_up_sockets`: addresses whose sockets children close. libzmq opens its sockets itself and in threads of its
  own, so a child looks through all its descriptors for sockets of these addresses.
- `no_fork`: while a thread opens a descriptor and registers it, no other thread forks. A fork waits for it, so
  there is no moment in which a child gets a descriptor that is not registered.

All this holds for forks that Python knows of (``os.fork``, multiprocessing, a server that forks workers). A
program that is executed gets none of these descriptors, since all of them have ``O_CLOEXEC``.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

MOST_FDS = 1 << 16
"""How far a child looks that cannot list its descriptors."""

T = TypeVar("T")

_forking = threading.RLock()  # held over each fork


_private: dict[object, tuple[int, int, int]] = {}  # a descriptor, and its file's device and inode
_given_up: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()
_addresses: weakref.WeakKeyDictionary[object, tuple[str, ...]] = weakref.WeakKeyDictionary()


@contextmanager
def no_fork() -> Iterator[None]:
    """While it is open, no other thread of this process forks.

    Keep it short. Do not log in it: a fork holds the locks of the logging module while it waits for this one.
    """
    with _forking:
        yield


class PrivateFd:
    """A descriptor that forked children close, and that is closed when this object goes.

    Attributes:
        fd: the descriptor; -1 once closed, and in children.

    Args:
        open_it: opens the descriptor.
    """

    def __init__(self, open_it: Callable[[], int]) -> None:
        with no_fork():
            self.fd = open_it()
            token = object()
            info = os.fstat(self.fd)
            _private[token] = (self.fd, info.st_dev, info.st_ino)
            self._finalizer = weakref.finalize(self, _close_private, token)
            give_up(self, PrivateFd.close)

    def close(self) -> None:
        """Closes it; a second call does nothing."""
        self.fd = -1
        self._finalizer()


def _close_private(token: object) -> None:
    # Without `no_fork`: the garbage collector may call this while the thread holds a lock that a fork waits for.
    # So it is closed first and forgotten afterwards. Its number may mean another file in between.
    fd, *file = _private.get(token, (-1, 0, 0))
    with suppress(OSError):
        info = os.fstat(fd)
        if [info.st_dev, info.st_ino] == file:
            os.close(fd)
    _private.pop(token, None)


def give_up(thing: T, how: Callable[[T], object]) -> None:
    """Has forked children call a function of a thing, as long as the thing lives.

    Call it within the `no_fork` in which the thing was opened.

    Args:
        thing: what holds a descriptor.
        how: closes the descriptor and does nothing else. It must not refer to the thing.
    """
    _given_up[thing] = how


def close_socket(s: socket.socket) -> None:
    """Closes a socket's descriptor, also while files made of the socket are open. For `give_up`."""
    os.close(s.detach())


def give_up_sockets(owner: object, addresses: Iterable[str]) -> None:
    """Has forked children close every socket that is bound or connected to one of these addresses.

    Args:
        owner: its addresses replace those that it gave before, and go with it.
        addresses: as libzmq writes them: ``ipc://PATH`` or ``tcp://HOST:PORT``, the host as a number.
    """
    _addresses[owner] = tuple(addresses)


def _parse(address: str) -> tuple[str, int] | str | None:
    kind, _, rest = address.partition("://")
    if kind == "ipc":
        return rest
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not port.isdecimal():
        return None
    return _host(host.strip("[]")), int(port)


def _host(name: str) -> str:
    """An address as the socket module writes it for either family; empty for all addresses of the machine."""
    try:
        number = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped is not None:
        number = number.ipv4_mapped
    return "" if number.is_unspecified else str(number)


def _close_sockets(addresses: Iterable[str]) -> None:
    wanted = {parsed for address in addresses if (parsed := _parse(address)) is not None}
    if not wanted:
        return
    for fd in _all_fds():
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode) and wanted & _ends(fd):
                os.close(fd)


def _all_fds() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no descriptor is left to list them
        return range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MOST_FDS))


def _ends(fd: int) -> set[tuple[str, int] | str]:
    """The addresses of both ends of a socket, its local one also as one of all addresses of the machine."""
    ends: set[tuple[str, int] | str] = set()
    borrowed = socket.socket(fileno=fd)
    try:
        for local, get in ((True, borrowed.getsockname), (False, borrowed.getpeername)):
            with suppress(OSError):
                name = get()
                if borrowed.family == socket.AF_UNIX:
                    ends.add(os.fsdecode(name))
                elif borrowed.family in (socket.AF_INET, socket.AF_INET6):
                    ends.add((_host(name[0]), name[1]))
                    if local:
                        ends.add(("", name[1]))
    finally:
        borrowed.detach()
    return ends


def _after_fork_in_child() -> None:
    for thing, how in list(_given_up.items()):
        with suppress(OSError):
            how(thing)
    _given_up.clear()
    for token in list(_private):  # what another thread was closing
        _close_private(token)
    try:
        _close_sockets([address for some in _addresses.values() for address in some])
    finally:
        _addresses.clear()
        _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_after_fork_in_child)
