"""Prefix sharing: what is found again, what may be thrown away, and that nobody's positions are ever
disturbed."""

from __future__ import annotations

import random

import pytest
import torch

from model_shards import LocalFault, NoRoom, Sampling, Step, StepError
from model_shards.kv import BLOCK_TOKENS
from model_shards.prefix import PrefixCache

GREEDY = Sampling(temperature=0)
BLOCK_BYTES = 2 * BLOCK_TOKENS * 2 * 8 * 4
PROMPT = [(11 * at + 4) % 97 for at in range(50)]


def fill(cache, tokens, blocks, scope="x"):
    """A chain of one-block pages over ``tokens``, held by its maker."""
    chain = []
    for at in range(len(tokens) // cache.page_tokens):
        piece = tokens[at * cache.page_tokens : (at + 1) * cache.page_tokens]
        chain.append(cache.add(scope, chain[-1] if chain else None, piece, [blocks[at]]))
    return chain


def test_a_chain_is_found_as_far_as_the_tokens_agree():
    cache = PrefixCache(2)
    chain = fill(cache, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert cache.match("x", [1, 2, 3, 4, 5, 6, 7]) == chain
    assert cache.match("x", [1, 2, 3, 4, 5, 6]) == chain[:2]
    assert cache.match("x", [1, 2, 3, 9, 5, 6, 7]) == chain[:1]
    assert cache.match("x", [3, 4, 5, 6, 7]) == []
    assert cache.match("y", [1, 2, 3]) == []
    assert cache.match("x", []) == []


def test_tokens_decide_even_where_hashes_collide(monkeypatch):
    monkeypatch.setattr("model_shards.prefix._key", lambda scope, parent, tokens: b"same")
    cache = PrefixCache(2)
    assert cache.add("x", None, [1, 2], [5]) is not None
    assert cache.match("x", [1, 2, 3])
    assert cache.match("x", [7, 8, 3]) == []
    assert cache.add("x", None, [7, 8], [6]) is None


def test_only_idle_pages_are_evicted_ends_of_chains_first():
    cache = PrefixCache(1)
    chain = fill(cache, [1, 2, 3], [10, 11, 12])
    assert cache.evict(3) == []
    cache.release(chain[1:])
    assert cache.idle_blocks == 2
    cache.validate()
    assert cache.evict(1) == [12]
    assert cache.evict(9) == [11]
    assert cache.match("x", [1, 2, 3, 4]) == chain[:1]
    cache.validate()


def test_the_longest_unused_goes_before_and_the_reused_stays():
    cache = PrefixCache(1)
    chains = [fill(cache, [token], [token]) for token in (1, 2, 3)]
    for chain in chains:
        cache.release(chain)
    cache.acquire(chains[0])
    cache.release(chains[0])
    assert cache.evict(1) == [2]
    assert cache.evict(1) == [3]
    assert cache.evict(1) == [1]


def test_letting_go_twice_or_forgetting_what_others_hold_is_our_own_fault():
    cache = PrefixCache(1)
    (page,) = fill(cache, [1], [1])
    cache.acquire([page])
    with pytest.raises(LocalFault):
        cache.forget(page)
    cache.release([page, page])
    with pytest.raises(LocalFault):
        cache.release([page])


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 3, 4)])
def test_a_prompt_met_before_is_continued_from_the_cache(llama, tools, cuts):
    engines = tools.engines_of(llama.directory, cuts)
    first = tools.Chain(engines, "first")
    whole = first.logits(PROMPT)
    for engine in engines:
        assert engine.cached(engine.span.start, engine.span.end, PROMPT) == (
            48 if engine.span.start == 0 else 0
        )
        engine.close("first", PROMPT)
        assert engine.cached(engine.span.start, engine.span.end, PROMPT) == 48
    second = tools.Chain([], "second")
    second.engines, second.position = engines, 48
    for engine in engines:
        engine.open("second", engine.span.start, engine.span.end, 64, prompt=PROMPT, reuse=48)
        assert engine.position("second") == 48
    torch.testing.assert_close(second.logits(PROMPT[48:]), whole[48:], atol=1e-5, rtol=0)


def test_a_running_session_shares_its_prompt_at_every_stage(llama, tools):
    last = tools.engines_of(llama.directory, (0, 2, 4))[1]
    last.open("a", 2, 4, 64, prompt=PROMPT)
    last.run([Step("a", 0, hidden=torch.randn(20, 32))])
    assert last.cached(2, 4, PROMPT) == 16
    assert last.cached(3, 4, PROMPT) == 0
    assert last.cached(2, 4, PROMPT, scope="someone else") == 0
    last.run([Step("a", 20, hidden=torch.randn(30, 32))])
    assert last.cached(2, 4, PROMPT) == 48


def test_shared_positions_are_held_once(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 5 * BLOCK_BYTES)[0]
    engine.open("a", 0, 4, 64)
    engine.run([Step("a", 0, tokens=tuple(PROMPT))])
    assert engine.kv_tokens_free() == BLOCK_TOKENS
    with pytest.raises(NoRoom):
        engine.open("b", 0, 4, 64, prompt=PROMPT)
    engine.open("b", 0, 4, 64, prompt=PROMPT, reuse=48)
    assert engine.kv_tokens_free() == 0
    engine.close("a")
    assert engine.kv_tokens_free() == BLOCK_TOKENS
    engine.close("b")
    assert engine.kv_tokens_free() == 5 * BLOCK_TOKENS
    assert engine.kv_bytes_used() == 0
    assert engine.cached(0, 4, PROMPT) == 48


