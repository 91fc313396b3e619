"""Signed expiring records, the replicated view of the mesh, and look-up of members.

Everything here works on p2p's face. The pure parts (records, view, replica) take time and chance
as arguments; gossip and directory are the shells around them.
"""

from dht.directory import Directory, DirectoryConfig
from dht.errors import OwnRecordsFull, RecordInvalid, RecordRefused
from dht.gossip import Gossip, GossipConfig
from dht.memory import Remembered
from dht.records import Record, sign_record
from dht.view import View, ViewConfig

__all__ = [
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
