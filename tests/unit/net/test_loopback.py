"""Which addresses other machines cannot reach."""

from __future__ import annotations

import pytest

from dpshm.net.loopback import is_loopback


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
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
