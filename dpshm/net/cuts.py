"""How a tcp connection to another node is found to be cut, where no end is told.

The kernel does it: it gives a connection up when what was sent is not acknowledged for `CUT_MS`, or when probes of
an idle one are not answered, after 2 to 3 s. ZMQ then connects again. ZMQ's own heartbeats must not be used: where
messages of a socket wait to be read and the peer goes, libzmq ends the process (`Assertion failed: !_io_error`).
"""

from __future__ import annotations

import zmq

from dpshm.net.context import Socket

CUT_MS = 1500
PROBE_S, PROBES = 1, 2
RECONNECT_MS, CONNECT_TIMEOUT_MS = 50, 1000


def notice_cuts(s: Socket) -> None:
    """Sets a tcp socket up so that it gives a cut connection up; before it connects or binds."""
    s.setsockopt(zmq.TCP_MAXRT, CUT_MS)
    s.tcp_keepalive, s.tcp_keepalive_idle, s.tcp_keepalive_intvl, s.tcp_keepalive_cnt = 1, PROBE_S, PROBE_S, PROBES
    s.reconnect_ivl, s.connect_timeout = RECONNECT_MS, CONNECT_TIMEOUT_MS
