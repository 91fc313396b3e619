"""Rings of real stages over an in-memory network, with a gateway that hosts nothing, for tests of serving."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial

import trio

from model_shards import Engine, Grammars, load_span
from node import embedded
from node.adverts import HostAdvert, ModelAdvert, NodeAdvert
from node.atlas import Atlas
from node.gateway import GenerateRequest
from node.metrics import Metrics
from node.serve.compute import Compute
from node.serve.config import ServeConfig
from node.serve.failover import Patience
from node.serve.gateway import MeshGateway
from node.serve.returns import Returns
from node.serve.stage import StageService
from p2p import Rpc, RpcRefusal
from p2p.testing import MemoryNetwork

MANIFEST = "m" * 64
CUTS = {"two": [(0, 4), (4, 8)], "four": [(0, 1), (1, 4), (4, 6), (6, 8)], "one": [(0, 8)]}
KV_BYTES = 4 << 20


class Node:
    """One node's serving side."""

    def __init__(self, host):
        self.host = host
        self.me = str(host.peer_id)
        self.rpc = Rpc(host)
        self.returns = Returns(self.rpc)
        self.computes = {}
        self.stages = StageService(self.rpc, self.me, self.returns, self._lookup)

    def _lookup(self, manifest_id, start, end):
        compute = self.computes.get(manifest_id)
        span = compute and compute.engine.span
        if not span or not span.start <= start < end <= span.end:
            raise RpcRefusal("not_found", f"layers {start}:{end} are not here")
        return compute


class Ring:
    """Stages on nodes of their own plus a gateway that hosts nothing."""

    def __init__(self, network, nodes, gateway, spans, config=None):
        self.network, self.nodes, self.entry = network, nodes, gateway
        self.spans = spans
        self.suspects = set()
        self.rates = {}
        self.adapters = {}
        self.metrics = Metrics()
        self.gateway = MeshGateway(
            gateway.rpc,
            gateway.me,
            gateway.returns,
            None,
            self.atlas,
            lambda model: "",
            dict,
            self.metrics,
            config,
        )

    def count(self, name):
        lines = self.metrics.text().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    def atlas(self):
        card = NodeAdvert("n", "0", (), None, True, 1, 1.0, 1.0, "cpu")
        nodes = {node.me: card for node in [*self.nodes, self.entry]}
        hosts = {}
        for node, (start, end) in zip(self.nodes, self.spans, strict=True):
            compute = node.computes[MANIFEST]
            hosts[node.me] = HostAdvert(
                start,
                end,
                "ready",
                1,
                kv_tokens_free=compute.engine.kv_tokens_free(),
                kv_tokens_yielding=compute.tokens_yielding(),
                prefixes=compute.held.summary(),
                **self.rates.get(node.me, {}),
            )
        advert = ModelAdvert(
            "toy", MANIFEST, 1, "bfloat16", "none", 1, 4, 1024, 8, 1, 1, 1, True, 1.0, 384, 256
        )
        return Atlas(
            nodes,
            frozenset(self.suspects),
            {"toy": advert},
            {MANIFEST: hosts},
            {},
            {},
            adapters=self.adapters,
        )

    @property
    def living(self):
        return [node for node in self.nodes if node.me in self.network.hosts]

    def busy(self):
        return sum(node.computes[MANIFEST].engine.sessions() for node in self.living)

    async def quiet(self):
        with trio.fail_after(5):
            while self.busy() or len(self.entry.returns) or any(node.stages.sessions for node in self.living):
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def ring_of(model, spans, copies=1, serve=None):
    config, index, tokenizer = model
    network = MemoryNetwork()
    spans = [span for span in spans for _ in range(copies)]
    nodes = [Node(network.host(f"stage-{i}")) for i in range(len(spans))]
    gateway = Node(network.host("gateway"))
    async with trio.open_nursery() as nursery:
        for node in [*nodes, gateway]:
            await nursery.start(node.rpc.run)
            await nursery.start(node.stages.run)
        for node, (start, end) in zip(nodes, spans, strict=True):
            engine = Engine(load_span(embedded.path(), index, config, start, end), kv_bytes_max=KV_BYTES)
            grammars = partial(Grammars, tokenizer, config.vocab, config.eos_ids)
            node.computes[MANIFEST] = Compute(engine, trio.CapacityLimiter(1), grammars=grammars)
            nursery.start_soon(node.computes[MANIFEST].run)
        everyone = [*nodes, gateway]
        for i, node in enumerate(everyone):
            for other in everyone[:i]:
                await node.host.connect(other.host.addrs())
        ring = Ring(network, nodes, gateway, spans, serve or ServeConfig(patience=Patience(mend_s=0.3)))
        await nursery.start(ring.gateway.run)
        yield ring
        nursery.cancel_scope.cancel()


def wish(prompt, **more):
    fields = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "ignore_eos": True}
    fields |= {"model": "toy", "deadline_s": None} | more
    return GenerateRequest(request_id="r", prompt=tuple(prompt), **fields)


async def tokens_of(ring, request):
    async with ring.gateway.generate(request) as events:
        return [event async for event in events]
