"""The face of p2p that the rest of the project codes against, and the axes of its errors."""

import pytest

import p2p
from p2p import errors

HOST_FACE = {
    "ByteStream",
    "Host",
    "HostConfig",
    "Identity",
    "Invite",
    "PeerEvent",
    "PeerId",
    "open_host",
    "verify",
}
CALLS_FACE = {
    "Call",
    "Channel",
    "EndOfChannel",
    "Method",
    "Roster",
    "Rpc",
    "RpcConfig",
    "RpcRefusal",
    "Tensor",
    "pack_value",
    "unpack_value",
}
BLOBS_FACE = {
    "BlobExchange",
    "BlobStore",
    "BlobUnavailable",
    "Chunk",
    "Dropped",
    "ExchangeConfig",
    "FetchState",
    "FileEntry",
    "Manifest",
    "SourceChanged",
    "StoreFault",
    "build_manifest",
    "mesh_id_of",
}
LINKS_FACE = {"Link", "LinkReport", "Links", "LinksConfig"}
REACH_FACE = {"Reach", "ReachConfig", "ReachReport", "RelayLimits", "Said"}
DHT_FACE = {"Kad", "KadConfig"}
ERRORS = {
    "CallFailed",
    "DeadlineExceeded",
    "IdentityError",
    "InviteError",
    "ListenError",
    "LocalFault",
    "P2pError",
    "PeerLost",
    "ProtocolViolation",
    "RemoteFault",
    "ResourceLimit",
    "Unreachable",
}


def test_the_face_is_pinned():
    assert (
        set(p2p.__all__) == HOST_FACE | CALLS_FACE | BLOBS_FACE | LINKS_FACE | REACH_FACE | DHT_FACE | ERRORS
    )
    assert len(set(p2p.__all__)) == len(p2p.__all__)
    for name in p2p.__all__:
        assert getattr(p2p, name) is not None


@pytest.mark.parametrize("name", sorted(ERRORS - {"P2pError", "InviteError"}))
def test_every_error_is_on_one_axis(name):
    kind = getattr(errors, name)
    axes = [errors.RemoteFault, errors.ResourceLimit, errors.LocalFault]
    assert sum(issubclass(kind, axis) for axis in axes) == 1
    assert issubclass(kind, errors.P2pError)


def test_the_errors_carry_what_a_caller_acts_on():
    assert errors.PeerLost("P").peer == "P"
    failed = errors.CallFailed("busy", "later", "P", 2.0)
    assert (failed.code, failed.message, failed.peer, failed.retry_after_s) == ("busy", "later", "P", 2.0)
    assert failed.detail == {}
    assert errors.CallFailed("busy", "later", "P", None, {"peer": "Q"}).detail == {"peer": "Q"}
    refusal = errors.RpcRefusal("denied", "no", 1.0, {"why": "x"})
    assert (refusal.code, refusal.message, refusal.retry_after_s) == ("denied", "no", 1.0)
    assert refusal.detail == {"why": "x"}
    assert errors.ResourceLimit("full", 3.0).retry_after_s == 3.0
    assert errors.Unreachable({"/x": "why"}).attempts == {"/x": "why"}
    assert "no addresses" in str(errors.Unreachable({}))
