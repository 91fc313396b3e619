"""A member without models: host, calls, gossip, directory and reach, as the daemon has them. For the laboratory.

Run as `python -m testnet.nat.peer DIRECTORY [INVITE] [--relay-mbps N]`. It reads orders as JSON lines from stdin,
answers each with one line, and ends with its stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from dht import Directory, DirectoryConfig, Gossip, GossipConfig, View
from node.config import DaemonConfig
from node.reaching import Reaching
from p2p import Call, Host, HostConfig, Identity, Invite, Method, P2pError, Rpc, Tensor, open_host

MESH = "laboratory"
SWARM_KEY = bytes(32)
LISTEN = "/ip4/0.0.0.0/tcp/4001"
ECHO_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class Blob:
    """Any bytes."""

    data: Tensor


ECHO = Method("laboratory/echo", Blob, Blob, payload_bytes_max=ECHO_BYTES_MAX, deadline_s=60.0, lane="bulk")


class Member:
    """What the orders are about."""

    def __init__(self, host: Host, rpc: Rpc, directory: Directory, reaching: Reaching) -> None:
        self.host, self.rpc, self.directory, self.reaching = host, rpc, directory, reaching
        rpc.serve(ECHO, self._echo)

    async def _echo(self, call: Call, blob: Blob) -> Blob:
        return blob

    async def order(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order; `error` where it failed."""
        try:
            match order["do"]:
                case "status":
                    return self.status()
                case "invite":
                    return {"invite": Invite(MESH, SWARM_KEY, tuple(self.host.addrs()[:12])).encode()}
                case "join":
                    self.directory.add(Invite.decode(order["invite"]).addrs)
                    return {}
                case "echo":
                    return await self.echo(str(order["peer"]), int(order["bytes"]))
                case other:
                    return {"error": f"no order is called {other!r}"}
        except (P2pError, KeyError, TypeError, ValueError) as problem:
            return {"error": f"{type(problem).__name__}: {problem}"}

    async def echo(self, peer: str, count: int) -> dict[str, Any]:
        """Seconds for `count` bytes there and back."""
        began_s = trio.current_time()
        answer = await self.rpc.call(peer, ECHO, Blob(Tensor("uint8", (count,), bytes(count))))
        return {"s": trio.current_time() - began_s, "whole": len(answer.data.data) == count}

    def status(self) -> dict[str, Any]:
        """Everything that is known of reach, and how each peer is connected."""
        paths = {str(peer): self.reaching.path(peer) for peer in self.host.peers()}
        rtt_s = {str(peer): self.rpc.rtt_s(peer) for peer in self.host.peers()}
        return {
            "peer": str(self.host.peer_id),
            "addrs": list(self.host.addrs()),
            "paths": paths,
            "rtt_s": rtt_s,
            "reach": self.reaching.document(),
        }


async def obey(member: Member) -> None:
    """Orders until stdin ends."""
    rest = b""
    while True:
        await trio.lowlevel.wait_readable(sys.stdin.fileno())
        read = os.read(sys.stdin.fileno(), 65536)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            print(json.dumps(await member.order(json.loads(line))), flush=True)


async def live(directory_path: Path, invite: str, mbps: float) -> None:
    """One member's life."""
    identity = Identity.load_or_create(directory_path / "identity")
    config = DaemonConfig(data_dir=directory_path, relay_mbps=mbps)
    async with open_host(identity, MESH, SWARM_KEY, HostConfig(listen=(LISTEN,))) as host:
        rpc = Rpc(host)
        view = View()
        gossip = Gossip(rpc, view, identity, GossipConfig())
        directory = Directory(host, gossip, identity, directory_path / "peers.json", DirectoryConfig())
        reaching = Reaching(host, rpc, gossip, view, config, lambda: None)
        member = Member(host, rpc, directory, reaching)
        async with trio.open_nursery() as nursery:
            for part in (rpc, gossip, directory, reaching):
                await nursery.start(part.run)
            if invite:
                directory.add(Invite.decode(invite).addrs)
            print(json.dumps({"ready": str(host.peer_id)}), flush=True)
            await obey(member)
            nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("invite", nargs="?", default="")
    parser.add_argument("--relay-mbps", type=float, default=20.0)
    options = parser.parse_args()
    trio.run(live, options.directory, options.invite, options.relay_mbps)


if __name__ == "__main__":
    main()
