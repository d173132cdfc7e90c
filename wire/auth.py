"""Keys, and how both ends of a new connection prove that they have the same one.

key = load_key("farm.key")                                  # or find_key(None): FARM_KEY of the environment
session = prove(sock, key, limit=5.0)                       # host, on a socket that is connected and nothing else
challenge = Challenge(key); answer = challenge.feed(data)   # farm, for each connection one

    host                                             farm
    HELLO      magic, the host's nonce         ->
                                               <-    magic, CHALLENGE, the farm's nonce
    PROOF      HMAC(key, "host", both nonces)  ->
                                               <-    magic, WELCOME, HMAC(key, "farm", both nonces)

Every message has one length and nothing in it is parsed, so there is nothing to overflow. The nonces are new for each
connection: what was recorded on one proves nothing on another. The labels differ, so that nobody can hand a farm its
own proof back. The key itself never travels, and the key of the messages that follow (`session`) is derived from it and
from both nonces, so that a recorded message fits no other connection.

Nothing is encrypted: see docs/security.md. Standard library only, Python 3.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
import struct
import time

from wire.errors import BadKey, FarmRefused, KeyRefused

VARIABLE = "FARM_KEY"  #: of the environment; a key file that is named goes first
SHORTEST = 32  #: characters of a key
LONGEST = 4096

MAGIC = b"FARMKEY1"  #: the last character is the version of this exchange
NONCE = 32
HELLO = struct.Struct(
    "!8s32s"
)  # longer than a header of Pyro4, so that an older farm answers it, and does not wait for more
PROOF = 32
ANSWER = struct.Struct("!8sc32s")

CHALLENGE, WELCOME, REFUSED, NO_KEY, FULL = b"C", b"W", b"R", b"N", b"F"
#: What a farm that wants a key tells a caller who begins as Pyro4 does; a host knows the case by these words.
WANTS_KEY = "this farm wants a key"


# Keys.


def new_key(path: str | os.PathLike[str]) -> None:
    """Writes a new key of 32 random bytes, as text, into a file that only its owner can read.

    Raises:
        BadKey: there is something under that name already (it is left alone), or it cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise BadKey(
            "%s is there already and is left as it is: whoever has that key would be locked out\n"
            "  now: name another file, or delete this one yourself" % path
        ) from None
    except OSError as error:
        raise BadKey(
            "cannot write a key to %s: %s\n  now: name a file in a folder of your own" % (path, error.strerror or error)
        ) from None
    with os.fdopen(handle, "w") as file:
        os.chmod(path, 0o600)  # whatever the umask made of it
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_key(path: str | os.PathLike[str]) -> bytes:
    """The key in a file.

    Raises:
        BadKey: it is missing, not ours, open to others, or holds no key.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe under this name shall not hang us
    except FileNotFoundError:
        raise BadKey(
            "there is no key file %s\n"
            "  now: python farm.py --new-key %s makes one; every machine that is to know it gets a copy" % (path, path)
        ) from None
    except OSError as error:
        raise BadKey("cannot read the key file %s: %s" % (path, error.strerror or error)) from None
    try:
        _check_file(os.fstat(handle), path)  # of what is open, not of what stands under the name by now
        return _checked(os.read(handle, LONGEST + 1), "the key file %s" % path)
    finally:
        os.close(handle)


def find_key(path: str | os.PathLike[str] | None) -> bytes | None:
    """The key of the named file, or else the one in FARM_KEY, or None where neither is there.

    Raises:
        BadKey: the one that is there is not usable.
    """
    if path is not None:
        return load_key(path)
    text = os.environ.get(VARIABLE)
    return None if text is None else _checked(text.encode("utf-8", "surrogateescape"), VARIABLE)


def _check_file(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadKey("the key file %s is no file" % path)
    if os.name != "posix":
        return  # other systems have no such bits; who may read it is for their owners to say
    if found.st_uid != os.geteuid():
        raise BadKey(
            "the key file %s belongs to user %d, and this is user %d: who else writes it chooses the key\n"
            "  now: keep a copy of your own: install -m 600 %s ~/farm.key" % (path, found.st_uid, os.geteuid(), path)
        )
    if found.st_mode & 0o077:
        raise BadKey(
            "the key file %s has mode %03o, so others on this machine can read or change it\n  now: chmod 600 %s"
            % (path, stat.S_IMODE(found.st_mode), path)
        )


def _checked(text: bytes, where: str) -> bytes:
    key = text.strip()
    if len(key) < SHORTEST:
        raise BadKey(
            "%s holds %s: a key has at least %d characters\n  now: python farm.py --new-key PATH makes a good one"
            % (where, "nothing" if not key else "%d characters" % len(key), SHORTEST)
        )
    if len(key) > LONGEST or not key.isascii() or len(key.split()) > 1:
        raise BadKey("%s holds no key: one word is wanted, as farm.py --new-key writes it" % where)
    return key


def mac(key: bytes, label: bytes, host_nonce: bytes, farm_nonce: bytes) -> bytes:
    """What proves the key: an HMAC of both nonces, for one purpose that the label names."""
    # Label and nonces have lengths that are fixed, so two different sets never give the same text.
    return hmac.new(key, MAGIC + b"%-8s" % label + host_nonce + farm_nonce, hashlib.sha256).digest()


# The farm's side.


def answer(verdict: bytes, content: bytes = bytes(NONCE)) -> bytes:
    """A farm's message of the exchange."""
    return ANSWER.pack(MAGIC, verdict, content)


