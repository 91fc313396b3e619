"""UPnP against a gateway made for the purpose: what it is asked, what it may answer, and what is not believed."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from upnp_gateway import DESCRIPTION, WAN, FakeGateway

from p2p.reach import upnp
from p2p.reach.mapper import PortMapper
from p2p.reach.upnp import UpnpFailed, answer_of, find_gateway, forward, location_of, service_of, take_back


@asynccontextmanager
async def gateway_at_home(monkeypatch):
    fake = FakeGateway()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(lambda task_status: _serve(fake, task_status))
        fake.location = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/root.xml"
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
            await sock.bind(("127.0.0.1", 0))
            monkeypatch.setattr(upnp, "GROUP", sock.getsockname())
            nursery.start_soon(fake.ssdp, sock)
            yield fake
            nursery.cancel_scope.cancel()


async def _serve(fake, task_status) -> None:
    await trio.serve_tcp(lambda stream: fake.http(stream), 0, host="127.0.0.1", task_status=task_status)


async def test_a_port_is_forwarded_and_taken_back(monkeypatch):
    async with gateway_at_home(monkeypatch) as fake:
        gateway = await find_gateway()
        made = await forward(gateway, 4001, 4001)
        assert made.outer == ("45.0.1.1", 4001)
        assert fake.ports == {4001: ("127.0.0.1", 4001, 3600)}
        await take_back(made)
        assert fake.ports == {}


async def test_a_port_of_others_is_left_to_them(monkeypatch):
    async with gateway_at_home(monkeypatch) as fake:
        fake.taken = {4001}
        made = await forward(await find_gateway(), 4001, 4001)
        assert made.outer[1] != 4001
        assert fake.ports[made.outer[1]][1] == 4001
        fake.taken = set(range(65536))
        with pytest.raises(UpnpFailed, match="Conflict"):
            await forward(await find_gateway(), 4001, 4001)


async def test_a_router_without_leases_is_asked_for_no_lease(monkeypatch):
    async with gateway_at_home(monkeypatch) as fake:
        fake.permanent = True
        assert (await forward(await find_gateway(), 4001, 4001)).lease_s == 0


@pytest.mark.parametrize("outer_ip", ["100.64.0.9", "192.168.1.1", "", "nonsense"])
async def test_a_router_behind_another_is_of_no_use(monkeypatch, outer_ip):
    async with gateway_at_home(monkeypatch) as fake:
        fake.outer_ip = outer_ip
        with pytest.raises(UpnpFailed, match=r"outer address|another router"):
            await forward(await find_gateway(), 4001, 4001)
        assert fake.ports == {}


@pytest.mark.parametrize("control", ["http://[::1/ctl", "http://10.9.9.9/ctl", "ftp://127.0.0.1/ctl"])
async def test_a_device_that_sends_us_elsewhere_for_orders_is_refused(monkeypatch, control):
    async with gateway_at_home(monkeypatch) as fake:
        fake.description = DESCRIPTION.replace("/ctl", control)
        with pytest.raises(UpnpFailed):
            await find_gateway()


async def test_a_router_that_hangs_up_is_a_failure_and_no_more(monkeypatch):
    async def hang_up(stream):
        stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()

    async with gateway_at_home(monkeypatch) as fake:
        monkeypatch.setattr(fake, "http", hang_up)
        with pytest.raises(UpnpFailed):
            await find_gateway()


async def test_the_mapper_tries_when_wanted_renews_and_cleans_up(monkeypatch, autojump_clock):
    asked = []

    async def find():
        asked.append(trio.current_time())
        if len(asked) == 1:
            raise UpnpFailed("no router answers")
        return upnp.Gateway("http://10.0.0.1/ctl", WAN, "10.0.0.2")

    async def order(gateway, action, arguments):
        asked.append(action)
        return {"NewExternalIPAddress": "45.0.1.1"}

    monkeypatch.setattr("p2p.reach.mapper.find_gateway", find)
    monkeypatch.setattr(upnp, "_order", order)
    changes = []
    mapper = PortMapper(lambda: 4001, lambda: changes.append(mapper.forwarding))
    wanted = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mapper.run, lambda: wanted, 0.5)
        await trio.sleep(5)
        assert asked == []
        wanted = True
        await trio.sleep(1)
        assert (mapper.problem, mapper.forwarding) == ("no router answers", None)
        await trio.sleep(602)
        wanted = False
        assert mapper.forwarding.outer == ("45.0.1.1", 4001)
        assert len(changes) == 1
        await trio.sleep(1801)
        assert asked.count("AddPortMapping") == 2, "renewed, though it is not wanted any more: it is in use"
        assert len(changes) == 1
        nursery.cancel_scope.cancel()
    assert asked[-1] == "DeletePortMapping"


def answered(location: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=1\r\nLocation: {location}\r\n\r\n".encode()


def test_a_search_is_answered_with_a_place_at_the_sender():
    assert location_of(answered("http://10.0.0.1:80/x"), "10.0.0.1") == "http://10.0.0.1:80/x"


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.9/x",
        "http://45.0.0.1/x",
        "https://10.0.0.1/x",
        "file:///etc/passwd",
        "http://router.example/x",
        "http://10.0.0.1:99999/x",
        "http://[::1/x",
        "",
    ],
)
def test_a_device_cannot_send_us_elsewhere(location):
    with pytest.raises(UpnpFailed):
        location_of(answered(location), "10.0.0.1")


def test_a_device_in_the_public_network_is_none_of_this_home():
    with pytest.raises(UpnpFailed):
        location_of(answered("http://45.0.0.1/x"), "45.0.0.1")


def test_the_service_is_found_with_or_without_a_base():
    assert service_of(DESCRIPTION.encode(), "http://10.0.0.1:5/a/b.xml") == ("http://10.0.0.1:5/ctl", WAN)
    based = DESCRIPTION.replace("<device>", "<URLBase>http://10.0.0.1:9/</URLBase><device>", 1)
    assert service_of(based.encode(), "http://10.0.0.1:5/x")[0] == "http://10.0.0.1:9/ctl"


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"<a",
        b"\xff\xfe\x00",
        b"<root/>",
        b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        b"<a>" + b"x" * (300 << 10) + b"</a>",
        b'<?xml version="1.0" encoding="nonsense"?><a/>',
    ],
)
def test_junk_is_refused(junk):
    with pytest.raises(UpnpFailed):
        service_of(junk, "http://10.0.0.1/")
    if junk != b"<root/>":
        with pytest.raises(UpnpFailed):
            answer_of(200, junk)
