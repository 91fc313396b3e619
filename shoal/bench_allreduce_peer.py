"""One peer of `shoal bench allreduce`, in a process of its own: reads orders from stdin, answers on stdout.

It averages normally distributed tensors that it can also compute for every other peer, so that the result can be
checked against the exact mean. It knows nothing of other processes but their addresses.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import trio

from collectives import CollectiveError, DetectorSettings, Reduced, Run, RunConfig, Settings, open_run
from p2p import HostConfig, Identity, Links, P2pError, Rpc, RpcConfig, open_host
from shoal.bench_peers import Memory, first_of, hear, say

MESH = "bench"
KEY = bytes(range(32))
CHECK_ELEMENTS = 1 << 20
# Speed is measured here, not failure: nobody is given up because the machine is busy.
PATIENT = DetectorSettings(silence_min_s=30.0, silence_max_s=60.0, dead_after_s=60.0)


def tensors_of(index: int, mib: float) -> list[torch.Tensor]:
    """Four tensors of uneven sizes, `mib` in all, fp32; the same for whoever asks for `index`."""
    elements = int(mib * (1 << 18))
    cuts = [0, elements // 2, elements // 2 + elements // 3, elements - elements // 16, elements]
    whole = torch.randn(elements, generator=torch.Generator().manual_seed(1000 + index))
    return [whole[start:end] for start, end in itertools.pairwise(cuts)]


def error_of(result: Sequence[torch.Tensor], peers: int, mib: float) -> float:
    """Relative L2 error against the mean in double precision."""
    inputs = [torch.cat(tensors_of(index, mib)) for index in range(peers)]
    flat = torch.cat([tensor.reshape(-1) for tensor in result])
    wrong = right = 0.0
    for start in range(0, len(flat), CHECK_ELEMENTS):
        end = start + CHECK_ELEMENTS
        mean = torch.stack([one[start:end] for one in inputs]).double().mean(0)
        wrong += float((flat[start:end].double() - mean).square().sum())
        right += float(mean.square().sum())
    return (wrong / right) ** 0.5 if right else 0.0


async def take_part(settings: dict[str, Any]) -> None:
    """The whole life of the peer."""
    torch.set_num_threads(1)
    identity = Identity.generate()
    async with open_host(identity, MESH, KEY, HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        rpc = Rpc(host, RpcConfig(silence_s=60.0))
        links = Links(host, rpc, identity)
        async with trio.open_nursery() as nursery:
            await nursery.start(rpc.run)
            await nursery.start(links.run)
            await say(peer=host.peer_id, addrs=host.addrs())
            order = await hear()
            if order is not None:
                for addrs in order["addrs"][: settings["index"]]:
                    await host.connect(addrs)
                while len(host.peers()) < settings["peers"] - 1:  # noqa: ASYNC110 - the host counts, nobody tells
                    await trio.sleep(0.01)
                rate = settings["rate_mbit"]
                config = RunConfig(
                    codec=settings["codec"],
                    uplink_bps=0.0 if rate is None else rate * 1e6,
                    agreement=Settings(members_min=settings["peers"], no_quorum_s=60.0),
                    detector=PATIENT,
                )
                async with open_run(
                    host, rpc, links, identity, "bench", config, founders=order["peers"]
                ) as run:
                    await rounds(run, links, settings)
            nursery.cancel_scope.cancel()


async def rounds(run: Run, links: Links, settings: dict[str, Any]) -> None:
    """Until stdin ends."""
    tensors = tensors_of(settings["index"], settings["mib"])
    tensor_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    async with run.round(tag="first") as r:
        await r.reduce([torch.ones(1)])  # loads what a process loads once, which is not a reduction's memory
    memory = Memory()
    memory.start()
    result: Reduced | None = None
    out = [torch.zeros_like(tensor) for tensor in tensors]  # like a trainer, which has room for a result
    await say(ready=True)
    while (order := await hear()) is not None:
        if "check" in order and result is not None:
            await say(
                memory_ratio=memory.beyond() / tensor_bytes,
                rel_l2_error=error_of(result.tensors, settings["peers"], settings["mib"]),
                paths=[report.path for report in links.report()],
            )
            continue
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        async with run.round() as r:
            result = await r.reduce(tensors, out=out)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        await say(
            took_s=took_s,
            cpu_s=cpu_s,
            digest=result.digest.hex(),
            members=len(result.members),
            bytes_sent=result.bytes_sent,
            bytes_received=result.bytes_received,
        )


def main() -> None:
    """`python -m shoal.bench_allreduce_peer SETTINGS`."""
    try:
        trio.run(take_part, json.loads(sys.argv[1]))
    except* (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
    except* (CollectiveError, P2pError) as problems:
        print(json.dumps({"failed": str(first_of(problems))}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
