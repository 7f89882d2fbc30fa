"""An engine of the example server: one rank, whose model sleeps. Replace `Rank.compute` by yours.

The loop is the one of dpshm/engine/README.md. Requests and tokens travel over a ZMQ socket of the example's own:
dpshm carries none of them. A rank that is told to end (SIGTERM) first finishes what it has.
"""

from __future__ import annotations

import json
import sys
import time

import zmq

from dpshm import Engine, SettingError
from dpshm.linux.signals import EndRequest
from dpshm.sim.demo.lockstep import Lockstep

MAX_BATCH = 8
STEP_S = 0.005


def address(group: str, dp_rank: int) -> str:
    """Where a rank receives its requests."""
    return f"ipc://@{group}-rank-{dp_rank}"


class Request:
    """A request that a rank has received and not finished."""

    def __init__(self, sender: bytes, number: int, prompt_tokens: int, max_tokens: int, first: int) -> None:
        self.sender = sender
        self.number = number
        self.prompt_tokens = prompt_tokens
        self.next = first
        self.end = max_tokens

    @property
    def key(self) -> tuple[bytes, int]:
        """Tells it from the others: API servers count from 0 each."""
        return self.sender, self.number


class Rank:
    """One rank. With `lockstep` it steps together with the others, as a mixture of experts does."""

    def __init__(self, engine: Engine, lockstep: Lockstep | None) -> None:
        self._engine = engine
        self._lockstep = lockstep
        self._told = EndRequest()
        self._waiting: list[Request] = []
        self._batch: list[Request] = []
        self._steps = 0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(address(engine.board.segment.group, engine.dp_rank))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._told.fileno(), zmq.POLLIN)
        engine.register(self._poller)

    def run(self) -> None:
        """Serves until it is told to end and has nothing to do."""
        while not (self._told.signum and not self._must_step()):
            if not self._must_step():
                self._poller.poll(1000)
            if self._lockstep is not None:
                self._engine.poll()  # the coordinator's START, and the doorbell
            self._take_in()
            self._publish()
            if self._must_step():
                self._step()
        self._socket.close(linger=1000)

    def _must_step(self) -> bool:
        if self._lockstep is not None:
            return self._engine.running  # also without work: the other ranks wait in the collective
        return bool(self._waiting or self._batch)

    def _take_in(self) -> None:
        while self._socket.poll(0):
            sender, data = self._socket.recv_multipart()
            message = json.loads(data)
            if "abort" in message:
                self._abort((sender, message["abort"]))
                continue
            try:
                self._engine.receive(message["stamp"])
            except SettingError as e:  # not of this group
                sys.stderr.write(f"dropped a request: {e}\n")
                continue
            fields = (message[name] for name in ("number", "prompt_tokens", "max_tokens", "first"))
            self._waiting.append(Request(sender, *fields))

    def _abort(self, key: tuple[bytes, int]) -> None:
        for requests in (self._waiting, self._batch):
            for request in [request for request in requests if request.key == key]:
                requests.remove(request)
                self._engine.finished(1)

    def _publish(self) -> None:
        self._engine.publish(
            waiting=len(self._waiting),
            running=len(self._batch),
            kv_cache_usage=len(self._batch) / MAX_BATCH,
            prefill_backlog=sum(request.prompt_tokens for request in self._waiting),
            step=self._steps,
        )

    def _step(self) -> None:
        room = MAX_BATCH - len(self._batch)
        admitted, self._waiting = self._waiting[:room], self._waiting[room:]
        self._batch += admitted
        prefill_tokens = sum(request.prompt_tokens for request in admitted)
        self._publish()
        with self._engine.step(prefill_tokens=prefill_tokens, batch=len(self._batch)):
            all_idle = self.compute()
        self._steps += 1
        for request in list(self._batch):
            token, request.next = request.next, request.next + 1
            done = request.next >= request.end
            answer = {"number": request.number, "token": token, "done": done}
            self._socket.send_multipart([request.sender, json.dumps(answer).encode()])
            if done:
                self._batch.remove(request)
                self._engine.finished(1)
        self._publish()
        if all_idle:
            self._engine.wave_complete()  # every rank calls it after the same step, and pauses

    def compute(self) -> bool:
        """One step of the model; in lockstep, whether all ranks agreed that none has work."""
        if self._lockstep is None:
            time.sleep(STEP_S)
            return False
        # The stand-in for your all-reduce. It asks for work every 32nd step.
        has_work = bool(self._waiting or self._batch)
        agreed = self._lockstep.enter(has_work=has_work, seconds=STEP_S, interrupted=lambda: False)
        assert agreed is not None
        time.sleep(agreed.seconds)
        return agreed.all_idle


def main(group: str, dp_rank: int, dp_size: int, lockstep_fd: int) -> None:
    """A rank's process; a negative `lockstep_fd`: the ranks are independent."""
    lockstep = Lockstep(lockstep_fd, dp_rank, dp_size) if lockstep_fd >= 0 else None
    with Engine.attach(group, dp_rank, timeout_s=30) as engine:
        Rank(engine, lockstep).run()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
