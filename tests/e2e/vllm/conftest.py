"""Real servers, one at a time: each starts for its tests, and ends after them also when they fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.vllm import environment
from tests.e2e.vllm.server import Server


def why_not() -> str | None:
    """Why the tests do not run; None if they do."""
    if os.environ.get("DPSHM_TEST_VLLM") != "1":
        return "real servers, five minutes of them: DPSHM_TEST_VLLM=1 runs them"
    return environment.why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks these tests as slow, and skips them without vLLM."""
    reason = why_not()
    for item in items:
        if "tests/e2e/vllm/" in item.path.as_posix():
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(900))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _dpshm_is_installed() -> None:
    """Installs this checkout into vLLM's environment."""
    if why_not() is None:
        environment.install_dpshm(environment.folder())


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`serve(model, *arguments, **environment)` gives a server that answers; it ends with the module's tests."""
    servers: list[Server] = []

    def start(model: Any, *arguments: Any, **env: Any) -> Server:
        server = Server(tmp_path_factory.mktemp("vllm"), model, *arguments, **env)
        servers.append(server)
        server.wait_ready()
        return server

    yield start
    for server in servers:
        server.stop()
