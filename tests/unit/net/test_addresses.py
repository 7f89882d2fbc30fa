"""Hosts of both families, and which addresses other machines cannot reach."""

from __future__ import annotations

import socket

import pytest
import zmq

from dpshm.errors import AddressInUse, SettingError
from dpshm.net.addresses import (
    allow_ipv6,
    bare,
    cannot_listen,
    hint,
    host_of,
    is_ipv6,
    is_loopback,
    is_port,
    joined,
    reachable,
)
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


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("fe80::1", "needs its interface, such as fe80::1%eth0"),
        ("[fe80::1]", "needs its interface"),
        ("fe80::1%nope", "no interface 'nope'"),
        ("ff02::1", "multicast"),
        *((host, "") for host in ("fe80::1%lo", "::1", "2001:db8::1", "127.0.0.1", "node", "*", "")),
    ],
)
def test_what_is_missing_in_a_host_is_said(host: str, says: str):
    """A link-local address without its interface is told so, where the system says "Invalid argument" alone."""
    assert (says in hint(host)) is True
    assert bool(hint(host)) is bool(says)


def test_a_refused_address_says_what_to_do():
    """The error names the address and what to do, and whether the address may be free at the next try."""
    with context().socket(zmq.PUB) as s, socket.create_server(("127.0.0.1", 0)) as taken:
        for address, kind, says in (
            (f"tcp://127.0.0.1:{taken.getsockname()[1]}", AddressInUse, "in use. `ss -ltnp 'sport = :"),
            ("tcp://[fe80::1]:*", SettingError, "needs its interface"),
            ("tcp://nope:*", SettingError, "no address, name or interface"),
        ):
            allow_ipv6(s, address)
            with pytest.raises(zmq.ZMQError) as refused:
                s.bind(address)
            error = cannot_listen("cannot bind", address, refused.value, ". Choose another")
            assert type(error) is kind
            assert str(error).startswith(f"cannot bind {address}: ")
            assert says in str(error)
            assert str(error).endswith(". Choose another")


@pytest.mark.parametrize(
    ("address", "host"),
    [("tcp://[::1]:5", "[::1]"), ("tcp://node:*", "node"), ("ipc:///a:b", ""), ("rubbish", ""), ("", "")],
)
def test_host_of_an_address(address: str, host: str):
    """Only a tcp address has a host."""
    assert host_of(address) == host


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("node-7", "node-7"), ("::1", "::1")])
def test_an_address_to_open_is_one_that_can_be_opened(host: str, shown: str):
    """Guards against "http://0.0.0.0:8765", which a browser on another machine cannot open."""
    assert reachable(host) == shown
    for everywhere in ("0.0.0.0", "::", "[::]"):
        assert reachable(everywhere) == socket.gethostname()
