"""Members in real homes: what they conclude, how they reach one another, and what comes of it when one thing fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from testnet.nat import HostSpec, LinkSpec, NatMesh, measure, why_not
from testnet.nat.mesh import plan

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no NAT laboratory: {REASON}")
FAST = LinkSpec(delay_s=0.005)


def echo(mesh, one, other, count):
    """Seconds for so many bytes there and back, whole."""
    answer = mesh.peers[one].ask("echo", peer=mesh.peers[other].peer, bytes=count)
    assert answer["whole"]
    return answer["s"]


def relays(mesh, host):
    return set(mesh.status(host)["reach"]["relays"])


def path_is(mesh, one, other, *paths):
    mesh.until(
        lambda: mesh.path(one, other) in paths and mesh.path(other, one) in paths,
        f"{one} and {other} connected {' or '.join(paths)}",
    )


def test_homes_meet_by_a_hole_where_routers_permit_and_through_a_relay_where_not():
    with NatMesh(["cone", "symmetric", "cone"], 2, FAST) as mesh:
        path_is(mesh, "h1", "h3", "hole-punched")
        path_is(mesh, "h1", "h2", "relayed")
        for host, nat in (("p0", "none"), ("h1", "port-preserving"), ("h2", "symmetric")):
            mesh.until(
                lambda host=host, nat=nat: mesh.status(host)["reach"]["nat"] == nat, f"{host} is {nat}"
            )
        verdicts = {host: mesh.status(host)["reach"]["verdict"] for host in mesh.peers}
        assert verdicts == {"p0": "public", "p1": "public", "h1": "private", "h2": "private", "h3": "private"}
        echo(mesh, "h1", "h2", 100_000)
        echo(mesh, "h3", "h1", 100_000)


@pytest.mark.slow
def test_a_relay_that_dies_is_replaced_and_the_peers_meet_again():
    with NatMesh(["symmetric", "symmetric"], 3, FAST) as mesh:
        path_is(mesh, "h1", "h2", "relayed")
        mesh.until(lambda: len(relays(mesh, "h1")) == 2, "two relays")
        first = next(host for host in ("p1", "p2") if mesh.peers[host].peer in relays(mesh, "h1"))
        gone = mesh.peers[first].peer
        mesh.peers[first].end()
        left = {"p0", "p1", "p2"} - {first}
        expected = {mesh.peers[host].peer for host in left}
        mesh.until(lambda: relays(mesh, "h1") == expected, "the dead relay is replaced", 30.0)
        path_is(mesh, "h1", "h2", "relayed")
        echo(mesh, "h1", "h2", 10_000)
        assert not any(gone in address for address in mesh.status("h1")["addrs"])


@pytest.mark.slow
def test_a_relay_that_stalls_is_left_and_the_peers_meet_again():
    with NatMesh(["symmetric", "symmetric"], 2, FAST) as mesh:
        path_is(mesh, "h1", "h2", "relayed")
        mesh.until(lambda: len(relays(mesh, "h1")) == len(relays(mesh, "h2")) == 2, "two relays")
        mesh.peers["p1"].signal(signal.SIGSTOP)
        only = {mesh.peers["p0"].peer}
        mesh.until(
            lambda: relays(mesh, "h1") == relays(mesh, "h2") == only, "the stalled relay is left", 30.0
        )
        path_is(mesh, "h1", "h2", "relayed")
        echo(mesh, "h1", "h2", 10_000)
        mesh.peers["p1"].signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_relay_gives_no_more_than_its_owner_lets_it():
    with NatMesh(["symmetric", "symmetric"], 1, FAST, flags=("--relay-mbps", "4")) as mesh:
        path_is(mesh, "h1", "h2", "relayed")
        took_s = echo(mesh, "h1", "h2", 500_000)
        assert took_s > 0.9 * 2 * 500_000 * 8 / 4e6


@pytest.mark.slow
def test_whoever_relays_nothing_is_asked_for_nothing():
    with NatMesh(["cone", "cone"], 1, FAST, flags=("--relay-mbps", "0")) as mesh:
        mesh.until(lambda: mesh.status("h1")["reach"]["verdict"] == "private", "h1 is private")
        mesh.until(lambda: mesh.status("h2")["reach"]["verdict"] == "private", "h2 is private")
        assert relays(mesh, "h1") == set()
        assert mesh.path("h1", "h2") == "none"


@pytest.mark.slow
def test_a_router_that_forgets_everything_costs_a_moment():
    with NatMesh(["cone", "cone"], 1, FAST) as mesh:
        path_is(mesh, "h1", "h2", "hole-punched")
        mesh.lab.restart("r1")
        path_is(mesh, "h1", "h2", "hole-punched")
        echo(mesh, "h1", "h2", 10_000)


@pytest.mark.slow
def test_a_forwarded_port_makes_a_home_reachable():
    with NatMesh(["symmetric", "symmetric"], 2, FAST, later=("h1",)) as mesh:
        mesh.lab.forward("r1", 4001, "10.1.0.2", 4001)
        mesh.peers["h1"].start(mesh.peers["p0"].ask("invite")["invite"]).ready()
        mesh.until(lambda: mesh.status("h1")["reach"]["verdict"] == "public", "h1 is public")
        path_is(mesh, "h2", "h1", "direct")


@pytest.mark.slow
def test_a_router_with_upnp_is_asked_for_the_port_and_the_home_is_reachable():
    gateway = HostSpec("gw1", "10.1.0.1", "r1")
    program = Path(__file__).parents[2] / "upnp_gateway.py"
    with NatMesh(["symmetric", "symmetric"], 1, FAST, later=("h1",), others=(gateway,)) as mesh:
        command = mesh.lab.command("gw1", sys.executable, str(program), "10.1.0.1", "45.0.1.1")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
            try:
                assert json.loads(running.stdout.readline()) == {"ready": True}
                mesh.peers["h1"].start(mesh.peers["p0"].ask("invite")["invite"]).ready()
                wish = json.loads(running.stdout.readline())
                assert wish == {"add": 4001, "ip": "10.1.0.2", "inner_port": 4001}
                mesh.lab.forward("r1", 4001, "10.1.0.2", 4001)
                mesh.until(lambda: mesh.status("h1")["reach"]["verdict"] == "public", "h1 is public")
                path_is(mesh, "h2", "h1", "direct")
                assert any("/ip4/45.0.1.1/tcp/4001/" in one for one in mesh.status("h1")["addrs"])
                mesh.peers["h1"].leave()
                assert json.loads(running.stdout.readline()) == {"free": 4001}
            finally:
                running.kill()


@pytest.mark.slow
def test_a_computer_that_moves_is_found_at_its_new_place():
    with NatMesh(["cone", "symmetric"], 1, FAST) as mesh:
        path_is(mesh, "h1", "h2", "relayed")
        mesh.lab.move("h1", "45.0.0.77", None)
        mesh.until(lambda: mesh.status("h1")["reach"]["verdict"] == "public", "h1 is public now")
        path_is(mesh, "h1", "h2", "direct")
        echo(mesh, "h2", "h1", 10_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("homes", "path"),
    [
        (("cone", "cone"), "hole-punched"),
        (("double", "shifting"), "hole-punched"),
        (("firewall", "cone"), "hole-punched"),
        (("symmetric", "cone"), "relayed"),
        (("symmetric", "symmetric"), "relayed"),
        (("symmetric", "open"), "direct"),
    ],
)
def test_pairs_of_homes_come_to_the_best_path_there_is(homes, path):
    assert measure(*homes, FAST).path == path


def test_an_unknown_home_is_refused():
    with pytest.raises(ValueError, match="castle"):
        plan(["castle"], 1, FAST)
