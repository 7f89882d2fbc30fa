"""Tests of `dpshm.ops.bounded_http`: clients that keep connections, over real sockets."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from contextlib import ExitStack, closing

import pytest

from dpshm import SettingError
from dpshm.ops import bounded_http
from dpshm.ops.bounded_http import BoundedHandler, BoundedServer
from tests.support import wait_until

MAX = 4


class Handler(BoundedHandler):
    """Answers with a word; under /wait not before it is let go."""

    def do_GET(self) -> None:
        """Answers."""
        if self.path == "/wait":
            assert isinstance(self.server, Server)
            self.server.let_go.wait(30)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"word")


class Server(BoundedServer):
    """A server that runs, and notes the most connections that it had open at once."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 0, Handler, settings=("host", "port"), max_connections=MAX)
        self.let_go = threading.Event()
        self.most = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def process_request(self, request, client_address):
        """Counts."""
        super().process_request(request, client_address)
        self.most = max(self.most, len(self._open))

    def connect(self) -> socket.socket:
        """A connection that says nothing."""
        return socket.create_connection(("127.0.0.1", self.server_port), timeout=60)

    def get(self, path: str = "/") -> bytes:
        """An answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=60)) as client:
            client.request("GET", path)
            return client.getresponse().read()

    def open(self) -> int:
        """How many connections there are."""
        return len(self._open)

    def close(self) -> None:
        """Ends."""
        self.let_go.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


@pytest.fixture
def server(using):
    """A server."""
    return using(Server())


def ended(s: socket.socket) -> bool:
    """Whether the server has ended a connection. Waits for it."""
    try:
        return s.recv(1) == b""
    except ConnectionResetError:
        return True


def test_idle_connections_keep_no_client_out(server):
    """Guards against a port that idle connections fill: each is a descriptor and a thread of the coordinator's."""
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(server.connect())) for _ in range(10 * MAX)]
        assert server.get() == b"word"
        assert all(ended(s) for s in idle[: 9 * MAX])  # the oldest go first
        assert server.most == MAX


def test_a_request_that_comes_in_slowly(server, monkeypatch):
    """Guards against a client that sends a byte now and then, and holds its connection for ever."""
    monkeypatch.setattr(bounded_http, "REQUEST_TIMEOUT_S", 0.3)
    with closing(server.connect()) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")

        def goes_on() -> bool:
            time.sleep(0.02)
            try:
                slow.sendall(b"x")
            except OSError:
                return False
            return True

        wait_until(lambda: not goes_on())
        wait_until(lambda: server.open() == 0)


def test_connections_that_are_served_are_not_ended(server, monkeypatch):
    """Guards against a client that takes the place of one that is being answered."""
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(server.get("/wait"))) for _ in range(MAX)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.open() == MAX and not server._waiting)
    monkeypatch.setattr(bounded_http, "REQUEST_TIMEOUT_S", 0.1)
    with closing(server.connect()) as one_more:
        assert ended(one_more)
    server.let_go.set()
    for thread in threads:
        thread.join()
    assert answers == [b"word"] * MAX
    assert server.get() == b"word"


def test_a_port_in_use(server):
    """Guards against an error that does not say which setting to change."""
    with pytest.raises(SettingError, match=rf"cannot listen on 127.0.0.1:{server.server_port}.* another other"):
        BoundedServer("127.0.0.1", server.server_port, Handler, settings=("host", "other"))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "a" * 300, "a..b"])
def test_a_host_that_is_not_here(host):
    """The error names the setting of the host, not that of the port, which no choice of a port mends."""
    with pytest.raises(SettingError, match=r"cannot listen on .*Choose another host$"):
        BoundedServer(host, 0, Handler, settings=("host", "port"))


def test_a_forked_child_has_not_the_port(server):
    """Guards against a worker that keeps the port of its dead parent."""
    with closing(server.connect()):
        wait_until(lambda: server.open() == 1)
        (accepted,) = server._open
        numbers = (server.fileno(), accepted.fileno())
        pid = os.fork()
        if pid == 0:
            alive = 0
            for number in numbers:
                try:
                    os.fstat(number)
                    alive += 1
                except OSError:
                    pass
            os._exit(alive)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert server.get() == b"word"
