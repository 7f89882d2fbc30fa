"""Hosts and addresses of both families, IPv4 and IPv6.

A host is what a user gives: a name, or an IP address, an IPv6 address with or without brackets. In an address
(``tcp://[::1]:5000``) and in text for people, an IPv6 address has brackets. libzmq looks for IPv6 only where its
option says so, and then it is IPv6 or IPv4 for the whole socket; so the option is set where it must be.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

import zmq

from dpshm.errors import AddressInUse, SettingError
from dpshm.net.context import Socket

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
"""Debian's names. Others are not looked up here: a web site may give its name the address 127.0.0.1."""


def bare(host: str) -> str:
    """A host without the brackets around an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def joined(host: str, port: int | str) -> str:
    """``host:port``, an IPv6 address in brackets."""
    host = bare(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host means this machine, and no other machine can connect to it."""
    if (host := bare(host)) in LOOPBACK_NAMES:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)


def reachable(host: str) -> str:
    """A host for an address that people open: this machine's name in the place of "every address"."""
    return socket.gethostname() if bare(host) in ("0.0.0.0", "::") else host


def is_port(text: str) -> bool:
    """Whether a text is a tcp port, or ``*`` for any. libzmq takes 99999 for 34463, and 5x for 5."""
    return text == "*" or (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535)


def is_ipv6(host: str) -> bool:
    """Whether a host is an IPv6 address, or a name that has no IPv4 address."""
    if ":" in host:
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False  # no host: an interface, a wildcard, or an error that the socket reports
    return all(family == socket.AF_INET6 for family, *_ in found)


def cannot_listen(doing: str, address: str, error: OSError | zmq.ZMQError, advice: str = "") -> SettingError:
    """The error that says why a process cannot listen at an address, and what to do.

    Args:
        doing: what it cannot, such as "cannot bind".
        address: ``tcp://host:port``, ``ipc://path`` or ``host:port``.
        error: of the system or of libzmq, which numbers its errors alike.
        advice: what to change.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    why = f"{doing} {address}: {os.strerror(error.errno or 0) if error.errno else error}"
    if error.errno == errno.EADDRINUSE:
        held = f". `ss -ltnp 'sport = :{port}'` shows which process has it" if port.isdigit() else ""
        return AddressInUse(f"{why}{held}{advice}")
    if error.errno == errno.ENODEV:
        return SettingError(f"{why}; no address, name or interface of this machine is called so{advice}")
    return SettingError(f"{why}{'' if address.startswith('ipc:') else hint(host)}{advice}")


def hint(host: str) -> str:
    """What is missing in a host that cannot be used, for the end of an error's message; empty if nothing is known.

    A link-local address is one of each interface, so it names none without a scope: the system then says
    "Invalid argument" alone.
    """
    try:
        address = ipaddress.IPv6Address(bare(host))
    except ValueError:
        return ""
    if address.is_link_local and address.scope_id is None:
        return f"; a link-local address needs its interface, such as {address}%eth0"
    if address.is_multicast:
        return "; it is a multicast address, which nothing can be bound or connected to"
    if address.is_link_local and address.scope_id not in dict(socket.if_nameindex()).values():
        return f"; this machine has no interface {address.scope_id!r}"
    return ""


def host_of(address: str) -> str:
    """The host in ``tcp://host:port``; empty if the address is of another kind."""
    kind, _, where = address.partition("://")
    return where.rpartition(":")[0] if kind == "tcp" else ""


def allow_ipv6(s: Socket, address: str) -> None:
    """Lets a ZMQ socket bind or connect to an address that is IPv6."""
    if (host := host_of(address)) and is_ipv6(host):
        s.ipv6 = True