class Challenge:
    """The farm's side of one connection: bytes in, bytes out. It knows no socket and no time."""

    def __init__(self, key: bytes):
        self._key = key
        self.nonce = secrets.token_bytes(NONCE)
        self._host_nonce: bytes | None = None
        self._buffer = b""
        self.session: bytes | None = None  # the key of this connection's messages, once it is proven
        self.refused: str | None = None  # why this connection is to be closed

    def feed(self, data: bytes) -> bytes:
        """Takes what came; returns what to send. Sets `session` or `refused` once it is decided."""
        self._buffer += data
        size = HELLO.size if self._host_nonce is None else PROOF
        if self._host_nonce is None and not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            self.refused = "it did not begin with a proof"
            return b""
        if len(self._buffer) > size:
            self.refused = "it sent more than a proof"  # an honest host waits for the answer
            return b""
        if len(self._buffer) < size:
            return b""
        message, self._buffer = self._buffer, b""
        if self._host_nonce is None:
            self._host_nonce = message[len(MAGIC) :]
            return answer(CHALLENGE, self.nonce)
        if not hmac.compare_digest(message, mac(self._key, b"host", self._host_nonce, self.nonce)):
            self.refused = "its key is another one"
            return answer(REFUSED)
        self.session = mac(self._key, b"session", self._host_nonce, self.nonce)
        return answer(WELCOME, mac(self._key, b"farm", self._host_nonce, self.nonce))


# The host's side.


def prove(sock: socket.socket, key: bytes, limit: float) -> bytes:
    """Proves to the farm at the other end that we have its key, and has the farm prove the same.

    Args:
        sock: connected, with nothing sent yet. Closed by nobody here.
        limit: seconds for all of it.

    Returns:
        The key of this connection's messages.

    Raises:
        KeyRefused: the farm has another key, or none, or only pretends to have one.
        FarmRefused: the farm takes no more connections.
        OSError: the connection broke, took too long (TimeoutError), or what answers is no farm.
    """
    deadline = time.monotonic() + limit
    nonce = secrets.token_bytes(NONCE)
    sock.sendall(HELLO.pack(MAGIC, nonce))
    farm_nonce = _verdict(sock, CHALLENGE, deadline)
    sock.sendall(mac(key, b"host", nonce, farm_nonce))
    proof = _verdict(sock, WELCOME, deadline)
    if not hmac.compare_digest(proof, mac(key, b"farm", nonce, farm_nonce)):
        raise KeyRefused(
            "what answers there took our proof and has none of its own: it is not a farm with this key\n"
            "  now: find out what listens there before you use that address again"
        )
    return mac(key, b"session", nonce, farm_nonce)


def _verdict(sock: socket.socket, wanted: bytes, deadline: float) -> bytes:
    magic, verdict, content = ANSWER.unpack(_receive(sock, ANSWER.size, deadline))
    if magic != MAGIC:
        raise ConnectionError(
            "it is a farm of an older version, which knows no keys"
            if magic.startswith(b"PYRO")
            else "it answers, but not as a farm does"
        )
    if verdict == wanted:
        return content
    if verdict == REFUSED:
        raise KeyRefused(
            "it has another key than this host\n"
            "  now: copy the farm's key file here and name it with --key-file, or in FARM_KEY"
        )
    if verdict == NO_KEY:
        raise KeyRefused(
            "it was started without a key, and this host is to use one, so this may be somebody else's\n"
            "  now: start it with --key-file, or use this host without a key (no --key-file, no FARM_KEY)"
        )
    if verdict == FULL:
        raise FarmRefused("it has no room for another connection\n  now: end hosts that are not needed")
    raise ConnectionError("it answers, but not as a farm does")


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no whole answer in time")
        sock.settimeout(left)
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("it closed the connection during the proof")
        data += part
    return data
