"""How long a layer takes on a node: measured where it was measured, a roofline until then.

Prefill and decode are apart: decode reads every weight for a token or a few and is bound by memory bandwidth,
prefill is bound by arithmetic. A mixture of experts reads the experts that its tokens are expected to touch.
Measured times are the business of `corrections`; this file only combines figures it is given.
"""

from __future__ import annotations

from scheduler.shapes import Link, ModelShape, NodeShape

PREFILL_CHUNK_TOKENS = 512
"""Tokens over which one reading of the weights is spread during prefill."""


def experts_touched(experts: int, experts_per_token: int, tokens: float) -> float:
    """Distinct experts that `tokens` tokens are expected to touch: E * (1 - (1 - k/E) ** tokens).

    With routing uniform and independent by token; skewed routing touches fewer. (Parallax, arXiv 2509.26182.)
    """
    if experts <= 0:
        return 0.0
    return float(experts * (1.0 - (1.0 - experts_per_token / experts) ** tokens))


def layer_read_bytes(model: ModelShape, tokens: float) -> float:
    """Weight bytes of one layer that a step of `tokens` tokens reads."""
    dense = model.layer_bytes - model.experts * model.expert_bytes
    touched = experts_touched(model.experts, model.experts_per_token, tokens)
    return dense + touched * model.expert_bytes


def decode_s_per_layer(model: ModelShape, node: NodeShape, batch: int = 1, cached_tokens: int = 0) -> float:
    """Seconds for one layer of one decode step of `batch` sequences with `cached_tokens` of cache each."""
    if node.decode_s_per_layer is not None:
        return node.decode_s_per_layer
    cache = batch * cached_tokens * model.kv_bytes_per_token_per_layer
    reading = (layer_read_bytes(model, batch) + cache) / max(1.0, node.read_bytes_per_s)
    return max(batch * model.layer_flops_per_token / max(1.0, node.flops_per_s), reading)


def prefill_s_per_token_per_layer(model: ModelShape, node: NodeShape) -> float:
    """Seconds for one layer and one token of a long prompt, in chunks of PREFILL_CHUNK_TOKENS."""
    if node.prefill_s_per_token_per_layer is not None:
        return node.prefill_s_per_token_per_layer
    reading = layer_read_bytes(model, PREFILL_CHUNK_TOKENS) / max(1.0, node.read_bytes_per_s)
    arithmetic = model.layer_flops_per_token / max(1.0, node.flops_per_s)
    return max(arithmetic, reading / PREFILL_CHUNK_TOKENS)


def head_s(model: ModelShape, node: NodeShape) -> float:
    """Seconds that the output projection adds to the last stage of a decode step: it is read once."""
    reading = model.head_weight_bytes / max(1.0, node.read_bytes_per_s)
    if node.decode_s_per_layer is None or model.layer_bytes <= 0:
        return reading
    return node.decode_s_per_layer * model.head_weight_bytes / model.layer_bytes


def hop_s(model: ModelShape, link: Link, tokens: int = 1) -> float:
    """Seconds for the hidden states of `tokens` tokens to cross a link."""
    return link.seconds(tokens * model.hidden_bytes)
