"""Sampling: filters, distribution, and randomness as a pure function of (seed, position)."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from scipy import stats

from model_shards import Sampling, SamplingError
from model_shards.sampler import Said, _invert, pick, uniform

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def found(logits, sampling, position, said=None):
    picked = pick(logits, sampling, position, said)
    return picked.token, picked.logprob


def draws(sampling_of, count=4000, logits=LOGITS):
    return collections.Counter(pick(logits, sampling_of(seed), 7).token for seed in range(count))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=5.0, top_k=1)])
def test_greedy_takes_the_likeliest(sampling):
    token, logprob = found(LOGITS, sampling, 3)
    assert token == 1
    assert logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[1]))


def test_the_logprob_is_the_models_own_whatever_the_temperature():
    token, logprob = found(LOGITS, Sampling(temperature=2.0, top_k=3, seed=11), 5)
    assert logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[token]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 5])
def test_draws_follow_the_distribution(temperature, top_k):
    seen = draws(lambda seed: Sampling(temperature=temperature, top_k=top_k, seed=seed))
    expected = torch.softmax(LOGITS.double() / temperature, 0) * 4000
    found = [seen[token] for token in range(5)]
    assert stats.chisquare(found, expected.tolist()).pvalue > 1e-3


def test_top_k_keeps_the_k_likeliest():
    assert set(draws(lambda seed: Sampling(top_k=2, temperature=3.0, seed=seed))) == {1, 2}


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, {1}), (0.6, {1}), (0.7, {1, 2}), (0.9, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    # softmax of LOGITS: 0.0842 0.6223 0.2289 0.0114 0.0511
    assert set(draws(lambda seed: Sampling(top_p=top_p, seed=seed), 2000)) == kept


def test_equal_logits_are_cut_by_token_id():
    flat = torch.zeros(6)
    assert set(draws(lambda seed: Sampling(top_k=3, seed=seed), 500, flat)) == {0, 1, 2}


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.tensor([0.0, -1e30, 0.0, -1e30])
    assert set(draws(lambda seed: Sampling(seed=seed), 500, logits)) == {0, 2}


@pytest.mark.parametrize("at", [0.0, 0.999999, 1.0])
def test_the_inverse_stays_on_weights_above_zero(at):
    assert _invert(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), at) == 0
    assert _invert(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), at) == 1


def test_uniform_is_pure_spread_and_differs_by_every_argument():
    assert uniform(1, 2) == uniform(1, 2)
    assert (
        len(
            {
                uniform(seed, position, index)
                for seed in range(9)
                for position in range(9)
                for index in range(3)
            }
        )
        == 243
    )
    values = [uniform(5, position) for position in range(5000)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert all(0 <= value < 1 for value in values)
    assert uniform(-1, 0) != uniform(1, 0)


def test_uniform_never_changes():
    """A replaced stage, perhaps of another version, must draw the same numbers."""
    assert uniform(0, 0) == 0.18633255524257164
    assert uniform(42, 17, 1) == 0.5986572368207735


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", 1e9),
        ("top_p", 1.1),
        ("top_p", -1),
        ("top_k", -1),
        ("seed", 1 << 64),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -math.inf),
        ("top_logprobs", 65),
        ("index", -1),
        ("logit_bias", ((5, 101.0),)),
        ("logit_bias", ((-5, 1.0),)),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(SamplingError) as caught:
        Sampling(**{field: value})
    assert caught.value.field == field


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    # softmax of LOGITS beside its largest: 0.135 1 0.368 0.018 0.082
    assert set(draws(lambda seed: Sampling(min_p=0.1, seed=seed), 2000)) == {0, 1, 2}
    assert set(draws(lambda seed: Sampling(min_p=0.3, seed=seed), 2000)) == {1, 2}
    assert set(draws(lambda seed: Sampling(min_p=1.0, seed=seed), 200)) == {1}


@pytest.mark.parametrize("vocab", [600, 5000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_over_a_wide_vocabulary_is_the_sorted_definition(vocab, top_p):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)).mul(0.5).bfloat16().float()
    weights = torch.softmax(logits, 0)
    ordered, ids = torch.sort(weights, descending=True, stable=True)
    upto = ordered.double().cumsum(0)
    kept = max(1, int((upto - ordered < top_p).sum()))
    for seed in range(30):
        at = uniform(seed, 7) * float(upto[kept - 1])
        expected = int(ids[int(torch.searchsorted(upto[:kept], at, right=True))])
        assert pick(logits, Sampling(top_p=top_p, seed=seed), 7).token == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_can_force_and_forbid_a_token(temperature):
    forced = Sampling(temperature=temperature, logit_bias=((3, 100.0),))
    forbidden = Sampling(temperature=temperature, logit_bias=((1, -100.0),))
    assert {pick(LOGITS, forced, at).token for at in range(50)} == {3}
    assert 1 not in {pick(LOGITS, forbidden, at).token for at in range(50)}


def test_biases_of_one_token_add_up():
    assert pick(LOGITS, Sampling(temperature=0, logit_bias=((3, 2.5), (3, 2.5))), 0).token == 3


def test_presence_counts_once_and_frequency_every_time_and_only_in_the_answer():
    logits = torch.tensor([1.0, 0.9, 0.0])
    said = Said([0, 1, 1, 1, 0], prompt_tokens=4)
    assert pick(logits, Sampling(temperature=0, presence_penalty=0.5), 5, said).token == 1
    assert pick(logits, Sampling(temperature=0, presence_penalty=0.05), 5, said).token == 0
    often = Said([1, 1, 0, 0, 0], prompt_tokens=2)
    assert pick(logits, Sampling(temperature=0, frequency_penalty=0.04), 5, often).token == 1
    assert pick(logits, Sampling(temperature=0, presence_penalty=0.04), 5, often).token == 0
    assert pick(logits, Sampling(temperature=0, frequency_penalty=2.0), 5, Said([0, 0], 2)).token == 0


@pytest.mark.parametrize(("penalty", "token"), [(1.0, 0), (1.2, 1), (3.0, 1)])
def test_repetition_weakens_tokens_of_prompt_and_answer(penalty, token):
    logits = torch.tensor([1.0, 0.9, -0.5])
    assert (
        pick(logits, Sampling(temperature=0, repetition_penalty=penalty), 1, Said([0, -1], 2)).token == token
    )


def test_repetition_pushes_negative_scores_down_too():
    logits = torch.tensor([-1.0, -1.1, -9.0])
    assert pick(logits, Sampling(temperature=0, repetition_penalty=1.2), 1, Said([0], 1)).token == 1


def test_penalties_leave_the_given_logits_alone():
    logits = LOGITS.clone()
    pick(logits, Sampling(repetition_penalty=2.0, logit_bias=((0, 5.0),)), 1, Said([1, 2], 1))
    assert torch.equal(logits, LOGITS)


def test_top_logprobs_are_the_models_own_likeliest_first():
    top = pick(LOGITS, Sampling(temperature=0, top_logprobs=3, logit_bias=((4, 50.0),)), 1).top
    expected = torch.log_softmax(LOGITS, 0)
    assert [token for token, _ in top] == [1, 2, 0]
    assert [value for _, value in top] == pytest.approx([float(expected[token]) for token in (1, 2, 0)])
    assert len(pick(LOGITS, Sampling(top_logprobs=64), 1).top) == 5


def test_choices_of_one_request_differ_by_index():
    flat = torch.zeros(1000)
    assert len({pick(flat, Sampling(seed=1, index=index), 3).token for index in range(20)}) > 15
