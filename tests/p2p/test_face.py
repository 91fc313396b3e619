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


def test_the_hosts_face_and_the_errors_are_exported():
    assert set(p2p.__all__) >= HOST_FACE | ERRORS
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
    assert errors.ResourceLimit("full", 3.0).retry_after_s == 3.0
    assert errors.Unreachable({"/x": "why"}).attempts == {"/x": "why"}
    assert "no addresses" in str(errors.Unreachable({}))
