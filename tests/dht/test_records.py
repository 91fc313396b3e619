"""Records: one canonical encoding, total decoding, signatures bound to every field and to their domain."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import Record, RecordInvalid, RecordRefused, sign_record
from dht.records import (
    NAME_BYTES_MAX,
    RECORD_BYTES_MAX,
    SIGNATURE_BYTES,
    TTL_MAX_S,
    VALUE_BYTES_MAX,
    sign_tombstone,
)
from p2p import Identity, RemoteFault

GOLDEN = (
    "0100040004346e6f646573656c66313244334b6f6f574134586f70314a6154334d487877594d6b436570597376"
    "346950566f704d5877437a35694859644266655342000000000000000741d954fc4020000041d954fc45200000"
    "0000000568656c6c6ff42ba56a0e6edf775da92c45c13aa804047ef728d2a903442bc1f3b0a1c571df76f35a00"
    "f5e948cbeeb29f1d1f7e0e16bc19753ec507ed55c870d617cb45e701"
)


def test_encoding_and_decoding_are_inverse(record):
    made = record(value=b"\x00\xff" * 100, name="qwen3 0.6B äöü")
    assert Record.decode(made.encode()) == made
    assert made.verify()


def test_a_tombstone_survives_the_wire(identity):
    tombstone = sign_tombstone(identity(1), "host", "m", 9, 1000.0, 1040.0)
    again = Record.decode(tombstone.encode())
    assert again == tombstone
    assert again.withdrawn
    assert again.verify()


def test_the_largest_record_fits_its_limit(identity):
    made = sign_record(
        identity(0), "k" * 32, "n" * NAME_BYTES_MAX, 2**63 - 1, bytes(VALUE_BYTES_MAX), 1.0, 1.0
    )
    assert len(made.encode()) <= RECORD_BYTES_MAX
    assert Record.decode(made.encode()) == made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "nodes"),
        ("name", "other"),
        ("seq", 2),
        ("issued_at_s", 1000.5),
        ("expires_at_s", 1021.0),
        ("value", b"w"),
        ("withdrawn", True),
        ("signature", bytes(SIGNATURE_BYTES)),
    ],
)
def test_a_changed_field_breaks_the_signature(record, field, value):
    changes = {field: value, **({"value": b""} if field == "withdrawn" else {})}
    assert not dataclasses.replace(record(), **changes).verify()


def test_the_signer_cannot_be_swapped(record, identity):
    assert not dataclasses.replace(record(0), signer=identity(1).peer_id).verify()


def test_a_signature_made_for_another_domain_is_not_a_record_s(record, identity):
    made = record()
    unsigned = made.encode()[:-SIGNATURE_BYTES]
    foreign = dataclasses.replace(made, signature=identity(0).sign("shoal/manifest/1", unsigned))
    assert not foreign.verify()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("", "n", 1, b"", 1.0, 1.0), "kind"),
        (("Node", "n", 1, b"", 1.0, 1.0), "kind"),
        (("k" * 33, "n", 1, b"", 1.0, 1.0), "kind"),
        (("k", "n\n", 1, b"", 1.0, 1.0), "name"),
        (("k", "\ud800", 1, b"", 1.0, 1.0), "name"),
        (("k", "ä" * 129, 1, b"", 1.0, 1.0), "name"),
        (("k", "n", -1, b"", 1.0, 1.0), "seq"),
        (("k", "n", 2**63, b"", 1.0, 1.0), "seq"),
        (("k", "n", True, b"", 1.0, 1.0), "seq"),
        (("k", "n", 1, bytes(VALUE_BYTES_MAX + 1), 1.0, 1.0), "value"),
        (("k", "n", 1, "text", 1.0, 1.0), "value"),
        (("k", "n", 1, b"", 1.0, 0.0), "lives"),
        (("k", "n", 1, b"", 1.0, TTL_MAX_S + 1), "lives"),
        (("k", "n", 1, b"", float("nan"), 1.0), "issued_at_s"),
        (("k", "n", 1, b"", float("inf"), 1.0), "issued_at_s"),
        (("k", "n", 1, b"", -0.0, 1.0), "issued_at_s"),
        (("k", "n", 1, b"", -5.0, 1.0), "issued_at_s"),
    ],
)
def test_signing_nonsense_names_the_field(identity, arguments, field):
    with pytest.raises(RecordInvalid, match=field):
        sign_record(identity(0), *arguments)


def test_every_truncation_and_extension_is_refused(record):
    data = record().encode()
    for length in range(len(data)):
        with pytest.raises(RecordRefused):
            Record.decode(data[:length])
    with pytest.raises(RecordRefused):
        Record.decode(data + b"\0")


def test_a_claimed_length_is_not_believed(record):
    data = bytearray(record().encode())
    at = len(data) - SIGNATURE_BYTES - 1 - 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(RecordRefused):
        Record.decode(bytes(data))


def _decodes_or_refuses(data: bytes) -> None:
    try:
        decoded = Record.decode(data)
    except RemoteFault:
        return
    assert decoded.encode() == data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_give_a_record_or_a_remote_fault(data):
    _decodes_or_refuses(data)


def test_any_damage_to_a_record_gives_its_one_encoding_or_a_remote_fault(record):
    rng = random.Random(7)
    whole = record(value=bytes(50)).encode()
    for _ in range(4000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        _decodes_or_refuses(bytes(data))


def test_the_bytes_of_version_one_do_not_change():
    identity = Identity(bytes(range(32)))
    made = sign_record(identity, "node", "self", 7, b"hello", 1_700_000_000.5, 20.0)
    assert made.encode().hex() == GOLDEN
