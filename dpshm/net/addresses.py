"""Hosts and addresses of both families, IPv4 and IPv6.

A host is what a user gives: a name, or an IP address, an IPv6 address with or without brackets. In an address
(``tcp://[::1]:5000``) and in text for people, an IPv6 address has brackets. libzmq looks for IPv6 only where its
option says so, and then it is IPv6 or IPv4 for the whole socket; so the option is set where it must be.
"""

from __future__ import annotations

import ipaddress
import socket

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


def allow_ipv6(s: Socket, address: str) -> None:
    """Lets a ZMQ socket bind or connect to an address that is IPv6."""
    kind, _, where = address.partition("://")
    if kind == "tcp" and is_ipv6(where.rpartition(":")[0]):
        s.ipv6 = True
