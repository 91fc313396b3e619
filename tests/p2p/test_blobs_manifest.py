"""Manifests: made from directories, checked when they come from peers, and never naming anything outside."""

import dataclasses
from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2p import Identity, LocalFault, Manifest, ProtocolViolation, RemoteFault, StoreFault, build_manifest
from p2p.blobs import manifest as module
from p2p.messages import pack_value

IDENTITY = Identity(bytes(range(32)))
GOLDEN = (
    "929401a6676f6c64656ed934313244334b6f6f574134586f70314a6154334d487877594d6b436570597376346950566f"
    "704d5877437a356948596442666553429193a1619103c4206437b3ac38465133ffb63b75273a8db548c558465d79db03"
    "fd359c6cd5bd9d85c4409bc5750689cc24509954716742e7c6ff1c5109683197b6467767b18493afc2bcc40bca1ac8b3"
    "668004fbd3fb155d501624c4209152ef55484e9fe7f433593001"
)
GOLDEN_ID = "a0b0ed21fcae6851aa6af4a9b63926968f1b35f9361105b6f3deedf1b4263918"


def make(tmp_path, files):
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def wire(files, name="m", identity=IDENTITY, version=1, sign=True):
    """Encoded bytes of what `build_manifest` would never make, properly signed."""
    unsigned = module._Unsigned(
        version, name, identity.peer_id, tuple(module._WireFile(*one) for one in files)
    )
    signature = identity.sign(module._SIGNING_DOMAIN, pack_value(unsigned)) if sign else bytes(64)
    return pack_value(module._Wire(unsigned, signature))


def test_a_directory_becomes_chunks_that_cover_every_file(tmp_path):
    data = bytes(range(256)) * 20
    directory = make(
        tmp_path, {"config.json": b"{}", "sub/model.safetensors": data, "empty": b"", ".hidden": b"x"}
    )
    seen = []
    manifest = build_manifest(
        directory,
        "model",
        IDENTITY,
        cuts={"sub/model.safetensors": [100, 2000, 100, 99999]},
        chunk_bytes_max=1024,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [entry.name for entry in manifest.files] == ["config.json", "empty", "sub/model.safetensors"]
    assert manifest.file("empty").chunks == ()
    chunks = manifest.file("sub/model.safetensors").chunks
    assert {100, 2000} <= {chunk.offset for chunk in chunks}
    assert all(one.end == other.offset for one, other in pairwise(chunks))
    assert all(
        blake3(data[one.offset : one.end]).digest() == one.hash and one.length <= 1024 for one in chunks
    )
    assert chunks[-1].end == len(data)
    assert seen[-1] == (len(data) + 2, len(data) + 2)
    assert manifest.publisher == IDENTITY.peer_id


def test_encoding_is_stable_and_comes_back(tmp_path):
    manifest = build_manifest(
        make(tmp_path, {"a": b"abc", "b/c": b"d" * 3000}), "m", IDENTITY, chunk_bytes_max=1000
    )
    back = Manifest.decode(manifest.encode())
    assert back == manifest
    assert back.id == manifest.id
    assert [back.chunk(number) for number in range(back.chunk_count)] == [
        (entry, chunk) for entry in manifest.files for chunk in entry.chunks
    ]


def test_the_golden_bytes_of_version_1():
    data = wire([("a", (3,), blake3(b"abc").digest())], name="golden")
    assert data.hex() == GOLDEN
    assert Manifest.decode(data).id == GOLDEN_ID


@pytest.mark.parametrize(
    "name",
    ["../x",
     "/etc/passwd", "a/../b", "a//b", "", ".", "a/", "a\\b", "c:x", "a\x00b", "nul", "x/COM1.txt", "a.", "x" * 600,
     "y" * 201, "a\nb"],
)  # fmt: skip
def test_names_that_could_leave_the_directory_are_refused(name):
    with pytest.raises(ProtocolViolation):
        Manifest.decode(wire([(name, (), b"")]))


@pytest.mark.parametrize(
    "names", [["a", "a"], ["a", "A"], ["a", "a/b"], ["a/b", "a"], ["Sub/x", "sub"]], ids=str
)
def test_names_that_collide_on_some_system_are_refused(names):
    with pytest.raises(ProtocolViolation):
        Manifest.decode(wire([(name, (), b"") for name in names]))


@pytest.mark.parametrize(
    "file",
    [("a", (0,), bytes(32)), ("a", (-1,), bytes(32)), ("a", (1, 1), bytes(32)), ("a", (), bytes(32)),
     ("a", ((16 << 20) + 1,), bytes(32)), ("a", (1,), bytes(31))],
    ids=str,
)  # fmt: skip
def test_chunks_that_make_no_sense_are_refused(file):
    with pytest.raises(ProtocolViolation):
        Manifest.decode(wire([file]))


def test_a_manifest_that_its_publisher_did_not_sign_is_refused():
    good = Manifest.decode(wire([("a", (1,), bytes(32))]))
    other = dataclasses.replace(good, name="another")
    stolen = dataclasses.replace(good, publisher=Identity(bytes(32)).peer_id)
    for bad in (other, stolen):
        with pytest.raises(ProtocolViolation, match="not signed"):
            Manifest.decode(bad.encode())
    with pytest.raises(ProtocolViolation, match="not signed"):
        Manifest.decode(wire([("a", (1,), bytes(32))], sign=False))
    with pytest.raises(ProtocolViolation, match="version"):
        Manifest.decode(wire([], version=2))


@given(
    st.binary(max_size=300)
    | st.binary(max_size=60).map(lambda tail: wire([("a", (1,), bytes(32))])[:80] + tail)
)
def test_any_bytes_are_a_manifest_or_a_remote_fault(data):
    try:
        assert Manifest.decode(data).id
    except RemoteFault:
        pass


def test_ranges_are_found_and_checked(tmp_path):
    manifest = build_manifest(
        make(tmp_path, {"a": b"x" * 10, "b": b"y" * 35}), "m", IDENTITY, chunk_bytes_max=10
    )
    assert manifest.numbers("b", 0, 35) == range(1, 5)
    assert manifest.numbers("b", 9, 11) == range(1, 3)
    assert manifest.numbers("b", 10, 20) == range(2, 3)
    assert manifest.numbers("b", 35, 35) == range(0)
    for bad in ((0, 36), (-1, 2), (3, 2)):
        with pytest.raises(LocalFault):
            manifest.numbers("b", *bad)
    with pytest.raises(LocalFault, match="no file"):
        manifest.numbers("c", 0, 1)


def test_what_cannot_be_published_is_one_clear_line(tmp_path):
    with pytest.raises(StoreFault, match="not a directory"):
        build_manifest(tmp_path / "none", "m", IDENTITY)
    with pytest.raises(StoreFault, match="plain relative path"):
        build_manifest(tmp_path, "../m", IDENTITY)
    with pytest.raises(LocalFault, match="chunk_bytes_max"):
        build_manifest(tmp_path, "m", IDENTITY, chunk_bytes_max=0)
