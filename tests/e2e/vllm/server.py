"""One real vLLM server: starts as a user starts it, answers over HTTP, ends; and what it leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpshm import Board
from dpshm.board import files
from dpshm.linux import processes
from tests.e2e.vllm import environment
from tests.support import wait_until

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 120.0
SCALE_OUT_SINCE = (0, 31)  # in 0.28, /inference/v1/generate was there unasked
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 262144,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "moe": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def executor(name: str) -> list[str]:
    """The arguments that put an executor of our own in the place of the model's."""
    return ["--distributed-executor-backend", name, "--no-async-scheduling"]


NO_MODEL = executor("bench.sleeping_executor.SleepingExecutor")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /pause and /resume
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(environment.ROOT),
}


def _first_error(log: str) -> str:
    """Where a server's log first tells of an error, and its end, which is mostly the shutdown after it."""
    found = re.search(r"^.*(?:Traceback|ERROR|CRITICAL)", log, re.MULTILINE)
    return log[found.start() :][:4000] + "\n...\n" + log[-4000:] if found else log[-8000:]


class Server:
    """A ``vllm serve`` of its own session.

    Args:
        folder: for the model's configuration and the log.
        model: a key of `MODELS`.
        arguments: of the command line.
        within: a command that runs its arguments elsewhere, such as on another node.
        where: the environment that it runs in; None: vLLM's.
        port: on which it serves; None: one that is free.
        forked: whether its processes are forked (`tests.e2e.vllm.forked`).
        env: variables on top of this process's.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        *arguments: str,
        within: Sequence[str] = (),
        where: Path | str | None = None,
        port: int | None = None,
        forked: bool = os.environ.get("DPSHM_TEST_FORK") == "1",
        **env: str,
    ) -> None:
        config = folder / model
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.json").write_text(json.dumps(SIZES | MODELS[model]))
        self.port = port or free_port()
        self._log_path = folder / "server.log"
        named = dict(pairwise(arguments))
        self._api_servers = int(named.get("--api-server-count", 1))
        command = [
            *within,
            *_vllm(Path(where or environment.folder()), forked),
            *("serve", str(config)),
            *("--load-format", "dummy"),
            *("--dtype", "float32", "--skip-tokenizer-init", "--enforce-eager"),
            *(["--enable-scale-out"] if environment.installed() >= SCALE_OUT_SINCE else []),
            *("--max-model-len", "2048", "--max-num-seqs", "32"),
            *("--host", "127.0.0.1", "--port", str(self.port), *arguments),
        ]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DPSHM", "VLLM"))}
        inherited |= {k: v for k, v in os.environ.items() if k in ("DPSHM_DIR", "DPSHM_ANY_VLLM")}
        with self._log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=inherited | ENVIRONMENT | env,
                cwd=folder,
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self.group = env.get("DPSHM_GROUP", f"vllm-{processes.tag(self.pid)}")

    def wait_ready(self) -> None:
        """Waits until it answers, and all API servers of which the command line tells have started.

        Raises:
            AssertionError: it ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._popen.poll() is None, f"the server ended:\n{_first_error(self.log)}"
            assert time.monotonic() < deadline, f"not ready in {START_TIMEOUT_S:g} s:\n{self.log[-8000:]}"
            with suppress(OSError, http.client.HTTPException):
                started = self.log.count("Application startup complete.") >= self._api_servers
                if started and self.request("GET", "/health")[0] == http.HTTPStatus.OK:
                    return
            time.sleep(0.5)

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log_path.read_text(errors="replace")

    def board(self) -> Board:
        """The board of its group."""
        return Board.attach(self.group)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        """One request on a connection of its own, so that the kernel picks an API server; (status, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"content-type": "application/json", **headers})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def try_to_generate(
        self, prompt: list[int], max_tokens: int = 8, dp_rank: int | None = None, **sampling: object
    ) -> tuple[int, str]:
        """One request, answered or refused: (status, body). `dp_rank` pins it to a rank."""
        body = {
            "token_ids": prompt,
            "sampling_params": {
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "detokenize": False,
                **sampling,
            },
        }
        pinned = {} if dp_rank is None else {"X-data-parallel-rank": str(dp_rank)}
        return self.request("POST", "/inference/v1/generate", body, **pinned)

    def generate(self, prompt_tokens: int = 3, max_tokens: int = 8, dp_rank: int | None = None) -> list[int]:
        """The tokens of one request.

        Raises:
            AssertionError: it was not answered well.
        """
        status, text = self.try_to_generate(list(range(5, 5 + prompt_tokens)), max_tokens, dp_rank)
        assert status == http.HTTPStatus.OK, f"{status}: {text[:500]}"
        tokens: list[int] = json.loads(text)["choices"][0]["token_ids"]
        return tokens

    def generate_all(self, sizes: Iterable[tuple[int, ...]], threads: int = 32) -> list[int]:
        """How many tokens each of many requests at once got; sizes are the arguments of `generate`."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda size: len(self.generate(*size)), sizes))

    def metric(self, name: str, label: str = "engine", **where: str) -> dict[int, float]:
        """A metric of vLLM's page by rank; `where` names labels that must have a value."""
        values: dict[int, float] = {}
        for line in self.request("GET", "/metrics")[1].splitlines():
            match = re.fullmatch(re.escape(name) + r"\{(.*)\} (\S+)", line)
            if match is None:
                continue
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
            if label in labels and all(labels.get(k) == v for k, v in where.items()):
                rank = int(labels[label])
                values[rank] = values.get(rank, 0.0) + float(match[2])
        return values

    def processes(self) -> dict[int, str]:
        """Its processes that live, by pid: those of its session, and their names."""
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError, IndexError):
                    stat = Path(f"/proc/{entry}/stat").read_text()
                    name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
                    if int(rest[3]) == self.pid and rest[0] not in "ZX":
                        found[int(entry)] = name
        return found

    def terminate(self) -> None:
        """Sends SIGTERM to the launcher, and waits for its end alone: what a service manager does."""
        self._popen.terminate()
        self._popen.wait(STOP_TIMEOUT_S)

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """Ends the server, and kills the processes that do not end by themselves."""
        if self._popen.poll() is None:
            self._popen.send_signal(sig)
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(STOP_TIMEOUT_S)
        with suppress(AssertionError):
            wait_until(lambda: not self.processes(), 5.0 if sig == signal.SIGKILL else STOP_TIMEOUT_S)
        self.kill()

    def kill(self, but: int | None = None) -> None:
        """Ends all its processes but one at once, as nothing in them can prevent: what a container's end does."""
        theirs: set[str] = set()
        while pids := self.processes().keys() - {but}:
            for pid in pids:
                with suppress(OSError):
                    theirs |= set(re.findall(r"/dev/shm/psm_\w+", Path(f"/proc/{pid}/maps").read_text()))
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._popen.wait()
        for path in theirs:  # vLLM's own, between an engine and its worker: killed processes cannot remove it
            Path(path).unlink(missing_ok=True)

    def left(self) -> list[str]:
        """What it has left in the directory of segments."""
        prefix = files.FILE_PREFIX + self.group
        return sorted(e for e in os.listdir(files.directory()) if e == prefix or e.startswith(prefix + "."))


def _vllm(where: Path, forked: bool) -> list[str]:
    """The command in an environment."""
    return (
        [str(where / "bin" / "python"), "-m", "tests.e2e.vllm.forked"] if forked else [str(where / "bin" / "vllm")]
    )


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
