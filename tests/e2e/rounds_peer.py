"""A zygote that forks members of a training run, each a real process with sockets, a journal and a log of what it saw.

Reads one JSON order a line on stdin, answers one a line. Forking after the imports makes a restarted member be back in
a fraction of a second. Each member averages integers that anybody can compute for any member and epoch, so that every
result can be checked against the exact mean over the members that it names.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import trio

from collectives import Behind, NoQuorum, RoundFailed, RunConfig, open_run
from p2p import HostConfig, Identity, Links, P2pError, Rpc, open_host

MESH, KEY = "oracle", bytes(range(32))
SIZES = [40_000, 7, 1_300]  # of the tensors; an order may say others
TAG = "outer"


def values(peer: str, epoch: int) -> list[torch.Tensor]:
    """What `peer` contributes to `epoch`: integers, so that sums are exact."""
    seed = sum(peer.encode()) * 1_000_003 + epoch
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-99, 100, (size,), generator=g).float() for size in SIZES]


def weight_of(peer: str, epoch: int) -> float:
    return float(1 + (sum(peer.encode()) + epoch) % 5)


def exact_mean(members: list[tuple[str, float]], epoch: int) -> list[torch.Tensor]:
    total = sum(weight for _, weight in members)
    sums = [torch.zeros(size) for size in SIZES]
    for peer, weight in members:
        for index, tensor in enumerate(values(peer, epoch)):
            sums[index] += weight * tensor
    return [one / total for one in sums]


class Member:
    """One life of one member."""

    def __init__(self, order: dict) -> None:
        self.order = order
        self.log = open(order["log"], "a", buffering=1)  # noqa: SIM115 - as long as the process
        self.state = {f"w{n}": torch.zeros(size) for n, size in enumerate(SIZES)}
        self.epoch = 0
        self.came_back = False

    def say(self, what: str, **more: object) -> None:
        self.log.write(json.dumps({"what": what, "at": time.monotonic(), **more}) + "\n")

    async def live(self) -> None:
        identity = Identity.load_or_create(Path(self.order["key"]))
        listen = (f"/ip4/127.0.0.1/tcp/{self.order['port']}",)
        async with open_host(identity, MESH, KEY, HostConfig(listen=listen)) as host:
            rpc = Rpc(host)
            links = Links(host, rpc, identity)
            self.say("up", peer=host.peer_id, pid=os.getpid())
            async with trio.open_nursery() as nursery:
                await nursery.start(rpc.run)
                await nursery.start(links.run)
                nursery.start_soon(self.stay_connected, host)
                config = RunConfig(
                    round_deadline_s=self.order["deadline_s"], agreement=self.order["settings"]
                )
                async with open_run(
                    host, rpc, links, identity, "oracle", config,
                    founders=self.order["founders"], journal_dir=Path(self.order["journal"]),
                ) as run:  # fmt: skip
                    while len(host.peers()) < self.order["peers_min"]:  # noqa: ASYNC110 - the host counts
                        await trio.sleep(0.02)
                    await self.rounds(run)
                nursery.cancel_scope.cancel()

    async def stay_connected(self, host) -> None:
        while True:
            async with trio.open_nursery() as nursery:
                for peer, port in self.order["ports"].items():
                    if peer < host.peer_id and not host.is_connected(peer):
                        nursery.start_soon(self.dial, host, f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}")
            await trio.sleep(0.2)

    async def dial(self, host, addr: str) -> None:
        try:
            await host.connect([addr], deadline_s=2.0)
        except P2pError:
            pass

    async def rounds(self, run) -> None:
        me = run.me
        if run.committed(TAG) > 0 or self.order["rejoin"]:
            await self.fetch(run)
        else:
            await run.publish(self.state, 0)
        while self.epoch < self.order["rounds"]:
            if not self.came_back:  # what an inner loop takes: whoever is back may join the next round
                await trio.sleep(self.order["think_s"])
            self.came_back = False
            epoch = self.epoch + 1
            given, weight = values(me, epoch), weight_of(me, epoch)
            self.say("enters", epoch=epoch)
            began = time.monotonic()
            try:
                async with run.round(TAG) as r:
                    result = await r.reduce(given, weight)
            except RoundFailed as error:
                self.say(
                    "failed",
                    epoch=epoch,
                    why=type(error).__name__,
                    text=str(error),
                    began=began,
                    took_s=time.monotonic() - began,
                )
                await self.recover(run, error)
            else:
                await self.apply(run, result, began=began, took_s=time.monotonic() - began, own=True)
        self.say("end", epoch=self.epoch)
        await trio.sleep(self.order["linger_s"])

    async def apply(self, run, result, **more: object) -> None:
        members = [(member.peer, member.weight) for member in result.members]
        exact = self.order["check"] and all(
            torch.equal(seen, wanted)
            for seen, wanted in zip(result.tensors, exact_mean(members, result.epoch), strict=True)
        )
        for tensor, delta in zip(self.state.values(), result.tensors, strict=True):
            tensor += delta
        self.epoch = result.epoch
        snapshot = await run.publish(self.state, self.epoch)
        self.say(
            "commit", epoch=self.epoch, members=sorted(peer for peer, _ in members), exact=exact,
            digest=result.digest.hex(), state=snapshot.digest.hex(), first=run.members(TAG)[0], **more,
        )  # fmt: skip

    async def recover(self, run, error: RoundFailed) -> None:
        missed = run.catch_up(TAG)
        for result in missed:
            await self.apply(run, result, own=False)
        if missed:
            return
        if run.committed(TAG) > self.epoch or isinstance(error, Behind):
            await self.fetch(run)
        elif isinstance(error, NoQuorum):
            await trio.sleep(0.1)

    async def fetch(self, run) -> None:
        began = time.monotonic()
        try:
            snapshot = await run.fetch_state(TAG, deadline_s=self.order["deadline_s"])
        except NoQuorum as error:
            self.say("no state", text=str(error), took_s=time.monotonic() - began)
            return
        if snapshot.epoch >= self.epoch:
            self.state = {key: tensor.clone() for key, tensor in snapshot.tensors.items()}
            self.epoch = snapshot.epoch
        self.came_back = True
        self.say("fetched", epoch=self.epoch, state=snapshot.digest.hex(), took_s=time.monotonic() - began)


def forked(order: dict) -> None:
    """In the child, until it ends."""
    import logging

    from collectives.agreement import Settings

    logging.basicConfig(
        filename=order["log"] + ".err",
        level=order.get("level", "WARNING"),
        format="%(created).3f %(name)s %(message)s",
    )
    SIZES[:] = order["sizes"] or SIZES
    order["settings"] = Settings(**order.get("settings", {}))
    sys.stdin.close()
    os.setsid()  # a session of its own gets a fair share of a busy machine
    try:
        trio.run(Member(order).live)
    except BaseException:
        logging.exception("the member ends")
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "peer_of" in order:
            peers = [Identity.load_or_create(Path(path)).peer_id for path in order["peer_of"]]
            print(json.dumps({"peers": peers}), flush=True)
        elif "reap" in order:
            os.waitpid(order["reap"], 0)
            print(json.dumps({"reaped": order["reap"]}), flush=True)
        else:
            pid = os.fork()
            if pid == 0:
                forked(order)
            print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
