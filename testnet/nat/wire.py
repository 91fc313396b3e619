"""The process that is the small internet: one TUN device in each host's namespace, and `Network` between them.

Started by `NatLab` as `python -m testnet.nat.wire`. It reads orders as JSON lines from stdin and answers each with one
line; it ends with its stdin, so that it never outlives who started it. Linux and root only.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from typing import Any

from testnet.nat.network import Delivery, HostSpec, LinkSpec, Network, RouterSpec

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_BATCH = 64
_WAITING_MAX = 20_000
DEVICE = "net0"


def enter(namespace: str) -> None:
    """Move this thread into a namespace of `ip netns`. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}", "rb") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def open_tun(namespace: str) -> int:
    """The descriptor of a new TUN device in `namespace`. This thread stays there."""
    enter(namespace)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def set_address(namespace: str, ip: str, *, fresh: bool) -> None:
    """Give the device its address; the whole world is beyond it. Raises CalledProcessError."""
    steps = [f"addr flush dev {DEVICE}"] if not fresh else ["link set lo up"]
    steps += [
        f"addr add {ip}/32 dev {DEVICE}",
        f"link set {DEVICE} up",
        f"route replace default dev {DEVICE} src {ip}",
    ]
    subprocess.run(
        ["ip", "-n", namespace, "-batch", "-"],
        input="\n".join(steps),
        text=True,
        check=True,
        capture_output=True,
    )


def host_spec(document: dict[str, Any]) -> HostSpec:
    """A host as orders describe it."""
    return HostSpec(**{**document, "link": LinkSpec(**document.get("link", {}))})


class Wire:
    """Moves packets until stdin ends."""

    def __init__(self, document: dict[str, Any]) -> None:
        hosts = [host_spec(one) for one in document["hosts"]]
        routers = [RouterSpec(**one) for one in document["routers"]]
        self.prefix = str(document["prefix"])
        self.network = Network(routers, hosts, seed=int(document["seed"]))
        self.tuns: dict[str, int] = {}
        self._waiting: list[tuple[float, int, Delivery]] = []
        self._count = 0
        for host in hosts:
            self.tuns[host.name] = open_tun(self.prefix + host.name)
            set_address(self.prefix + host.name, host.ip, fresh=True)
        self._names = {tun: name for name, tun in self.tuns.items()}

    def run(self) -> None:
        poll = select.epoll()
        for tun in self._names:
            poll.register(tun, select.EPOLLIN)
        orders = sys.stdin.fileno()
        poll.register(orders, select.EPOLLIN | select.EPOLLHUP)
        rest = b""
        while True:
            for fd, _ in poll.poll(self._deliver_due()):
                if fd != orders:
                    self._take(fd)
                    continue
                read = os.read(orders, 65536)
                if not read:
                    return
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    print(json.dumps(self._order(json.loads(line))), flush=True)

    def _take(self, tun: int) -> None:
        name = self._names[tun]
        for _ in range(_BATCH):
            try:
                packet = os.read(tun, 65536)
            except (BlockingIOError, OSError):
                return
            now_s = time.monotonic()
            for delivery in self.network.send(name, packet, now_s):
                if delivery.due_s <= now_s and not self._waiting:
                    self._write(delivery)
                elif len(self._waiting) < _WAITING_MAX:
                    self._count += 1
                    heapq.heappush(self._waiting, (delivery.due_s, self._count, delivery))

    def _deliver_due(self) -> float:
        """Write what is due; the seconds until more is (-1: nothing waits)."""
        while self._waiting:
            left_s = self._waiting[0][0] - time.monotonic()
            if left_s > 0:
                return left_s
            self._write(heapq.heappop(self._waiting)[2])
        return -1.0

    def _write(self, delivery: Delivery) -> None:
        try:
            os.write(self.tuns[delivery.host], delivery.packet)
        except OSError:
            pass  # the device is full or down, and the packet lost as on any line

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        """What an order led to: {} or {"error": why}."""
        try:
            match order.pop("do"):
                case "attach":
                    host = host_spec(order)
                    set_address(self.prefix + host.name, host.ip, fresh=False)
                    self.network.attach(host)
                case "detach":
                    self.network.detach(order["name"])
                case "restart":
                    self.network.routers[order["router"]].restart()
                case "forward":
                    inner = (str(order["ip"]), int(order["inner_port"]))
                    self.network.routers[order["router"]].forward(order["protocol"], order["port"], inner)
                case "unforward":
                    self.network.routers[order["router"]].unforward(order["protocol"], order["port"])
                case "dropped":
                    return {"dropped": {name: one.dropped for name, one in self.network.routers.items()}}
                case other:
                    return {"error": f"no order is called {other!r}"}
        except (KeyError, TypeError, ValueError, OSError, subprocess.CalledProcessError) as problem:
            return {"error": f"{type(problem).__name__}: {problem}"}
        return {}


if __name__ == "__main__":
    wire = Wire(json.loads(sys.stdin.buffer.raw.readline()))  # type: ignore[union-attr]  # unbuffered: the rest is polled
    print("ready", flush=True)
    wire.run()
