"""Sampling: filters, distribution, and randomness as a pure function of (seed, position)."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from scipy import stats

from model_shards import Sampling, SamplingError
from model_shards.sampler import _invert, pick, uniform

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def draws(sampling_of, count=4000, logits=LOGITS):
    return collections.Counter(pick(logits, sampling_of(seed), 7)[0] for seed in range(count))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=5.0, top_k=1)])
def test_greedy_takes_the_likeliest(sampling):
    token, logprob = pick(LOGITS, sampling, 3)
    assert token == 1
    assert logprob == pytest.approx(float(torch.log_softmax(LOGITS, 0)[1]))


def test_the_logprob_is_the_models_own_whatever_the_temperature():
    token, logprob = pick(LOGITS, Sampling(temperature=2.0, top_k=3, seed=11), 5)
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
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(SamplingError) as caught:
        Sampling(**{field: value})
    assert caught.value.field == field
