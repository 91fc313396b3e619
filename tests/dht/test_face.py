"""The face of dht that the daemon codes against."""

import dht
import p2p
from dht import errors


def test_the_face_is_pinned():
    assert sorted(dht.__all__) == [
        "Directory",
        "DirectoryConfig",
        "Gossip",
        "GossipConfig",
        "OwnRecordsFull",
        "Record",
        "RecordInvalid",
        "RecordRefused",
        "Remembered",
        "View",
        "ViewConfig",
        "sign_record",
    ]
    assert all(getattr(dht, name) is not None for name in dht.__all__)


def test_every_error_is_on_one_axis():
    assert issubclass(errors.RecordRefused, p2p.RemoteFault)
    assert issubclass(errors.OwnRecordsFull, p2p.ResourceLimit)
    assert issubclass(errors.RecordInvalid, p2p.LocalFault)
    assert errors.RecordRefused("future", "x").reason == "future"
