"""The laboratory itself, with plain sockets: namespaces that are computers behind routers, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from testnet import LaunchFailed
from testnet.nat import HostSpec, LinkSpec, NatLab, RouterSpec, sweep, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no NAT laboratory: {REASON}")

ROUTERS = [RouterSpec("ra", "cone", "45.0.1.1"), RouterSpec("rb", "symmetric", "45.0.2.1")]
COMPUTERS = [
    HostSpec("pub", "45.0.0.10", None, LinkSpec(delay_s=0.02)),
    HostSpec("a", "10.1.0.2", "ra"),
    HostSpec("b", "10.2.0.2", "rb"),
]


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if f"shoal-nat-{os.getpid()}-" in line]


@pytest.fixture(scope="module")
def lab():
    with NatLab(ROUTERS, COMPUTERS) as made:
        yield made
    assert not namespaces()


def listening(lab, host, port=0):
    with lab.inside(host):
        return socket.create_server(("0.0.0.0", port))


def connect(lab, host, target, source_port=0, timeout_s=2.0):
    with lab.inside(host):
        return socket.create_connection(target, timeout_s, source_address=("", source_port))


def heard(lab, host, port, servers):
    """What each of `servers` sees a datagram of one socket of `host` come from."""
    with lab.inside(host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", port))
        for server in servers:
            sock.sendto(b"hello", ("45.0.0.10", server.getsockname()[1]))
        return [server.recvfrom(9)[1] for server in servers]


def test_each_router_shows_the_ports_of_its_kind(lab):
    with lab.inside("pub"):
        servers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for server in servers:
        server.bind(("", 0))
        server.settimeout(2.0)
    assert heard(lab, "a", 4001, servers) == [("45.0.1.1", 4001)] * 2
    one, two = heard(lab, "b", 4001, servers)
    assert one[0] == two[0] == "45.0.2.1"
    assert len({one, two, ("45.0.2.1", 4001)}) == 3
    for server in servers:
        server.close()


def test_nobody_from_outside_reaches_a_home_until_a_port_is_forwarded(lab):
    with listening(lab, "a", 7003) as server:
        with pytest.raises(OSError):
            connect(lab, "pub", ("45.0.1.1", 7003), timeout_s=0.3)
        lab.forward("ra", 7003, "10.1.0.2", 7003)
        with connect(lab, "pub", ("45.0.1.1", 7003)):
            server.accept()[0].close()
        lab.unforward("ra", 7003)


def test_a_computer_that_moves_is_elsewhere(lab):
    lab.move("a", "10.2.0.7", "rb")
    try:
        with listening(lab, "a", 7004) as server, connect(lab, "b", ("10.2.0.7", 7004)):
            accepted, peer = server.accept()
            accepted.close()
        assert peer[0] == "10.2.0.2"
    finally:
        lab.move("a", "10.1.0.2", "ra")


def test_an_unplugged_computer_is_silent(lab):
    with listening(lab, "pub", 7005):
        lab.unplug("a")
        with pytest.raises(OSError):
            connect(lab, "a", ("45.0.0.10", 7005), timeout_s=0.3)
        lab.plug("a")
        connect(lab, "a", ("45.0.0.10", 7005)).close()


def test_this_machine_is_out_of_reach(lab):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError):
        connect(lab, "pub", server.getsockname(), timeout_s=0.3)


def test_a_wrong_order_is_an_error_and_the_wire_goes_on(lab):
    with pytest.raises(LaunchFailed, match="refused"):
        lab.restart("no such router")
    with pytest.raises(LaunchFailed, match="refused"):
        lab.order("dance")
    assert lab.order("dropped")["dropped"].keys() == {"ra", "rb"}


def test_what_a_killed_laboratory_left_goes():
    with subprocess.Popen(["sleep", "0"]) as gone:
        pass
    name = f"shoal-nat-{gone.pid}-left"
    subprocess.run(["ip", "netns", "add", name], check=True)
    assert sweep() == [name]
