"""Members on one LAN: what is told, what is believed, and two nodes that find each other by multicast."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
import trio

from dht.lan import Lan, Notice, mesh_tag, on_lan
from p2p import Identity

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("addr", "believed"),
    [
        ("/ip4/192.168.1.7/tcp/4001", True),
        ("/ip4/10.0.0.3/tcp/1", True),
        ("/ip6/fd00::2/tcp/4001", True),
        ("/ip4/127.0.0.1/tcp/4001", False),
        ("/ip4/0.0.0.0/tcp/4001", False),
        ("/ip4/8.8.8.8/tcp/443", False),
        ("/ip6/2606:4700::1111/tcp/443", False),
        ("/dns4/example.com/tcp/443", False),
        ("/ip4/192.168.1.7/udp/4001", False),
        ("/ip4/192.168.1.7/tcp/x", False),
        ("/ip4/192.168.1.999/tcp/5", False),
        ("/ip4/239.1.1.1/tcp/5", False),
        ("", False),
    ],
)
def test_only_addresses_that_stay_in_the_lan_are_believed(addr, believed):
    assert on_lan(addr) is believed


def encoded(notice):
    return {name.encode(): value.encode() for name, value in notice.properties().items()}


def test_a_notice_is_read_as_it_was_told():
    peer = Identity.generate().peer_id
    addrs = tuple(f"/ip4/192.168.1.{n}/tcp/4001/p2p/{peer}" for n in (7, 8))
    notice = Notice(peer, addrs, mesh_tag("abc"))
    assert Notice.read(encoded(notice)) == notice
    assert all(len(f"{name}={value}") <= 255 for name, value in notice.properties().items())
    outside = Notice(peer, (*addrs, f"/ip4/8.8.8.8/tcp/1/p2p/{peer}"), mesh_tag("abc"))
    assert Notice.read(encoded(outside)) == notice
    assert mesh_tag("abc") != mesh_tag("abd")


@pytest.mark.parametrize(
    "changes",
    [
        {b"v": b"2"},
        {b"p": b""},
        {b"m": None},
        {b"a0": b"/ip4/8.8.8.8/tcp/1"},
        {b"a0": b"\xff"},
        {b"\xff": b""},
    ],
)
def test_what_is_not_ours_or_says_nothing_is_passed_over(changes):
    peer = Identity.generate().peer_id
    told = encoded(Notice(peer, (f"/ip4/192.168.1.7/tcp/4001/p2p/{peer}",), "tag"))
    assert Notice.read(told) is not None
    assert Notice.read(told | changes) is None
    assert Notice.read({}) is None


async def test_a_node_that_only_listens_on_loopback_says_nothing(autojump_clock, monkeypatch):
    opened = []
    monkeypatch.setattr(Lan, "_open", lambda self, notice: opened.append(notice))
    lan = Lan(Identity.generate().peer_id, "m", lambda: ["/ip4/127.0.0.1/tcp/5/p2p/x"], opened.append)
    with trio.move_on_after(500):
        await lan.run()
    assert opened == []


async def test_without_multicast_the_node_goes_on(autojump_clock, monkeypatch, caplog):
    def refused(self, notice):
        raise OSError("no such device")

    monkeypatch.setattr(Lan, "_open", refused)
    lan = Lan(Identity.generate().peer_id, "m", lambda: ["/ip4/10.0.0.1/tcp/5/p2p/x"], print)
    with caplog.at_level("INFO"):
        await lan.run()
    assert "no such device" in caplog.text


PROGRAM = textwrap.dedent(
    """
    import sys, trio
    from dht.lan import Lan
    from p2p import Identity

    ip, mesh, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3])

    async def main():
        me, found, came = Identity.generate().peer_id, set(), trio.Event()
        print(me, flush=True)

        def heard(addrs):
            found.update(addrs)
            if len(found) >= wanted:
                came.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(Lan(me, mesh, lambda: [f"/ip4/{ip}/tcp/4001/p2p/{me}"], heard).run)
            with trio.move_on_after(10 if wanted else 4):
                await came.wait()
                await trio.sleep(1.5)  # the other one hears of this one as well
            print(*sorted(found), flush=True)
            nursery.cancel_scope.cancel()

    trio.run(main)
    """
)


@pytest.fixture
def lan_of_two():
    """Two namespaces joined by a cable; how to run something in each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    name = uuid.uuid4().hex[:6]
    spaces = [f"lan{name}a", f"lan{name}b"]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for space in spaces:
            ip("netns", "add", space)
        ip(
            "link",
            "add",
            f"v{name}a",
            "netns",
            spaces[0],
            "type",
            "veth",
            "peer",
            f"v{name}b",
            "netns",
            spaces[1],
        )
        for space, end, host in zip(spaces, "ab", (1, 2), strict=True):
            ip("-n", space, "addr", "add", f"192.168.77.{host}/24", "dev", f"v{name}{end}")
            ip("-n", space, "link", "set", f"v{name}{end}", "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "route", "add", "224.0.0.0/4", "dev", f"v{name}{end}")
        yield [["ip", "netns", "exec", space] for space in spaces]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, timeout=20)


@pytest.mark.parametrize("same_mesh", [True, False])
def test_members_on_one_lan_find_each_other_and_nobody_else(lan_of_two, same_mesh):
    meshes = ["m1", "m1" if same_mesh else "m2"]
    running = [
        subprocess.Popen(
            [*inside, sys.executable, "-c", PROGRAM, f"192.168.77.{at}", mesh, str(int(same_mesh))],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for at, inside, mesh in zip((1, 2), lan_of_two, meshes, strict=True)
    ]  # fmt: skip
    told = [one.communicate(timeout=40)[0].splitlines() for one in running]
    assert [one.returncode for one in running] == [0, 0]
    for (me, heard), at in zip(told, (1, 2), strict=True):
        other = next(peer for peer, _ in told if peer != me)
        expected = f"/ip4/192.168.77.{3 - at}/tcp/4001/p2p/{other}" if same_mesh else ""
        assert heard == expected
