"""Hosts of both families, and which addresses other machines cannot reach."""

from __future__ import annotations

import socket

import pytest
import zmq

from dpshm.net.addresses import allow_ipv6, bare, is_ipv6, is_loopback, is_port, joined, reachable
from dpshm.net.context import context


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("[::1]", True),
        ("ip6-localhost", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:192.168.0.1", False),
        ("[::]", False),
        ("fe80::1%eth0", False),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("lo", False),  # an interface: only ZMQ knows it as a host
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_addresses(host: str, is_local: bool):
    """Guards against a page or a socket without keys that other machines can reach."""
    assert is_loopback(host) is is_local


@pytest.mark.parametrize(
    ("host", "without", "with_port"),
    [
        ("::1", "::1", "[::1]:80"),
        ("[::1]", "::1", "[::1]:80"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:80"),
        ("node", "node", "node:80"),
    ],
)
def test_brackets(host: str, without: str, with_port: str):
    """Guards against an address whose port is taken for a part of it."""
    assert bare(host) == without
    assert joined(host, 80) == with_port


@pytest.mark.parametrize(
    ("text", "is_one"),
    [(p, True) for p in ("0", "65535", "*")]
    + [(p, False) for p in ("", "65536", "99999", "-1", "5x", " 5", "5 ", "0x10", "٣", "1_0")],
)
def test_ports(text: str, is_one: bool):
    """Guards against libzmq, which takes 99999 for 34463, -1 for 65535 and 5x for 5."""
    assert is_port(text) is is_one


def test_what_is_ipv6(monkeypatch: pytest.MonkeyPatch):
    """Guards against the option of a socket that is set for IPv4 too: its addresses would be ::ffff:127.0.0.1."""
    assert is_ipv6("::1")
    assert is_ipv6("[::]")
    for host in ("127.0.0.1", "localhost", "*", "lo", "no-such-host.invalid", "a" * 300):
        assert not is_ipv6(host)

    def only_ipv6(name: str, *_: object, **__: object) -> list[object]:
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))]

    monkeypatch.setattr("socket.getaddrinfo", only_ipv6)  # no resolver here has a name with AAAA alone
    assert is_ipv6("six.example")


def test_the_option_is_set_where_it_must_be():
    """Guards against ``No such device`` for an address that this machine has."""
    for address, expected in (
        ("tcp://[::1]:5", 1),
        ("tcp://127.0.0.1:5", 0),
        ("ipc:///a:b/c", 0),
        ("tcp://lo:*", 0),
    ):
        with context().socket(zmq.PUB) as s:
            allow_ipv6(s, address)
            assert s.ipv6 == expected, address


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("node-7", "node-7"), ("::1", "::1")])
def test_an_address_to_open_is_one_that_can_be_opened(host: str, shown: str):
    """Guards against "http://0.0.0.0:8765", which a browser on another machine cannot open."""
    assert reachable(host) == shown
    for everywhere in ("0.0.0.0", "::", "[::]"):
        assert reachable(everywhere) == socket.gethostname()
