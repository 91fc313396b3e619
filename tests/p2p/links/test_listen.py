"""Where a listener says that it can be dialled."""

from p2p.links import listen
from p2p.links.types import LinksConfig


async def test_after_a_move_the_new_addresses_are_told(monkeypatch):
    async def refuse(sock):
        sock.close()

    listener = listen.Listener(LinksConfig(), refuse)
    await listener.open(["10.1.0.2", "127.0.0.1"])
    port = listener.addrs()[0].rpartition(":")[2]
    for ips in (["10.1.0.2", "127.0.0.1"], ["192.168.7.7", "127.0.0.1"]):
        monkeypatch.setattr(listen, "interface_ips", lambda ips=ips: [*ips, "fe80::1"])
        assert listener.addrs() == [f"{ip}:{port}" for ip in ips]
    listener.close()
    assert listener.addrs() == []


async def test_who_listens_on_one_address_says_that_one():
    async def refuse(sock):
        sock.close()

    listener = listen.Listener(LinksConfig(listen=("127.0.0.1",)), refuse)
    await listener.open(["10.1.0.2"])
    assert [addr.rpartition(":")[0] for addr in listener.addrs()] == ["127.0.0.1"]
    listener.close()
