"""The node's Ed25519 key: made once, kept on disk with mode 0600, known to others by its PeerId.

Knows the key file's format, how a PeerId contains its public key, and domain-separated
signatures. It does not know what is signed, nor anything of the network.
Peer id format: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import NewType

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from p2p.errors import IdentityError

PeerId = NewType("PeerId", str)

logger = logging.getLogger(__name__)

_FILE_HEADER = "shoal-ed25519-v1:"
_FILE_BYTES_MAX = 1024
_SEED_BYTES = 32
# A multihash "identity" of 36 bytes, holding a protobuf of key type Ed25519 and a key of 32 bytes.
_PEER_ID_PREFIX = bytes.fromhex("0024080112" + "20")
_DOMAIN_TAG = b"shoal signature v1\x00"
_PEER_ID_CHARS_MAX = 64


class Identity:
    """One Ed25519 key. `peer_id` is the base58 libp2p id that contains its public half."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != _SEED_BYTES:
            raise IdentityError(f"an identity seed is {_SEED_BYTES} bytes, got {len(seed)}")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id = peer_of_key(public)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes; for p2p's transport and the key file only."""
        return self._seed

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity, in memory only."""
        return cls(secrets.token_bytes(_SEED_BYTES))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity kept at `path`, made there on first use.

        Raises IdentityError in one line when the file cannot be read, is not a key, or the
        directory cannot be written. An existing file is never overwritten.
        """
        try:
            with path.open("rb") as file:
                raw = file.read(_FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            identity = cls.generate()
            _write_key(path, identity.seed)
            return identity
        except OSError as error:
            raise IdentityError(f"cannot read the identity key {path}: {error.strerror or error}") from error
        identity = cls(_parse_key(path, raw))
        _tighten_mode(path)
        return identity

    def save(self, path: Path) -> None:
        """Keep this key at `path`, mode 0600. Raises IdentityError in one line."""
        _write_key(path, self.seed)

    def sign(self, domain: str, payload: bytes) -> bytes:
        """64 bytes; a signature made for one `domain` never verifies in another."""
        return self._key.sign(_signed_bytes(domain, payload))


def verify(peer: PeerId, domain: str, payload: bytes, signature: bytes) -> bool:
    """Whether `peer` signed `payload` for `domain`. False for anything malformed; never raises."""
    public = public_key_of(peer)
    if public is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _signed_bytes(domain, payload))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def public_key_of(peer: str) -> bytes | None:
    """The 32-byte Ed25519 public key inside a peer id, or None when it is not such an id."""
    if not isinstance(peer, str) or len(peer) > _PEER_ID_CHARS_MAX:
        return None
    try:
        raw = base58.b58decode(peer)
    except ValueError:
        return None
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        return None
    return raw[len(_PEER_ID_PREFIX) :]


def peer_of_key(public: bytes) -> PeerId:
    """The peer id that contains these 32 bytes of an Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public).decode("ascii"))


def _signed_bytes(domain: str, payload: bytes) -> bytes:
    name = domain.encode("utf-8")
    return _DOMAIN_TAG + len(name).to_bytes(2, "big") + name + payload


def _parse_key(path: Path, raw: bytes) -> bytes:
    try:
        text = raw.decode("ascii").strip()
        if len(raw) > _FILE_BYTES_MAX or not text.startswith(_FILE_HEADER):
            raise ValueError
        seed = bytes.fromhex(text[len(_FILE_HEADER) :])
        if len(seed) != _SEED_BYTES:
            raise ValueError
    except ValueError:
        raise IdentityError(
            f"the identity key {path} is damaged (expected one line starting with {_FILE_HEADER!r}); "
            "restore it from a backup, or move it away to get a new identity"
        ) from None
    return seed


def _write_key(path: Path, seed: bytes) -> None:
    """Write to a neighbour file, flush it to the disk, then rename: never half a key."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{_FILE_HEADER}{seed.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise IdentityError(f"cannot write the identity key {path}: {error.strerror or error}") from error


def _tighten_mode(path: Path) -> None:
    """A key others may read is made private again; Windows keeps its own access lists."""
    if os.name != "posix":
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            logger.warning("the identity key %s was readable by others (mode %o); now 600", path, mode)
            path.chmod(0o600)
    except OSError as error:
        raise IdentityError(f"cannot protect the identity key {path}: {error.strerror or error}") from error
