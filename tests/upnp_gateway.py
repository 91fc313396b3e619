"""A home's router as UPnP knows it: on loopback for unit tests, or as a program on a computer of the laboratory.

Run as `python upnp_gateway.py OWN_IP OUTER_IP`: it prints a JSON line for each port that it is asked to
forward or free.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from functools import partial

import trio

WAN = "urn:schemas-upnp-org:service:WANIPConnection:1"
DESCRIPTION = f"""<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><device><deviceList><device>
<serviceList><service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>
<controlURL>/no</controlURL></service><service><serviceType>{WAN}</serviceType><controlURL>/ctl</controlURL></service>
</serviceList></device></deviceList></device></root>"""


class FakeGateway:
    """A router on loopback. `taken` are outer ports of others; `permanent` as those that know no leases."""

    def __init__(self) -> None:
        self.outer_ip = "45.0.1.1"
        self.taken: set[int] = set()
        self.permanent = False
        self.location = ""
        self.description = DESCRIPTION
        self.ports: dict[int, tuple[str, int, int]] = {}
        self.orders: list[str] = []

    async def http(self, stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await stream.receive_some(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        while len(body) < length:
            body += await stream.receive_some(65536)
        status, text = self.answer(head.decode(), body.decode())
        said = text.encode()
        await stream.send_all(f"HTTP/1.1 {status} -\r\nContent-Length: {len(said)}\r\n\r\n".encode() + said)
        await trio.sleep(30)  # some keep the connection open

    def answer(self, head: str, body: str) -> tuple[int, str]:
        if head.startswith("GET /root.xml "):
            return 200, self.description
        action = re.search(r'SOAPAction: "(.*)#(\w+)"', head)
        if not head.startswith("POST /ctl ") or action is None or action[1] != WAN:
            return 404, "<no/>"
        self.orders.append(action[2])
        values = dict(re.findall(r"<(New\w+)>([^<]*)</", body))
        match action[2]:
            case "GetExternalIPAddress":
                return 200, f"<a><NewExternalIPAddress>{self.outer_ip}</NewExternalIPAddress></a>"
            case "AddPortMapping":
                port, lease_s = int(values["NewExternalPort"]), int(values["NewLeaseDuration"])
                if self.permanent and lease_s:
                    return self.fault(725, "OnlyPermanentLeasesSupported")
                if port in self.taken:
                    return self.fault(718, "ConflictInMappingEntry")
                self.ports[port] = (values["NewInternalClient"], int(values["NewInternalPort"]), lease_s)
                return 200, "<ok/>"
            case "DeletePortMapping":
                self.ports.pop(int(values["NewExternalPort"]))
                return 200, "<ok/>"
        return self.fault(401, "Invalid Action")

    def fault(self, code: int, said: str) -> tuple[int, str]:
        return 500, f"<f><errorCode>{code}</errorCode><errorDescription>{said}</errorDescription></f>"

    async def ssdp(self, sock) -> None:
        while True:
            asked, sender = await sock.recvfrom(2048)
            if asked.startswith(b"M-SEARCH * HTTP/1.1\r\n") and b"ssdp:discover" in asked:
                await sock.sendto(f"HTTP/1.1 200 OK\r\nLOCATION: {self.location}\r\n\r\n".encode(), sender)


class PrintingGateway(FakeGateway):
    """Says what it was asked for, so that the laboratory's router can do it."""

    def answer(self, head: str, body: str) -> tuple[int, str]:
        before = dict(self.ports)
        answered = super().answer(head, body)
        for port in self.ports.keys() - before.keys():
            ip, inner, _ = self.ports[port]
            print(json.dumps({"add": port, "ip": ip, "inner_port": inner}), flush=True)
        for port in before.keys() - self.ports.keys():
            print(json.dumps({"free": port}), flush=True)
        return answered


async def main(own_ip: str, outer_ip: str) -> None:
    gateway = PrintingGateway()
    gateway.outer_ip, gateway.location = outer_ip, f"http://{own_ip}:5000/root.xml"
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("", 1900))
        group = socket.inet_aton("239.255.255.250") + socket.inet_aton(own_ip)
        sock.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_ADD_MEMBERSHIP, group)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.ssdp, sock)
            await nursery.start(partial(trio.serve_tcp, gateway.http, 5000))
            print(json.dumps({"ready": True}), flush=True)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
