"""Rounds and reductions between peers that come, go, stall and die.

A round is a transaction: one declared membership, reduce, vote, commit by majority. It imports only p2p's face and
torch, and does not know what is trained.

    async with open_run(host, rpc, links, identity, "my-run", founders=peers, journal_dir=directory) as run:
        async with run.round() as r:
            out = await r.reduce(tensors, weight=tokens)    # out.tensors, out.members, out.weight, out.epoch, ...
        await run.publish(state)                            # joiners and latecomers: await run.fetch_state()

With `ExchangeSettings(audit=True)` nobody need be believed: who alters what it adds up is proved guilty (`run.guilty`),
and whoever holds the bytes of the proof can check it (`verify_proof`).
"""

from collectives.agreement import Settings
from collectives.agreement.detector import DetectorSettings
from collectives.config import RunConfig
from collectives.errors import (
    BadContribution,
    Behind,
    CollectiveError,
    Diverged,
    Excluded,
    JournalError,
    LocalFault,
    NonFinite,
    NoQuorum,
    RemoteFault,
    ResourceLimit,
    RoundExpired,
    RoundFailed,
    Superseded,
)
from collectives.gossip import Fork, Gossiped
from collectives.place import Place, lan_of
from collectives.reduce import ExchangeSettings, Verdict, verify_proof
from collectives.reduce.feedback import Feedback
from collectives.round import Reduced, Round
from collectives.run import Run, open_run
from collectives.service import Collectives
from collectives.state import Snapshot, StateEntry

__all__ = [
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
