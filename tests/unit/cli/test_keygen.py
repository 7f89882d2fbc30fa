"""``dpshm keygen``."""

from __future__ import annotations

import json

import pytest

from dpshm.net.keys import client_keys, server_keys
from tests.e2e.load import run


@pytest.mark.slow
def test_keygen(tmp_path):
    """Guards against keys that a coordinator cannot use, an overwritten folder, and JSON that cannot be parsed."""
    made = json.loads(run("keygen", str(tmp_path / "a" / "keys"), "--json").stdout)
    folder = tmp_path / "a" / "keys"
    assert made["folder"] == str(folder)
    assert sorted(made["files"]) == sorted(str(f) for f in folder.iterdir())
    assert made["server_key"] == server_keys(folder).public.decode() == client_keys(folder).server.decode()
    done = run("keygen", str(folder), expect=2)
    assert "keys are never overwritten" in done.stderr
    assert "Traceback" not in done.stderr
    text = run("keygen", str(tmp_path / "b")).stdout
    assert f"--curve-dir {tmp_path / 'b'}" in text
    assert f"DPSHM_CURVE_DIR={tmp_path / 'b'}" in text
    secret = server_keys(tmp_path / "b").secret.decode()
    assert secret not in text


@pytest.mark.slow
def test_a_coordinator_that_would_be_open_to_the_network(tmp_path, group):
    """Guards against a bind that any host can reach without --insecure."""
    arguments = ("coordinator", "--group", group, "--dp-size", "2", "--balancing", "hybrid", "--host", "0.0.0.0")
    done = run(*arguments, expect=2)
    assert "dpshm keygen DIR" in done.stderr
    assert "--insecure" in done.stderr
    done = run(*arguments, "--curve-dir", str(tmp_path / "none"), expect=2)
    assert "cannot read the key" in done.stderr
    assert "Traceback" not in done.stderr
