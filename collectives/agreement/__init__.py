"""Who takes part in an epoch, and what was decided: a pure core.

How a shell drives `Chain` (one for each run and tag):

- One thread of control: `for one in chain.handle(event, now_s): do(one)`, instructions strictly in order. `now_s` is
  a monotonic clock. Call `handle(Tick(), now)` when `wake_s` (None: not needed) has come; `wake_s` may change with
  every event. Events that arise while instructions are done (Held, Reduced) wait for their turn.
- `Persist(saved)` must be durable (fsync) before any later Send, Committed or Failed of this chain is done. The next
  one replaces it. If it cannot be written the chain must not be used any more. After a restart: `Chain(..., saved=)`.
- `Send` may be lost, doubled and overtaken. Route it by (run, tag); only the authenticated sender counts.
- `Reduce(declaration)` while another is under way means rebase. Tag frames with `declaration.key`; a contribution
  belongs to (peer, nonce). Answer with Reduced or Stuck, also late: the chain ignores what is old.
- Every whole result reported by Reduced or Held stays servable to peers (by digest) until its `Release`.
- `Offer.nonce` must be new for each Enter, also across restarts (random or nanoseconds).
- `incarnation` must be new (random or nanoseconds) whenever there is no `saved`, or saved.left is set; founders
  that create a run use 0. A founder without its journal is a joiner: `config=None` and Met.
"""

from collectives.agreement.chain import Chain
from collectives.agreement.detector import Detector, DetectorSettings, Health
from collectives.agreement.events import (
    Abandon,
    Alive,
    Committed,
    Enter,
    Event,
    Failed,
    Fetch,
    Held,
    Instruction,
    Lagging,
    Leave,
    Left,
    Met,
    Persist,
    Received,
    Reduce,
    Reduced,
    Release,
    Send,
    Stuck,
    Suspected,
    Tick,
    Withdraw,
)
from collectives.agreement.messages import Message, pack_message, unpack_message
from collectives.agreement.types import (
    Ballot,
    Certificate,
    Config,
    Decided,
    Declaration,
    LeftOut,
    Member,
    Offer,
    Saved,
    Seat,
    Settings,
    Value,
    founding,
)

__all__ = [
    "Abandon",
    "Alive",
    "Ballot",
    "Certificate",
    "Chain",
    "Committed",
    "Config",
    "Decided",
    "Declaration",
    "Detector",
    "DetectorSettings",
    "Enter",
    "Event",
    "Failed",
    "Fetch",
    "Health",
    "Held",
    "Instruction",
    "Lagging",
    "Leave",
    "Left",
    "LeftOut",
    "Member",
    "Message",
    "Met",
    "Offer",
    "Persist",
    "Received",
    "Reduce",
    "Reduced",
    "Release",
    "Saved",
    "Seat",
    "Send",
    "Settings",
    "Stuck",
    "Suspected",
    "Tick",
    "Value",
    "Withdraw",
    "founding",
    "pack_message",
    "unpack_message",
]
