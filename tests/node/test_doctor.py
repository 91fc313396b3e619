"""What is told of a node's figures: each finding with its step, and nothing that was not measured."""

from dataclasses import replace

import pytest

from node.datadir import DataDir, Membership
from node.doctor import Facts, PeerFacts, document, findings
from node.examine import examine_offline
from node.standing import open_roster
from p2p import Identity

GIB = 1 << 30
PEER = PeerFacts("12D3peer", "desk", "direct", "by them", 0.01, 50e6, 0.1)
WELL = Facts(
    running=True,
    mesh="m",
    listening=("/ip4/192.168.1.2/tcp/4001/p2p/me",),
    peers=(PEER,),
    members_known=2,
    disk_path="/data",
    disk_free_bytes=99 * GIB,
    memory_free_bytes=9 * GIB,
    memory_lent_bytes=6 * GIB,
    devices=("cuda:0",),
    accelerators=("H",),
)


def test_a_node_that_is_well_has_no_findings():
    assert findings(WELL) == []
    assert document(WELL)["reachability"] == "1 member connected to this node"


@pytest.mark.parametrize(
    ("change", "level", "says", "step"),
    [
        ({"running": False}, "blocker", "not running", "shoal up"),
        ({"mesh": None}, "note", "no mesh", "shoal join"),
        ({"standing": "it was expelled from this mesh"}, "blocker", "was expelled", "new invite"),
        ({"peers": ()}, "blocker", "none of the 1 known", "firewall"),
        ({"peers": (), "members_known": 1}, "note", "alone", "shoal invite"),
        ({"peers": (), "refused_by": {"x": "it was expelled"}}, "blocker", "refuse this node", "new invite"),
        ({"listening": ("/ip4/127.0.0.1/tcp/1/p2p/me",)}, "warning", "loopback only", "--listen"),
        ({"peers": (replace(PEER, dialled="by this node"),)}, "note", "is unknown", "TCP port 4001"),
        ({"peers": (replace(PEER, clock_ahead_s=-7.5),)}, "warning", "7.5 s ahead of", "automatic time"),
        ({"peers": (replace(PEER, clock_ahead_s=7.5),)}, "warning", "7.5 s behind", "automatic time"),
        ({"peers": (PEER, PEER, replace(PEER, clock_ahead_s=60.0))}, "note", "desk is off by +60.0", "there"),
        ({"peers": (replace(PEER, rtt_s=0.9),)}, "note", "900 ms away", "cable"),
        ({"peers": (replace(PEER, bytes_per_s=1e5),)}, "note", "0.10 MB/s", "link"),
        ({"disk_free_bytes": 10**9}, "warning", "1.0 GB left", "--data-dir"),
        ({"memory_free_bytes": 10**8}, "warning", "100 MB of memory are free", "--memory"),
        ({"memory_lent_bytes": 10**8}, "warning", "100 MB of memory are lent", "--memory"),
        ({"accelerators": ()}, "note", "no accelerator", ""),
        ({"devices": ("cpu",)}, "warning", "H is not used", "--device all"),
        ({"refused": {"signature": 3, "ttl": 0}}, "note", "3 signature", ""),
    ],
)
def test_each_thing_that_is_wrong_is_told_with_its_step(change, level, says, step):
    found = findings(replace(WELL, **change))
    assert [one.level for one in found] == [level]
    assert says in found[0].what
    assert step in found[0].next_step


def test_blockers_come_first():
    found = findings(replace(WELL, running=False, accelerators=(), disk_free_bytes=0))
    assert [one.level for one in found] == ["blocker", "warning", "note"]


def test_what_was_not_measured_is_unknown():
    said = document(replace(WELL, peers=(), disk_free_bytes=None, accelerators=None))
    assert said["reachability"] == "unknown"
    assert said["nat"].startswith("unknown")
    assert said["clock_behind_s"] is None


def test_without_a_daemon_the_data_directory_is_looked_at_and_left_as_it_is(tmp_path):
    assert examine_offline(tmp_path / "none")["mesh"] is None
    assert not (tmp_path / "none").exists()
    data = DataDir(tmp_path)
    membership = Membership.found(public=False)
    data.remember(membership)
    identity = Identity.load_or_create(data.identity_path)
    roster = open_roster(identity, data.membership(), data)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    said = examine_offline(tmp_path)
    assert (said["mesh"], said["standing"], said["running"]) == (membership.mesh_id, "", False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    roster.expel(identity.peer_id, 1.0)
    data.remember_roster(membership.mesh_id, roster.dump())
    assert "expelled" in examine_offline(tmp_path)["standing"]


PRIVATE = {"verdict": "private", "nat": "symmetric", "at": "45.0.1.1:4001", "relays": ["12D3relay"]}


def test_a_node_behind_a_router_is_told_its_kind_its_relays_and_what_would_help():
    answer = document(replace(WELL, reach=PRIVATE, peers=(replace(PEER, path="relayed"),)))
    assert answer["nat"].startswith("symmetric")
    assert answer["reachability"] == "not directly: members tried 45.0.1.1:4001; through 1 relay"
    (finding,) = answer["findings"]
    assert (finding["level"], "1 peers are" in finding["what"]) == ("note", True)
    assert "TCP port 4001" in finding["next_step"]


def test_a_node_that_nobody_relays_for_is_warned():
    reach = PRIVATE | {"relays": [], "router_says": "no router answers"}
    (finding,) = findings(replace(WELL, reach=reach))
    assert finding.level == "warning"
    assert "UPnP" in finding.next_step
    assert "no router answers" in finding.next_step
    assert "--relay-mbps" in finding.next_step


def test_a_node_that_members_reached_says_where():
    reach = {"verdict": "public", "nat": "none", "at": "45.0.0.10:4001", "relays": []}
    assert document(replace(WELL, reach=reach))["reachability"] == "yes: members connected to 45.0.0.10:4001"
    assert findings(replace(WELL, reach=reach, peers=(replace(PEER, dialled="by this node"),))) == []
