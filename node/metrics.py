"""What this node counts, as Prometheus text: vLLM's names under the prefix `shoal_`, plus gauges of the mesh.

One `Metrics` a node with its own registry, so that several nodes live in one process. Gauges of the mesh
are read from the `/mesh` document when scraped. It measures nothing itself but the times between the calls
it receives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
QUANTILES = (0.5, 0.9, 0.99)


class Running:
    """One generation: call `entered` once, `token` for each token, `finished` at a good end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._began_s = metrics.clock_s()
        self._last_s: float | None = None
        self._entered = False
        metrics.waiting.labels(model).inc()

    def entered(self) -> None:
        """The mesh took the request: it no longer waits."""
        if not self._entered:
            self._entered = True
            self._metrics.waiting.labels(self._model).dec()
            self._metrics.running.labels(self._model).inc()

    def token(self) -> None:
        """One more token arrived."""
        now_s = self._metrics.clock_s()
        if self._last_s is None:
            self._metrics.first_token.labels(self._model).observe(now_s - self._began_s)
        else:
            self._metrics.between.labels(self._model).observe(now_s - self._last_s)
        self._last_s = now_s
        self._metrics.generated.labels(self._model).inc()

    def finished(self, reason: str) -> None:
        """The generation ended as it should."""
        self._metrics.success.labels(self._model, reason).inc()
        self._metrics.whole.labels(self._model).observe(self._metrics.clock_s() - self._began_s)

    def close(self) -> None:
        gauge = self._metrics.running if self._entered else self._metrics.waiting
        gauge.labels(self._model).dec()


