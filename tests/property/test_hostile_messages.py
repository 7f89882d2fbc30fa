"""Every byte string to every socket of a real coordinator; afterwards its honest peers still make waves."""

from __future__ import annotations

import logging
import socket
from contextlib import closing, suppress
from random import Random

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from dpshm import Coordinator
from dpshm.net.wire import encode_scale
from tests.fuzz.__main__ import quiet
from tests.fuzz.messages import frames
from tests.hostile import Honest, dial, frame, send_while_taken
from tests.support import wait_until

thorough = settings(deadline=None, derandomize=True, max_examples=150)
SOCKETS = st.integers(0, 2)
BYTES = st.binary(max_size=60)


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks in this process, whose log a test can see."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def addresses(coordinator):
    """Its three sockets."""
    return coordinator.stats_publish_address, *coordinator.engine_addresses


@pytest.fixture
def sockets(addresses, using):
    """A peer of each, of the right kind."""
    peers = [using(zmq.Context.instance().socket(kind)) for kind in (zmq.XSUB, zmq.XSUB, zmq.PUSH)]
    for s, address in zip(peers, addresses, strict=True):
        s.linger = 0
        s.sndhwm = 0
        s.connect(address)
    return peers


def check(coordinator, group, caplog, frontend=None):
    """Waits until all was heard; then a wave has to go round, and nothing may have gone wrong inside.

    On a busy machine the coordinator may be quiet for a while. What `frontend`, a socket, sent last is heard last.
    """
    quiet(coordinator.board)
    for dp_size in (61, 2) if frontend else ():  # no other message asks for 61 ranks
        wait_until(
            lambda dp_size=dp_size: frontend.send(encode_scale(dp_size)) or coordinator.board.dp_size == dp_size
        )
    with closing(Honest(group)) as honest:
        honest.go_round()
    assert coordinator.is_healthy()
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.slow
def test_any_bytes(coordinator, group, sockets, caplog):
    """Guards against bytes, in one frame or several, that end the wave thread or make it deaf."""

    @thorough
    @given(which=SOCKETS, parts=st.lists(BYTES, min_size=1, max_size=4))
    def send(which, parts):
        sockets[which].send_multipart(parts)

    send()
    check(coordinator, group, caplog)
    assert coordinator.board.words[coordinator.board.index("messages_received")] > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_messages_that_are_almost_right(coordinator, group, sockets, caplog, seed):
    """Guards against well-formed messages with values that cannot be, which reach further than rubbish does."""
    rng = Random(seed)
    for _ in range(4000):
        rng.choice(sockets).send_multipart(frames(rng))
    check(coordinator, group, caplog, sockets[0])


@pytest.mark.slow
def test_any_bytes_below_zmq(coordinator, group, addresses, caplog):
    """Guards against peers that do not speak ZMTP as it must be: before, in and after the handshake."""

    @thorough
    @given(
        which=SOCKETS,
        greeted=st.booleans(),
        parts=st.lists(
            st.one_of(BYTES, st.builds(frame, BYTES, more=st.booleans(), command=st.booleans())), max_size=4
        ),
    )
    def speak(which, greeted, parts):
        with (
            suppress(socket.timeout),
            dial(addresses[which], (b"XSUB", b"XSUB", b"PUSH")[which] if greeted else None) as s,
        ):
            send_while_taken(s, parts)

    speak()
    check(coordinator, group, caplog)


@pytest.mark.slow
def test_what_a_coordinator_sends_may_be_rubbish_too(group, using, caplog):
    """Guards against an engine or front-end that a false coordinator ends: the address is in shared memory."""
    coordinator = using(Coordinator(group=group, dp_size=2))
    honest = using(Honest(group))
    honest.go_round()
    rng = Random(5)

    def speak(publisher):
        for _ in range(3000):
            publisher.send_multipart(frames(rng))

    coordinator._wave.mailbox.call(lambda: speak(coordinator._wave._sockets.to_engines))
    coordinator._wave.mailbox.call(lambda: speak(coordinator._wave._sockets.frontends))

    def dropped():
        for engine in honest.engines:
            engine.poll(1)
        return sum("dropped a message" in r.message for r in caplog.records)

    for count in range(1, 101):
        wait_until(lambda count=count: dropped() >= count)
    for engine in honest.engines:
        assert engine.wave >= 0
    honest.frontend.route().cancel()
