"""The key file and signatures."""

import os
import stat

import pytest
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from p2p.errors import IdentityError
from p2p.identity import Identity, public_key_of, verify

posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
not_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write anywhere")


def test_the_peer_id_is_the_one_libp2p_computes():
    identity = Identity(b"s" * 32)
    assert ID.from_pubkey(create_new_key_pair(b"s" * 32).public_key).to_base58() == identity.peer_id


def test_the_same_file_gives_the_same_peer(tmp_path):
    first = Identity.load_or_create(tmp_path / "deep" / "identity.key")
    assert Identity.load_or_create(tmp_path / "deep" / "identity.key").peer_id == first.peer_id
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["identity.key"]


@posix_only
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_the_key_is_private_to_its_owner_even_if_it_was_not(tmp_path, mode):
    path = tmp_path / "identity.key"
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(mode)
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00garbage",
        b"shoal-ed25519-v1:",
        b"shoal-ed25519-v1:zz",
        b"shoal-ed25519-v1:" + b"ab" * 31,
        b"x" * 5000,
        b"shoal-ed25519-v1:" + b"ab" * 32 + b"\n" * 2000,
    ],
)
def test_a_damaged_key_is_one_clear_line_and_is_left_alone(tmp_path, content):
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(IdentityError) as caught:
        Identity.load_or_create(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_directory_in_the_keys_place_is_one_clear_line(tmp_path):
    with pytest.raises(IdentityError, match="cannot read the identity key"):
        Identity.load_or_create(tmp_path)


def test_a_file_in_the_directorys_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match=r"cannot (read|write) the identity key"):
        Identity.load_or_create(tmp_path / "file" / "identity.key")


@posix_only
@not_root
def test_an_unwritable_directory_is_one_clear_line_and_leaves_nothing(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(IdentityError, match="cannot write the identity key"):
            Identity.load_or_create(tmp_path / "identity.key")
        assert not list(tmp_path.iterdir())
    finally:
        tmp_path.chmod(0o700)


def test_a_failed_write_leaves_no_half_key(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="No space left"):
        Identity.load_or_create(tmp_path / "identity.key")
    assert not list(tmp_path.iterdir())


def test_a_signature_serves_one_signer_domain_and_payload():
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign("advert", b"payload")
    assert verify(one.peer_id, "advert", b"payload", signature)
    assert not verify(other.peer_id, "advert", b"payload", signature)
    assert not verify(one.peer_id, "ticket", b"payload", signature)
    assert not verify(one.peer_id, "advert", b"payloae", signature)
    assert not verify(one.peer_id, "advertp", b"ayload", signature)


@pytest.mark.parametrize("peer", ["", "x", "0OIl", "12D3KooW", "Q" * 46, "1" * 1000, None, 7])
def test_verify_never_raises_for_a_malformed_peer(peer):
    assert not verify(peer, "d", b"p", b"s" * 64)
    assert public_key_of(peer) is None


@pytest.mark.parametrize("signature", [b"", b"short", b"s" * 64, b"s" * 65])
def test_verify_never_raises_for_a_malformed_signature(signature):
    assert not verify(Identity.generate().peer_id, "d", b"p", signature)