class Metrics:
    """Counters and gauges of one node. `clock_s` is any steady clock, in seconds."""

    def __init__(self, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self.clock_s = clock_s
        self.registry = CollectorRegistry(auto_describe=False)
        self._build_requests()
        self._build_mesh()
        self._build_blobs()

    def _build_requests(self) -> None:
        model, registry = ["model_name"], self.registry

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, model, registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, [*model, *more], registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, model, buckets=buckets, registry=registry)

        self.running = gauge(
            "shoal_num_requests_running", "Generations that the mesh works on for this node."
        )
        self.waiting = gauge("shoal_num_requests_waiting", "Generations not yet taken by the mesh.")
        self.kv_usage = gauge("shoal_kv_cache_usage_perc", "Share of this node's KV cache in use, 0 to 1.")
        self.prefix_queries = counter("shoal_prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self.prefix_hits = counter("shoal_prefix_cache_hits", "Prompt tokens found in the cache.")
        self.prompt = counter("shoal_prompt_tokens", "Prompt tokens taken.")
        self.generated = counter("shoal_generation_tokens", "Tokens generated.")
        self.success = counter("shoal_request_success", "Generations ended well.", "finished_reason")
        self.failure = counter("shoal_request_failure", "Generations that failed or were left.", "code")
        self.preemptions = counter(
            "shoal_num_preemptions", "Times that a background request gave its room to others."
        )
        self.splits = counter(
            "shoal_split_sessions", "Requests whose prompt was read on one chain and answered on another."
        )
        self.passes = counter("shoal_passes", "Passes through a chain that made tokens.")
        self.drafts = counter("shoal_spec_decode_num_draft_tokens", "Tokens guessed.")
        self.accepted = counter("shoal_spec_decode_num_accepted_tokens", "Tokens guessed rightly.")
        self.failovers = counter("shoal_failovers", "Chains that were joined anew while a request ran.")
        self.replayed = counter("shoal_replayed_tokens", "Positions computed again for lost stages.")
        self.stall = histogram(
            "shoal_failover_stall_seconds", "Seconds without a token at a failover.", FIRST_TOKEN_BUCKETS_S
        )
        self.first_token = histogram(
            "shoal_time_to_first_token_seconds", "Seconds until the first token.", FIRST_TOKEN_BUCKETS_S
        )
        self.between = histogram(
            "shoal_inter_token_latency_seconds", "Seconds between two tokens.", BETWEEN_BUCKETS_S
        )
        self.whole = histogram(
            "shoal_e2e_request_latency_seconds", "Seconds of a whole generation.", WHOLE_BUCKETS_S
        )

    def _build_mesh(self) -> None:
        registry = self.registry
        self.nodes = Gauge(
            "shoal_mesh_nodes", "Nodes in this node's view, itself included.", registry=registry
        )
        self.connected = Gauge(
            "shoal_mesh_connected_peers", "Peers connected to this node.", registry=registry
        )
        self.relayed = Gauge(
            "shoal_mesh_relayed_share",
            "Share of connected peers that are reached by relay.",
            registry=registry,
        )
        self.guilty = Gauge(
            "shoal_run_guilty_peers",
            "Peers proved to have altered a run's results.",
            ["run"],
            registry=registry,
        )
        self.audited = Gauge(
            "shoal_run_audited_parts", "Parts of a run's results made again here.", ["run"], registry=registry
        )
        self.ping = Gauge(
            "shoal_mesh_ping_seconds", "Round trips to connected peers.", ["quantile"], registry=registry
        )
        self.standing = Gauge(
            "shoal_mesh_nodes_by_health",
            "Nodes whose work this gateway saw, by what it thinks of them.",
            ["state"],
            registry=registry,
        )
        self.slowdown = Gauge(
            "shoal_node_slowdown", "How many times slower than expected.", ["peer"], registry=registry
        )
        self.reliability = Gauge(
            "shoal_node_reliability", "The chance that a stage goes well.", ["peer"], registry=registry
        )
        self.copies = Gauge(
            "shoal_mesh_rarest_layer_replicas",
            "Copies of the rarest layer.",
            ["model_name"],
            registry=registry,
        )
        self.ready = Gauge(
            "shoal_mesh_model_ready", "1 where every layer is served.", ["model_name"], registry=registry
        )

    def _build_blobs(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        self.blob_disk = gauge(
            "shoal_blob_disk_bytes", "Models' files on the disk: used, limit, evicted.", "what"
        )
        self.blob_sent = gauge("shoal_blob_sent_bytes", "Models' files that peers took from here.")
        self.blob_received = gauge("shoal_blob_received_bytes", "Models' files that came from peers.")
        self.blob_done = gauge("shoal_blob_fetch_done_bytes", "Of a fetch under way.", "model_name")
        self.blob_total = gauge("shoal_blob_fetch_total_bytes", "Of a fetch under way.", "model_name")
        self.blob_dropped = gauge("shoal_blob_dropped_sources", "Peers that sent bad bytes, of late.", "peer")

    def _observe_blobs(self, blobs: Mapping[str, Any]) -> None:
        disk = blobs.get("disk", {})
        for what in ("used", "limit", "evicted"):
            self.blob_disk.labels(what).set(disk.get(f"{what}_bytes", 0))
        self.blob_sent.set(blobs.get("sent_bytes", 0))
        self.blob_received.set(blobs.get("received_bytes", 0))
        for gauge in (self.blob_done, self.blob_total, self.blob_dropped):
            gauge.clear()
        for fetch in blobs.get("fetches", []):
            self.blob_done.labels(fetch["model"]).set(fetch["done_bytes"])
            self.blob_total.labels(fetch["model"]).set(fetch["total_bytes"])
        for dropped in blobs.get("dropped_sources", []):
            self.blob_dropped.labels(dropped["peer"]).inc()

    @contextmanager
    def track(self, model: str, prompt_tokens: int) -> Iterator[Running]:
        """Follow one generation of a known model; leaving the block ends it, however that comes about."""
        self.prompt.labels(model).inc(prompt_tokens)
        running = Running(self, model)
        try:
            yield running
        finally:
            running.close()

    def count_failure(self, model: str, code: str) -> None:
        """A generation ended with an error of this code, or "disconnect" where the client left."""
        self.failure.labels(model, code).inc()

    def count_preemption(self, model: str) -> None:
        """A background request gave its room to others."""
        self.preemptions.labels(model).inc()

    def count_split(self, model: str) -> None:
        """A request was read on one chain and is answered on another."""
        self.splits.labels(model).inc()

    def count_pass(self, model: str, guessed: int, right: int) -> None:
        """A pass made a token, and `right` more of those that were `guessed`."""
        self.passes.labels(model).inc()
        self.drafts.labels(model).inc(guessed)
        self.accepted.labels(model).inc(right)

    def count_failover(self, model: str, stall_s: float, replayed: int) -> None:
        """A request went on over another chain, after `stall_s` without a token; its stages computed `replayed`
        positions again."""
        self.failovers.labels(model).inc()
        self.replayed.labels(model).inc(replayed)
        self.stall.labels(model).observe(stall_s)

    def count_prefix(self, model: str, queries: int, hits: int) -> None:
        """`queries` prompt tokens were looked up in the prefix cache, `hits` were there."""
        self.prefix_queries.labels(model).inc(queries)
        self.prefix_hits.labels(model).inc(hits)

    def set_kv_usage(self, model: str, share: float) -> None:
        """The share (0 to 1) of this node's KV cache for the model that is in use."""
        self.kv_usage.labels(model).set(share)

    def observe_mesh(self, mesh: Mapping[str, Any]) -> None:
        """Take the mesh gauges from a `/mesh` document."""
        nodes = mesh.get("nodes", [])
        peers = [node for node in nodes if node.get("connected") and not node.get("self")]
        self.nodes.set(len(nodes))
        self.connected.set(len(peers))
        relayed = sum(1 for node in peers if node.get("relayed"))
        self.relayed.set(relayed / len(peers) if peers else 0.0)
        self.ping.clear()
        pings_s = sorted(node["rtt_ms"] / 1000 for node in peers if node.get("rtt_ms") is not None)
        for quantile in QUANTILES if pings_s else ():
            rank = min(len(pings_s) - 1, int(quantile * len(pings_s)))
            self.ping.labels(f"{quantile:g}").set(pings_s[rank])
        self._observe_health(nodes)
        self._observe_blobs(mesh.get("blobs", {}))
        self.guilty.clear()
        self.audited.clear()
        for run, report in mesh.get("runs", {}).items():
            self.guilty.labels(run).set(len(report["guilty"]))
            self.audited.labels(run).set(report["audited_parts"])
        self.copies.clear()
        self.ready.clear()
        for model in mesh.get("models", []):
            self.copies.labels(model["name"]).set(model["copies_min"])
            self.ready.labels(model["name"]).set(1 if model["ready"] else 0)

    def _observe_health(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        for gauge in (self.standing, self.slowdown, self.reliability):
            gauge.clear()
        for node in nodes:
            health = node.get("health")
            if health:
                self.standing.labels(health["state"]).inc()
                self.slowdown.labels(node["peer"]).set(health["slowdown"])
                self.reliability.labels(node["peer"]).set(health["reliability"])

    def text(self) -> bytes:
        """Everything in Prometheus' text format; its media type is CONTENT_TYPE."""
        return generate_latest(self.registry)
