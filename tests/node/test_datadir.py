"""The data directory: one holder at a time, atomic files, clear errors."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from node.datadir import DataDir, Membership, read_daemon, write_atomic
from node.errors import DataDirProblem


def test_a_second_holder_is_refused_and_told_why(tmp_path):
    with DataDir.open(tmp_path / "d") as first:
        first.announce("http://127.0.0.1:1", "peer")
        with (
            pytest.raises(DataDirProblem, match=f"in use by process {os.getpid()}"),
            DataDir.open(tmp_path / "d"),
        ):
            pytest.fail("two daemons held one directory")
    with DataDir.open(tmp_path / "d") as again:
        assert again.root == tmp_path / "d"


def test_the_running_daemon_is_announced_only_while_it_runs(tmp_path):
    with DataDir.open(tmp_path) as data:
        data.announce("http://127.0.0.1:8080", "12D3")
        assert read_daemon(tmp_path) == {"pid": os.getpid(), "api": "http://127.0.0.1:8080", "peer": "12D3"}
    assert read_daemon(tmp_path) is None


def test_a_membership_survives_a_restart_with_its_key_private(tmp_path):
    membership = Membership.found(public=False)
    with DataDir.open(tmp_path) as data:
        assert data.membership() is None
        data.remember(membership)
    with DataDir.open(tmp_path) as data:
        assert data.membership() == membership
    assert (tmp_path / "mesh.json").stat().st_mode & 0o777 == 0o600


def test_a_public_mesh_has_no_key():
    assert Membership.found(public=True).swarm_key is None
    assert Membership.found(public=False).mesh_id != Membership.found(public=False).mesh_id


@pytest.mark.parametrize("content", [b"", b"{}", b'{"mesh_id": "a", "swarm_key": "zz"}', b"\xff"])
def test_a_damaged_mesh_file_is_named(tmp_path, content):
    with DataDir.open(tmp_path) as data:
        (tmp_path / "mesh.json").write_bytes(content)
        with pytest.raises(DataDirProblem, match=r"mesh\.json"):
            data.membership()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataDirProblem, match="cannot be written"), DataDir.open(tmp_path / "file" / "d"):
        pytest.fail("opened below a plain file")


def test_offers_survive_and_damage_offers_nothing(tmp_path):
    with DataDir.open(tmp_path) as data:
        data.remember_offers("home", [b"\x00one", b"two"])
        assert data.offers("home") == [b"\x00one", b"two"]
        (tmp_path / "models.json").write_bytes(b"{")
        assert data.offers("home") == []


def test_what_is_offered_to_one_mesh_is_not_offered_to_another(tmp_path):
    with DataDir.open(tmp_path) as data:
        data.remember_offers("home", [b"private"])
        assert data.offers("work") == []
        data.remember_offers("work", [b"other"])
        assert (data.offers("home"), data.offers("work")) == ([b"private"], [b"other"])
        for number in range(16):
            data.remember_offers(f"mesh {number}", [b"x"])
        assert (data.offers("home"), data.offers("mesh 0")) == ([], [b"x"])


def test_plans_survive_and_those_of_another_mesh_do_not_count(tmp_path):
    with DataDir.open(tmp_path) as data:
        assert data.fences("home") == {}
        data.remember_plans("home", {"model": (7, "planner")}, {"model": [("a", 0, 4), ("b#1", 4, 8)]})
        assert data.fences("home") == {"model": (7, "planner")}
        assert data.planned("home") == {"model": [("a", 0, 4), ("b#1", 4, 8)]}
        assert (data.fences("work"), data.planned("work")) == ({}, {})
        for damage in (
            b"{",
            b"[]",
            b'{"fences": {"home": {"model": 7}}, "spans": {"home": {"model": [["a", 1]]}}}',
            b'{"fences": {"home": 3}, "spans": {"home": [5]}}',
        ):
            (tmp_path / "plans.json").write_bytes(damage)
            assert (data.fences("home"), data.planned("home")) == ({}, {})


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_founding_key_is_kept_privately_and_may_be_taken_away(tmp_path):
    with DataDir.open(tmp_path) as data:
        membership = Membership.found(public=False)
        data.remember(membership)
        (path,) = (tmp_path / "meshes").glob("*.key")
        assert path.stat().st_mode & 0o077 == 0
        assert data.membership().founding.peer_id == membership.founder
        data.remember(replace(membership, founding=None, ticket=b"t"))
        assert data.membership().founding.peer_id == membership.founder
        path.unlink()
        assert data.membership() == replace(membership, ticket=b"t")
        assert data.membership().founding is None


def test_a_mesh_id_names_no_file_elsewhere(tmp_path):
    with DataDir.open(tmp_path / "d") as data:
        data.remember_roster("../../evil", b"x")
        assert data.roster("../../evil") == b"x"
    assert [path.parent for path in tmp_path.rglob("*.roster")] == [tmp_path / "d" / "meshes"]


def test_a_data_directory_of_an_earlier_version_still_opens(tmp_path):
    with DataDir.open(tmp_path) as data:
        (tmp_path / "mesh.json").write_text(
            '{"version": 1, "mesh_id": "m", "swarm_key": "6b6b", "addrs": []}'
        )
        assert data.membership() == Membership("m", b"kk")
