"""States that outlive processes and disks: checkpoints in folders of this computer, copies in pieces among peers.

A state is a `collectives.Snapshot` (named tensors) and a small JSON object. Neither the number of workers nor the outer
optimizer is part of the format, so that any run can take it up.

    keeper = Keeper(folder, Retention(last=3, every=100))
    keeper.offer(snapshot, {"strategy": "diloco"})  # returns at once; `await keeper.run()` writes
    loaded = keeper.newest()                        # whole, or the one before it; `loaded.refused` says which were not
    placed = await CopyService(rpc, identity, Pantry(folder)).place("run", "state", snapshot, {}, holders)
    restored = await service.restore("run", "state", peers)  # from any k pieces
"""

from collectives.checkpoint.copies import Description, Pantry
from collectives.checkpoint.erasure import Code
from collectives.checkpoint.files import Loaded, Refused, clean, newest, read, write
from collectives.checkpoint.keeper import Keeper, Retention, Saved
from collectives.checkpoint.peers import CopyService, Placed, Restored

__all__ = [
    "Code",
    "CopyService",
    "Description",
    "Keeper",
    "Loaded",
    "Pantry",
    "Placed",
    "Refused",
    "Restored",
    "Retention",
    "Saved",
    "clean",
    "newest",
    "read",
    "write",
]
