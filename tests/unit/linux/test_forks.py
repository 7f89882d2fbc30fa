"""Tests of `dpshm.linux.forks`: what a forked child has of its parent's descriptors."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import zmq

from dpshm.linux.forks import PrivateFd, close_socket, give_up, give_up_sockets, no_fork


def in_child(what: Callable[[], object]) -> str:
    """What a function returns in a forked child of this process, as text."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write_fd, str(what()).encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as f:
        text = f.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


def is_open(fd: int) -> bool:
    """Whether a number is a descriptor of this process."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_private_descriptor_is_not_in_children():
    """Guards against a child that holds its dead parent's lock."""
    fd = PrivateFd(lambda: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    number = fd.fd
    assert in_child(lambda: (is_open(number), fd.fd)) == "(False, -1)"
    assert is_open(number)
    fd.close()
    fd.close()
    assert not is_open(number)
    assert fd.fd == -1


def test_a_private_descriptor_goes_with_its_owner():
    """Guards against descriptors that stay open after an error has dropped what held them."""
    number = PrivateFd(lambda: os.open("/dev/null", os.O_RDONLY)).fd
    assert not is_open(number)


def test_a_child_calls_what_was_given_up():
    """Guards against a child that listens on its dead parent's port, or closes another file by its number."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        give_up(server, close_socket)
        number = server.fileno()
        assert in_child(lambda: (is_open(number), server.fileno())) == "(False, -1)"
        assert is_open(number)


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_children_close_libzmqs_sockets(short_path: Path, kind: str):
    """Guards against a child that keeps its dead parent's address bound, and its connections open."""
    others = open_sockets()  # what other tests have closed may go meanwhile

    def count_ours() -> int:
        return len(open_sockets() - others)

    server, client = zmq.Context(), zmq.Context()
    pull, push = server.socket(zmq.PULL), client.socket(zmq.PUSH)
    other, to_other = server.socket(zmq.PULL), client.socket(zmq.PUSH)
    try:
        pull.bind("tcp://127.0.0.1:*" if kind == "tcp" else f"ipc://{short_path}/given")
        other.bind("tcp://127.0.0.1:*" if kind == "tcp" else f"ipc://{short_path}/other")
        address = pull.getsockopt_string(zmq.LAST_ENDPOINT)
        for s, to in ((push, address), (to_other, other.getsockopt_string(zmq.LAST_ENDPOINT))):
            s.connect(to)
            s.send(b"")
        assert pull.poll(60_000)
        assert other.poll(60_000)
        before = count_ours()
        assert int(in_child(count_ours)) == before
        owner = PrivateFd(lambda: os.open("/dev/null", os.O_RDONLY))
        give_up_sockets(owner, (address,))
        assert int(in_child(count_ours)) == before - 3  # bound, accepted, connected
        assert count_ours() == before
        owner.close()
        del owner
        assert int(in_child(count_ours)) == before
        push.send(b"still")
        pull.recv()
        assert pull.poll(60_000)
    finally:
        client.destroy(linger=0)
        server.destroy(linger=0)


def open_sockets() -> set[str]:
    """This process's sockets, by number: no other socket gets it while one is open."""
    return {name for name in open_files() if name.startswith("socket:")}


def open_files() -> list[str]:
    """What each descriptor of this process means."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return names


def test_a_socket_of_all_addresses_of_the_machine():
    """Guards against a coordinator on 0.0.0.0 whose connections have another local address."""
    with closing(socket.create_server(("0.0.0.0", 0))) as server:
        port = server.getsockname()[1]
        owner = PrivateFd(lambda: os.open("/dev/null", os.O_RDONLY))
        give_up_sockets(owner, (f"tcp://0.0.0.0:{port}",))
        with closing(socket.create_connection(("127.0.0.1", port))), closing(server.accept()[0]) as accepted:
            numbers = (server.fileno(), accepted.fileno())
            assert in_child(lambda: [is_open(number) for number in numbers]) == "[False, False]"


def test_a_fork_waits_for_a_thread_that_opens():
    """Guards against a fork between the open of a descriptor and its registration."""
    opening, forked, order = threading.Event(), threading.Event(), []

    def open_slowly() -> None:
        with no_fork():
            opening.set()
            forked.wait(0.2)  # the other thread is about to fork
            order.append("opened")

    thread = threading.Thread(target=open_slowly)
    thread.start()
    opening.wait()
    forked.set()
    pid = os.fork()
    if pid == 0:
        os._exit(len(order))
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_child_can_open_and_fork_again():
    """Guards against a lock that stays held in the child."""

    def again() -> str:
        with no_fork():
            pass
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    assert in_child(again) == "7"


def test_many_forks_while_descriptors_are_opened():
    """Guards against one fork in many that gets a descriptor before its registration."""
    ended = threading.Event()
    leaked: list[str] = []

    def open_and_close() -> None:
        while not ended.is_set():
            PrivateFd(lambda: os.open("/dev/zero", os.O_RDONLY)).close()

    threads = [threading.Thread(target=open_and_close) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            leaked.append(in_child(lambda: "/dev/zero" in open_files()))
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert set(leaked) == {"False"}
