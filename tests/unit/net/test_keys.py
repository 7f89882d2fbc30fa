"""Keys in a folder: how they are made, and what is refused."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import zmq

from dpshm.board.header import make_header
from dpshm.errors import SettingError
from dpshm.net.keys import client_keys, connect, keys_for, make_keys, server_keys

ADDRESSES = dict.fromkeys(("stats_address", "engine_input_address", "engine_output_address"), "tcp://127.0.0.1:1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of keys."""
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def mode(path: Path) -> int:
    """A file's permissions."""
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made(folder: Path):
    """Guards against secrets that others can read, and pairs that do not belong together."""
    assert sorted(f.name for f in folder.iterdir()) == [
        "client.key",
        "client.key_secret",
        "server.key",
        "server.key_secret",
    ]
    assert mode(folder) == 0o700
    assert {mode(f) for f in folder.glob("*.key_secret")} == {0o600}
    server, client = server_keys(folder), client_keys(folder)
    assert (server.public, server.client) == (client.server, client.public)
    assert zmq.curve_public(server.secret) == server.public
    assert zmq.curve_public(client.secret) == client.public
    assert len({server.public, server.secret, client.public, client.secret}) == 4
    assert b"SECRET" not in (folder / "server.key").read_bytes().upper().split(b"CURVE")[-1]
    assert server.secret not in (folder / "server.key").read_bytes()


def test_keys_are_never_overwritten(folder: Path):
    """Guards against a second keygen that locks a running group's peers out, or fills a folder that is in use."""
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(SettingError, match="is not empty, and keys are never overwritten: name a new folder"):
        make_keys(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    (folder.parent / "file").touch()
    with pytest.raises(SettingError, match=r"cannot make keys in .*: File exists"):
        make_keys(folder.parent / "file")
    empty = folder.parent / "empty"
    empty.mkdir(mode=0o755)
    make_keys(empty)
    assert mode(empty) == 0o700


def test_a_client_needs_no_secret_of_the_server(folder: Path):
    """Guards against keys that can only be handed on whole, so that every machine could pose as the server."""
    (folder / "server.key_secret").unlink()
    assert client_keys(folder).server
    with pytest.raises(
        SettingError, match=r"cannot read the key .*server.key_secret: No such file.* dpshm keygen"
    ):
        server_keys(folder)


@pytest.mark.parametrize(
    "content", [b"", b"curve\n", b'public-key = "short"', b"\xff" * 3000, b'public-key = "' + b"!" * 40]
)
@pytest.mark.parametrize("name", ["server.key_secret", "client.key"])
def test_damaged_files(folder: Path, content: bytes, name: str):
    """Guards against a damaged key that only shows as a socket that no peer reaches, or as a traceback."""
    (folder / name).write_bytes(content)
    if name == "client.key" and b"!" in content:
        server_keys(folder)  # a public key looks like any other; no process has its secret
        return
    with pytest.raises(SettingError, match=f"{name} holds no key as `dpshm keygen` makes them"):
        server_keys(folder)


def test_a_secret_that_is_not_the_public_keys(folder: Path, tmp_path: Path):
    """Guards against halves of two pairs, as after copying one file of four."""
    make_keys(tmp_path / "others")
    mixed = (folder / "client.key_secret").read_text().splitlines()
    other = (tmp_path / "others" / "client.key_secret").read_text().splitlines()
    (folder / "client.key_secret").write_text("\n".join([*mixed[:-1], other[-1]]))
    with pytest.raises(SettingError, match=r"client.key_secret holds no key"):
        client_keys(folder)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o666])
def test_secrets_that_others_may_read(folder: Path, bits: int):
    """Guards against a secret that is none, as after a copy without its permissions."""
    (folder / "client.key_secret").chmod(bits)
    with pytest.raises(SettingError, match=r"others may read .*client.key_secret .* chmod 600 it"):
        client_keys(folder)
    server_keys(folder)


def test_which_keys_a_group_needs(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards against keys asked for by a group without any, and against none where they are needed."""
    monkeypatch.setenv("DPSHM_CURVE_DIR", "")
    plain = make_header("g", 1, 1, **ADDRESSES, settings={})
    keyed = make_header("g", 1, 1, **ADDRESSES, settings={"curve_server_key": server_keys(folder).public.decode()})
    assert keys_for(plain) is None
    assert keys_for(plain, "no such folder") is None
    with pytest.raises(SettingError, match="DPSHM_CURVE_DIR"):
        keys_for(keyed)
    assert keys_for(keyed, folder) == client_keys(folder)
    monkeypatch.setenv("DPSHM_CURVE_DIR", str(folder))
    assert keys_for(keyed) == client_keys(folder)
    assert keys_for(plain) is None
    with pytest.raises(SettingError, match="no such folder"):
        keys_for(keyed, "no such folder")  # what is given wins


def test_only_tcp_gets_keys(folder: Path):
    """Guards against keys on ipc sockets, whose coordinator does not ask for them: no message would arrive."""
    keys = client_keys(folder)
    with zmq.Context() as context, context.socket(zmq.XSUB) as ipc, context.socket(zmq.XSUB) as tcp:
        connect(ipc, "ipc:///tmp/none", keys)
        connect(tcp, "tcp://127.0.0.1:1", keys)
        assert (ipc.mechanism, tcp.mechanism) == (zmq.NULL, zmq.CURVE)
        ipc.linger = tcp.linger = 0
