"""Latent attention: few queries and many give the same numbers, from a cache of latents that may lie anywhere."""

from __future__ import annotations

import pytest
import torch

from model_shards import Engine, Sampling, Step
from model_shards.latent import LatentAttention

TOKENS = [(11 * at + 5) % 97 for at in range(40)]
SHAPE = {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 4,
    "q_lora_rank": 10, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip


@pytest.fixture
def reference(make_reference):
    return make_reference("deepseek_v3", **SHAPE)


@pytest.mark.parametrize("expand", [True, False])
def test_both_ways_of_attending_equal_the_reference(reference, tools, monkeypatch, expand):
    monkeypatch.setattr(LatentAttention, "_expanding_pays", lambda self, queries: expand)
    chain = tools.Chain(tools.engines_of(reference.directory, (0, 2, 4)))
    ours = torch.cat([chain.logits(TOKENS[:20]), chain.logits(TOKENS[20:21]), chain.logits(TOKENS[21:])])
    torch.testing.assert_close(ours, reference.logits(TOKENS), atol=1e-4, rtol=0)


def test_many_queries_expand_and_few_do_not(reference, tools):
    attention = tools.engines_of(reference.directory, (0, 1))[0].span.layers[0].attention
    assert [queries for queries in range(1, 9) if attention._expanding_pays(queries)] == [7, 8]


@pytest.mark.parametrize("scores_max", [1, 100])
def test_queries_in_small_blocks_give_the_same_numbers(reference, tools, monkeypatch, scores_max):
    monkeypatch.setattr("model_shards.attention.SCORES_MAX", scores_max)
    chain = tools.Chain(tools.engines_of(reference.directory, (0, 4)))
    torch.testing.assert_close(chain.logits(TOKENS), reference.logits(TOKENS), atol=1e-4, rtol=0)


def test_a_scattered_session_has_the_same_bits(reference, tools):
    span = tools.engines_of(reference.directory, (0, 4))[0].span
    block = 4 * 16 * (12 + 8) * 4
    engine = Engine(span, kv_bytes_max=6 * block)
    whole = tools.Chain([engine], "whole", 48).logits(TOKENS)
    engine.close("whole")
    for name in "abcdef":
        engine.open(name, 0, 4, 16)
    for name in "bdf":
        engine.close(name)
    assert torch.equal(tools.Chain([engine], "scattered", 48).logits(TOKENS), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_session_has_the_same_text_in_company_and_alone(reference, tools, dtype):
    engine = tools.engines_of(reference.directory, (0, 4), dtype=dtype)[0]
    prompts = [TOKENS[at : at + 9] for at in range(4)]
    alone = []
    for at, prompt in enumerate(prompts):
        alone.append(tools.Chain([engine], f"alone{at}").greedy(prompt, 6))
    greedy, found = Sampling(temperature=0), [[] for _ in prompts]
    steps = []
    for at, prompt in enumerate(prompts):
        engine.open(str(at), 0, 4, 32)
        steps.append(Step(str(at), 0, tokens=tuple(prompt), sample=greedy))
    for turn in range(6):
        for at, result in enumerate(engine.run(steps)):
            found[at].append(result.token)
        steps = [
            Step(str(at), 9 + turn, tokens=(tokens[-1],), sample=greedy) for at, tokens in enumerate(found)
        ]
    assert found == alone
