"""An HTTP server whose clients cannot use up the descriptors and threads of its process.

The metrics of a coordinator are served from the coordinator's own process, where libzmq aborts if no descriptor is
left for a connection. So a port has a fixed number of connections, and a client has two seconds for its request.
If all connections are taken, the one that has waited longest for its request is ended for the next client. So
clients that connect and say nothing keep no other client out.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from dpshm.errors import SettingError
from dpshm.linux.forks import close_socket, give_up, no_fork
from dpshm.net.addresses import bare, cannot_listen, hint, is_ipv6, joined

MAX_CONNECTIONS = 16
REQUEST_TIMEOUT_S = 2.0
"""For a whole request, and for each part of an answer that the client does not read."""
_ACCEPT_PAUSE_S = 0.05
_METHODS = ("GET", "HEAD")


class BoundedServer(ThreadingHTTPServer):
    """Serves each connection from a thread of its own, `max_connections` at most.

    Args:
        host: to listen on; not a name of another machine.
        port: 0 means any.
        handler: what handles a request.
        settings: those of the host and of the port; the error names the one to change.
        max_connections: how many there may be at once.

    Raises:
        SettingError: it cannot listen there.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        handler: type[BoundedHandler],
        *,
        settings: tuple[str, str],
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        host = bare(host)
        self.address_family = socket.AF_INET6 if is_ipv6(host) else socket.AF_INET
        self._max_connections = max_connections
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._waiting: dict[socket.socket, float] = {}  # for a request, since when; oldest first
        try:
            with no_fork():
                super().__init__(self._resolved(host, port), handler)
                give_up(self.socket, close_socket)
        except (OSError, UnicodeError) as e:  # UnicodeError: a name that can be none
            where = joined(host, port)
            if isinstance(e, OSError) and not isinstance(e, socket.gaierror):
                wrong = settings[0 if e.errno in (errno.EADDRNOTAVAIL, errno.EINVAL) else 1]
                raise cannot_listen("cannot listen on", where, e, f". Choose another {wrong}") from e
            why = (isinstance(e, OSError) and e.strerror) or e
            raise SettingError(f"cannot listen on {where}: {why}{hint(host)}. Choose another {settings[0]}") from e

    def _resolved(self, host: str, port: int) -> Any:
        """The address to bind; with the interface that a link-local one names."""
        if self.address_family == socket.AF_INET6:
            return socket.getaddrinfo(host, port, socket.AF_INET6, socket.SOCK_STREAM)[0][4]
        return (host, port)

    def server_bind(self) -> None:
        """Binds; does not look its own name up, as the base class does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def heard(self, connection: socket.socket) -> None:
        """The request of a connection has come; from now on it is not ended for another one."""
        with self._changed:
            self._waiting.pop(connection, None)

    # What the base classes call.

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection."""
        try:
            with no_fork():
                connection, address = super().get_request()
                give_up(connection, close_socket)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_ACCEPT_PAUSE_S)  # the connection stays in the queue, and the socket readable
            raise
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a connection's thread, once there is room for it."""
        with self._changed:
            if len(self._open) >= self._max_connections:
                self._end_waiting(1)
                self._changed.wait_for(lambda: len(self._open) < self._max_connections, REQUEST_TIMEOUT_S)
            refused = len(self._open) >= self._max_connections
            if not refused:
                self._open.add(request)
                self._waiting[request] = time.monotonic()
        if refused:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        """Closes a connection."""
        super().close_request(request)
        with self._changed:
            self._open.discard(request)
            self._waiting.pop(request, None)
            self._changed.notify_all()

    def service_actions(self) -> None:
        """Called at each poll of the server: ends connections that took too long."""
        with self._changed:
            before = time.monotonic() - REQUEST_TIMEOUT_S
            self._end_waiting(sum(since < before for since in self._waiting.values()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""

    def _end_waiting(self, count: int) -> None:
        for connection in list(self._waiting)[:count]:
            del self._waiting[connection]
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes it


class BoundedHandler(BaseHTTPRequestHandler):
    """One request: GET, or HEAD, which is answered alike, without the body. A subclass has `do_GET`."""

    server: BoundedServer
    server_version = "dpshm"
    sys_version = ""
    timeout = REQUEST_TIMEOUT_S

    def parse_request(self) -> bool:
        """Reads the head of the request."""
        parsed = super().parse_request()
        self.server.heard(self.connection)
        if parsed and self.command not in _METHODS:
            self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
            self.send_header("Allow", ", ".join(_METHODS))
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return False
        return parsed

    def do_GET(self) -> None:
        """Answers the request."""
        raise NotImplementedError

    def do_HEAD(self) -> None:
        """Answers what a health check of a load balancer asks."""
        self.do_GET()

    def send_body(self, body: bytes) -> None:
        """Sends what follows the head."""
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: a line for each request helps no reader."""
