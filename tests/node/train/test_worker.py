"""The inner loop, step by step, and what a worker keeps."""

import pytest
import torch

from collectives.outer import AdamW, Delayed, DiLoCo, Nesterov, Sgd, SparseLoCo, Streaming
from node.train.recipe import InnerRecipe, OuterRecipe
from node.train.worker import StepReport, strategy_of


def params(worker):
    return {name: one.clone() for name, one in worker.model.named.items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("inner", [{}, {"optimizer": "muon"}, {"precision": "bfloat16"}], ids=str)
def test_it_learns(worker, corpus, inner):
    one = worker(**inner)
    held = corpus.windows_held_out(64)
    before = one.evaluate(held)
    reports = [one.step(float(number)) for number in range(40)]
    assert one.evaluate(held) < before - 0.5
    assert {report.tokens for report in reports} == {32}
    assert all(report.took_s > 0 and report.norm > 0 for report in reports)
    assert one.steps == one.drawn == 40


def test_several_batches_are_as_good_as_one_large(worker):
    whole, parts = worker(batch=4, lr=1e-3), worker(batch=2, accumulate=2, lr=1e-3)
    reports = [one.step(5.0) for one in (whole, parts)]
    assert reports[0].tokens == reports[1].tokens
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    torch.testing.assert_close(params(whole), params(parts), rtol=1e-3, atol=1e-5)


def test_the_rate_is_that_of_the_given_clock(worker):
    early, late = worker(), worker()
    start = params(early)
    early.step(2.0)
    late.step(39.0)
    moved = [sum((params(one)[name] - start[name]).abs().sum() for name in start) for one in (early, late)]
    assert moved[1] < 0.3 * moved[0]


def test_gradients_are_clipped(worker):
    free, bound = worker(clip=0.0), worker(clip=1e-9, weight_decay=0.0)
    start = params(bound)
    assert free.step(3.0).norm == 0.0
    assert bound.step(3.0).norm > 0.01
    # Adam divides by the gradient's size, but for its eps: what is clipped to nothing moves less.
    moved = max((params(bound)[name] - start[name]).abs().max() for name in start)
    assert moved < 0.01 * 1e-2 * 10


def test_a_returning_worker_goes_on_where_it_was(worker):
    first = worker(claim=3)
    for number in range(3):
        first.step(float(number))
    own, where = first.own_state(), params(first)
    back = worker(claim=9)
    for name, value in back.model.named.items():
        value.copy_(where[name])
    back.load_own_state(own)
    assert (back.claim, back.drawn) == (3, 3)
    assert first.step(3.0).loss == back.step(3.0).loss
    assert same(params(first), params(back))


def test_own_state_of_another_optimizer_or_shape_is_refused_and_changes_nothing(worker):
    muon, adam = worker(optimizer="muon"), worker()
    muon.step(0.0)
    adam.step(0.0)
    before = adam.own_state()
    with pytest.raises(ValueError, match="an optimizer that this run does not have"):
        adam.load_own_state(muon.own_state())
    wrong = {name: value[:1] if value.dim() else value for name, value in before.items()}
    with pytest.raises(ValueError, match="another shape"):
        adam.load_own_state(wrong)
    assert same(before, adam.own_state())


def test_delta_is_what_an_offer_would_give(worker):
    one = worker()
    outer = one.outer(OuterRecipe(inner_steps=2))
    for _ in range(2):
        outer.trained(one.step(outer.clock).tokens)
    delta = one.delta(outer)
    offer = outer.offer("outer")
    assert offer.weight == 64
    assert all(
        torch.equal(delta[name], tensor)
        for name, tensor in zip(outer.names("outer"), offer.tensors, strict=True)
    )


def test_a_step_is_its_share_of_a_time_budget(worker):
    one, report = worker(), StepReport(32, 1.0, 1.0, took_s=0.5)
    assert one.nominal(report, OuterRecipe(inner_steps=100)) == 1.0
    assert one.nominal(report, OuterRecipe(inner_steps=100, budget_s=10.0)) == 5.0


def test_gradients_for_data_parallel_change_nothing_here(worker):
    one = worker()
    before = params(one)
    names = tuple(before)
    report, grads = one.gradient_step(names)
    assert same(before, params(one))
    assert report.tokens == 32
    assert all(grad.shape == before[name].shape for name, grad in zip(names, grads, strict=True))


def test_strategies_have_their_own_settings_where_the_recipe_has_none():
    inner = InnerRecipe()
    made = {
        name: strategy_of(OuterRecipe(name, inner_steps=20, codec="int8"), inner)
        for name in ("diloco", "streaming", "delayed", "sparseloco")
    }
    assert made["diloco"] == DiLoCo(20, codec="int8")
    assert made["streaming"] == Streaming(20, codec="int8")
    assert made["delayed"] == Delayed(20, codec="int8")
    assert made["sparseloco"] == SparseLoCo(20, codec="int8")
    changed = strategy_of(
        OuterRecipe("streaming", 20, lr=0.3, momentum=0.5, fragments=2, delay=1, alpha=0.0), inner
    )
    assert changed == Streaming(20, 2, 1, 0.0, Nesterov(0.3, 0.5), "int8")
    assert strategy_of(OuterRecipe("diloco", momentum=0.0), inner).optimizer == Sgd(0.7)
    parallel = strategy_of(OuterRecipe("data-parallel", 1), inner)
    assert isinstance(parallel.optimizer, AdamW)
    assert parallel.gradients
