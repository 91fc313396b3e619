"""What a run showed, as plain figures: times, targets kept, requests lost, bytes and messages.

It reads requests that have ended and measures nothing itself; see `measure` for what each figure means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from scheduler.sim.config import SimConfig, Targets
from scheduler.sim.policy import Policy
from scheduler.sim.request import Request
from scheduler.sim.service import Service

SHARES = (50, 90, 99)
HERD_WINDOW_S = 2.0
HERD_CHOICES_LEAST = 8
SERIES_S = 60.0
GOSSIP_FANOUT = 3


def measure(config: SimConfig, service: Service, policy: Policy, until_s: float) -> dict[str, Any]:
    """Figures of a run.

    `attainment` is the share of all requests that kept both targets, `goodput_per_s` those a second of the trace.
    `failed` ended without all their tokens: refused (no chain or room within the client's patience), lost (a stage was
    lost and not replaced) or unfinished. `lost_with_alternate` are those lost while every layer had a live host.
    """
    requests = service.requests
    kept = [request for request in requests if in_target(request, config.targets)]
    ends = Counter(request.state for request in requests)
    lost = [request for request in requests if request.state == "lost"]
    ttft = [r.first_s - r.ask.at_s for r in requests if r.first_s is not None]
    tpot = [each for each in map(tpot_s, requests) if each is not None]
    fleet = service.fleet
    return {
        "policy": config.policy,
        "nodes": config.nodes,
        "layers": config.model.layers,
        "hours": config.hours,
        "seed": config.seed,
        "requests": len(requests),
        "done": ends["done"],
        "ttft_s": percentiles(ttft),
        "tpot_s": percentiles(tpot),
        "targets": {"ttft_s": config.targets.ttft_s, "tpot_s": config.targets.tpot_s},
        "attainment": _round(len(kept) / max(1, len(requests))),
        "goodput_per_s": _round(len(kept) / until_s),
        "failed": len(requests) - ends["done"],
        "refused": ends["refused"],
        "lost": len(lost),
        "lost_with_alternate": sum(request.had_alternate for request in lost),
        "unfinished": len(requests) - ends["done"] - ends["refused"] - len(lost),
        "broken": sum(request.breaks > 0 for request in requests),
        "nodes_left": fleet.left,
        "nodes_joined": fleet.joined,
        "bytes_moved": fleet.bytes_moved,
        "replans": policy.replans,
        "messages": _messages(config, service, policy, until_s),
        "retries": service.retries,
        "prefix_reused": _round(service.tokens_reused / max(1, sum(r.ask.prompt_tokens for r in requests))),
        "herding": herding(service.chains),
        "series": _series(config, requests, until_s),
    }


def tpot_s(request: Request) -> float | None:
    """Seconds for each token after the first, stalls and all; None when there was none or the end is missing."""
    if request.state != "done" or request.first_s is None or request.end_s is None:
        return None
    more = request.ask.answer_tokens - 1
    return (request.end_s - request.first_s) / more if more > 0 else None


def in_target(request: Request, targets: Targets) -> bool:
    """Whether the request ended well and kept both targets."""
    if request.state != "done" or request.first_s is None:
        return False
    each_s = tpot_s(request)
    return request.first_s - request.ask.at_s <= targets.ttft_s and (each_s or 0.0) <= targets.tpot_s


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 by the nearest rank."""
    ordered = sorted(values)
    if not ordered:
        return {f"p{share}": None for share in SHARES}
    return {f"p{s}": _round(ordered[min(len(ordered) - 1, -(-len(ordered) * s // 100) - 1)]) for s in SHARES}


def herding(chains: Sequence[tuple[float, str, tuple[str, ...]]]) -> dict[str, float | None]:
    """How alike the chains are that gateways chose within a window as long as their views are old.

    `most_picked_chain` and `most_picked_node` are the greatest shares of a window's choices, averaged over windows
    with several choices; 1 means that all went the same way.
    """
    windows: dict[int, list[tuple[str, ...]]] = {}
    for at_s, _, nodes in chains:
        windows.setdefault(int(at_s / HERD_WINDOW_S), []).append(nodes)
    full = [picks for picks in windows.values() if len(picks) >= HERD_CHOICES_LEAST]
    if not full:
        return {"most_picked_chain": None, "most_picked_node": None}
    by_chain = [max(Counter(picks).values()) / len(picks) for picks in full]
    by_node = [max(Counter(n for p in picks for n in p).values()) / len(picks) for picks in full]
    return {
        "most_picked_chain": _round(sum(by_chain) / len(full)),
        "most_picked_node": _round(sum(by_node) / len(full)),
    }


def _messages(config: SimConfig, service: Service, policy: Policy, until_s: float) -> dict[str, int]:
    """Control messages: loads (every member tells a few others what it has heard, or a centre), sessions (to each stage
    on opening, trying and closing), plans (to each node)."""
    ticks = int(until_s / policy.announce_s)
    members = config.nodes + (config.gateways * GOSSIP_FANOUT if policy.gossips else 0)
    fanout = GOSSIP_FANOUT if policy.gossips else 1
    told = config.nodes * fanout + members - config.nodes
    plans = policy.replans * config.nodes
    return {"loads": ticks * told, "sessions": service.messages, "plans": plans}


def _series(config: SimConfig, requests: Sequence[Request], until_s: float) -> dict[str, list[float]]:
    """By minute of arrival: requests, and those of them that kept the targets."""
    bins = max(1, -(-int(until_s) // int(SERIES_S)))
    asked, kept = [0.0] * bins, [0.0] * bins
    for request in requests:
        k = min(bins - 1, int(request.ask.at_s / SERIES_S))
        asked[k] += 1
        kept[k] += in_target(request, config.targets)
    return {
        "asked_per_s": [_round(n / SERIES_S) for n in asked],
        "kept_per_s": [_round(n / SERIES_S) for n in kept],
    }


def _round(value: float) -> float:
    return round(value, 6)