def test_a_refused_session_leaves_the_cache_as_it_was(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 4 * BLOCK_BYTES)[0]
    engine.open("a", 0, 4, 32)
    engine.run([Step("a", 0, tokens=tuple(PROMPT[:32]))])
    engine.close("a")
    engine.open("b", 0, 4, 16)
    with pytest.raises(NoRoom):
        engine.open("c", 0, 4, 64, prompt=PROMPT[:33], reuse=32)
    assert engine.cached(0, 4, PROMPT[:33]) == 32
    assert engine.kv_tokens_free() == 48
    engine._cache.pages.validate()


@pytest.mark.parametrize("reuse", [-16, 8, 64])
def test_reusing_what_is_not_cached_is_refused(llama, tools, reuse):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    tools.Chain([engine], "a").logits(PROMPT)
    with pytest.raises(StepError, match="cannot reuse"):
        engine.open("b", 0, 4, 64, prompt=PROMPT, reuse=reuse)
    assert engine.sessions() == 1


def test_dynamic_scaling_is_never_shared(make_reference, tools):
    reference = make_reference(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    engine = tools.engines_of(reference.directory, (0, 4))[0]
    tools.Chain([engine], "a").logits(PROMPT)
    engine.close("a", PROMPT)
    assert engine.cached(0, 4, PROMPT) == 0


def test_rewinding_into_shared_positions_leaves_the_other_session_alone(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4))[0]
    a = tools.Chain([engine], "a")
    a.logits(PROMPT)
    engine.open("b", 0, 4, 64, prompt=PROMPT, reuse=48)
    engine.rewind("b", 20)
    engine.run([Step("b", 20, tokens=(1,) * 30)])
    tidy = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    tidy.logits(PROMPT)
    assert torch.equal(a.logits([5]), tidy.logits([5]))
    again = tools.Chain(tools.engines_of(llama.directory, (0, 4)))
    again.logits(PROMPT[:20] + [1] * 30)
    ours = engine.logits([Step("b", 50, tokens=(5,))])[0]
    torch.testing.assert_close(ours, again.logits([5]), atol=1e-5, rtol=0)
    assert engine.cached(0, 4, PROMPT) == 48
    engine._cache.pages.validate()


def test_a_rewind_that_needs_copies_and_finds_no_room_changes_nothing(llama, tools):
    engine = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 5 * BLOCK_BYTES)[0]
    tools.Chain([engine], "a").logits(PROMPT)
    engine.open("b", 0, 4, 64, prompt=PROMPT, reuse=48)
    with pytest.raises(NoRoom):
        engine.rewind("b", 0)
    assert engine.position("b") == 48
    engine.rewind("b", 48)
    engine._cache.pages.validate()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_sessions_do_their_logits_are_those_of_a_session_alone(llama, tools, seed):
    source = random.Random(seed)
    engine = tools.engines_of(llama.directory, (0, 4), kv_bytes_max=4 * 12 * BLOCK_BYTES)[0]
    alone = tools.engines_of(llama.directory, (0, 4))[0]
    texts: dict[str, list[int]] = {}

    def check(name, added):
        chain = tools.Chain([alone], "alone")
        expected = chain.logits(texts[name] + added)[-1]
        chain.close()
        found = engine.logits([Step(name, len(texts[name]), tokens=tuple(added))])[0][-1]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        texts[name] += added

    for event in range(60):
        name, action = f"s{source.randrange(4)}", source.random()
        if name not in texts:
            prompt = [source.randrange(2) for _ in range(16)] * 2 + [source.randrange(97) for _ in range(8)]
            reuse = engine.cached(0, 4, prompt) if action < 0.8 else 0
            try:
                engine.open(name, 0, 4, 64, prompt=prompt, reuse=reuse)
            except NoRoom:
                continue
            texts[name] = prompt[:reuse]
            check(name, prompt[reuse:])
        elif action < 0.3:
            text = texts.pop(name)
            engine.close(name, text if event % 2 else ())
        elif action < 0.5:
            try:
                position = source.randrange(len(texts[name]) + 1)
                engine.rewind(name, position)
            except NoRoom:
                continue
            del texts[name][position:]
            check(name, [source.randrange(97)])
        elif len(texts[name]) < 60:
            check(name, [source.randrange(97) for _ in range(1 + source.randrange(4))])
        engine._cache.pages.validate()
    for name in texts:
        engine.close(name)
    assert engine.kv_bytes_used() == 0


def test_a_sliding_window_over_shared_and_scattered_blocks(make_reference, tools):
    changes = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}
    reference = make_reference("qwen2", **changes)
    engine = tools.engines_of(reference.directory, (0, 4))[0]
    whole = tools.Chain([engine], "a").logits(PROMPT)
    engine.open("b", 0, 4, 64, prompt=PROMPT, reuse=32)
    found = [engine.logits([Step("b", 32, tokens=tuple(PROMPT[32:40]))])[0]]
    found += [engine.logits([Step("b", at, tokens=(PROMPT[at],))])[0] for at in range(40, 50)]
    torch.testing.assert_close(torch.cat(found), whole[32:], atol=1e-5, rtol=0)


def test_activations_after_a_rewind_are_not_taken_for_the_prompt(llama, tools):
    last = tools.engines_of(llama.directory, (0, 2, 4))[1]
    last.open("a", 2, 4, 64, prompt=PROMPT)
    last.run([Step("a", 0, hidden=torch.randn(40, 32))])
    last.rewind("a", 20)
    last.run([Step("a", 20, hidden=torch.randn(30, 32))])
    assert last.cached(2, 4, PROMPT) == 16
    last.close("a", PROMPT[:20] + [9] * 30)
    assert last.cached(2, 4, PROMPT) == 16
    assert last.cached(2, 4, PROMPT[:20] + [9] * 31) == 48
