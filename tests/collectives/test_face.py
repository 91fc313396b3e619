"""What callers may import from collectives."""

import collectives


def test_the_face_is_what_it_was():
    assert sorted(collectives.__all__) == [
        "BadContribution",
        "Behind",
        "CollectiveError",
        "Collectives",
        "DetectorSettings",
        "Diverged",
        "ExchangeSettings",
        "Excluded",
        "Feedback",
        "Fork",
        "Gossiped",
        "JournalError",
        "LocalFault",
        "NoQuorum",
        "NonFinite",
        "Place",
        "Reduced",
        "RemoteFault",
        "ResourceLimit",
        "Round",
        "RoundExpired",
        "RoundFailed",
        "Run",
        "RunConfig",
        "Settings",
        "Snapshot",
        "StateEntry",
        "Superseded",
        "Verdict",
        "lan_of",
        "open_run",
        "verify_proof",
    ]
    assert all(hasattr(collectives, name) for name in collectives.__all__)
