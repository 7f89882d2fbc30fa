"""CURVE keys: which processes may connect where a group's sockets are tcp.

A folder holds two pairs, made once by ``dpshm keygen``: the server's and the clients'. The coordinator proves the
first and lets in each peer that proves the second; both directions are encrypted (CurveZMQ,
rfc.zeromq.org/spec/26). Each process that takes part needs the folder, less the server's secret. The files are
pyzmq's certificates. ipc sockets need no keys: only their owner can enter their folder.

The board's header names the server's public key, so that a client without keys, or with another group's, gets an
error when it attaches, and not silence.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple, TypeAlias

import zmq

from dpshm.board.header import Header
from dpshm.errors import SettingError
from dpshm.net.addresses import allow_ipv6
from dpshm.net.context import Socket

ENVIRONMENT = "DPSHM_CURVE_DIR"
HEADER_SETTING = "curve_server_key"
"""Under this name a board's header has the server's public key; no such setting: the group has no keys."""
KEY_BYTES = 40  # as Z85 text

Folder: TypeAlias = str | os.PathLike[str]


class ServerKeys(NamedTuple):
    """What a coordinator needs: its own pair, and the public key of those whom it lets in."""

    public: bytes
    secret: bytes
    client: bytes

    def secure(self, s: Socket) -> None:
        """Makes a socket that is yet to be bound ask for keys."""
        s.curve_server = True
        s.curve_secretkey = self.secret
        s.zap_domain = b"dpshm"  # with a domain, no peer is let in while no authenticator answers


class ClientKeys(NamedTuple):
    """What engines, front-ends and tools need: the server's public key, and the clients' pair."""

    server: bytes
    public: bytes
    secret: bytes

    def secure(self, s: Socket) -> None:
        """Gives keys to a socket that is yet to be connected."""
        s.curve_serverkey = self.server
        s.curve_publickey = self.public
        s.curve_secretkey = self.secret


def make_keys(folder: Folder) -> list[Path]:
    """Makes the folder (0700) and two pairs of keys in it (secrets 0600); returns the files.

    Raises:
        SettingError: it exists and is not empty, or cannot be made: keys are never overwritten.
    """
    from zmq.auth import create_certificates

    path = Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise SettingError(f"{path} is not empty, and keys are never overwritten: name a new folder")
        path.chmod(0o700)
        files = [Path(name) for pair in ("server", "client") for name in create_certificates(path, pair)]
        for file in files:
            file.chmod(0o600 if file.suffix == ".key_secret" else 0o644)
    except zmq.ZMQError as e:
        raise SettingError(f"cannot make keys: this libzmq has no CURVE ({e}). Install pyzmq from PyPI") from e
    except OSError as e:
        raise SettingError(f"cannot make keys in {path}: {e.strerror}") from e
    return files


def server_keys(folder: Folder) -> ServerKeys:
    """A coordinator's keys from a folder of `make_keys`.

    Raises:
        SettingError: a file is missing, damaged, or others may read a secret.
    """
    return ServerKeys(*_pair(folder, "server"), _public(folder, "client"))


def client_keys(folder: Folder) -> ClientKeys:
    """A client's keys from a folder of `make_keys`; the server's secret need not be in it.

    Raises:
        SettingError: a file is missing, damaged, or others may read a secret.
    """
    return ClientKeys(_public(folder, "server"), *_pair(folder, "client"))


def keys_for(header: Header, folder: Folder | None = None) -> ClientKeys | None:
    """The keys that a client of a group needs; None if the group has none.

    Args:
        header: the board's.
        folder: where they are; default: the environment's ``DPSHM_CURVE_DIR``.

    Raises:
        SettingError: they are needed and there are none, or another group's.
    """
    wanted = header.settings.get(HEADER_SETTING)
    if wanted is None:
        return None
    folder = folder or os.environ.get(ENVIRONMENT)
    if not folder:
        raise SettingError(
            f"group {header.group!r} lets in only processes that have its keys: give curve_dir=DIR, or set "
            f"{ENVIRONMENT}, to a copy of the folder that its coordinator was started with"
        )
    keys = client_keys(folder)
    if keys.server.decode() != wanted:
        raise SettingError(
            f"the keys in {folder} are not those of group {header.group!r}: its server key is {wanted}, and "
            f"theirs is {keys.server.decode()}. Copy the folder that its coordinator was started with"
        )
    return keys


def connect(s: Socket, address: str, keys: ClientKeys | None) -> None:
    """Connects a socket, with keys if there are any and the address is not a path; over IPv6 if it must be."""
    if keys is not None and address.startswith("tcp:"):
        keys.secure(s)
    allow_ipv6(s, address)
    s.connect(address)


def _pair(folder: Folder, name: str) -> tuple[bytes, bytes]:
    path = Path(folder) / f"{name}.key_secret"
    public, secret = _read(path)
    if secret is None or zmq.curve_public(secret) != public:
        raise _damaged(path)
    return public, secret


def _public(folder: Folder, name: str) -> bytes:
    return _read(Path(folder) / f"{name}.key")[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    from zmq.auth import load_certificate

    try:
        mode = path.stat().st_mode
        if path.suffix == ".key_secret" and mode & 0o077:
            raise SettingError(f"others may read {path} ({stat.filemode(mode)}): chmod 600 it, or make new keys")
        public, secret = load_certificate(path)
        for key in (public, secret):
            if key is not None and len(key) != KEY_BYTES:
                raise _damaged(path)
        if secret is not None:
            zmq.curve_public(secret)
    except OSError as e:  # ZMQError is none
        reason = e.strerror or e
        raise SettingError(f"cannot read the key {path}: {reason}. Make keys with: dpshm keygen DIR") from e
    except (ValueError, zmq.ZMQError) as e:
        raise _damaged(path) from e
    return public, secret


def _damaged(path: Path) -> SettingError:
    return SettingError(f"{path} holds no key as `dpshm keygen` makes them: it is damaged. Make new keys")
