"""One worker's part of a strategy, event by event."""

import pytest
import torch

from collectives.outer import (
    DataParallel,
    Delayed,
    DiLoCo,
    Outer,
    OuterError,
    Sgd,
    SparseLoCo,
    Streaming,
)

PLAIN = Sgd(1.0)


def made(strategy, names=("a", "b")):
    params = {name: torch.zeros(3) for name in names}
    return params, Outer(strategy, params)


def train(params, outer, by, tokens=1.0, steps=1.0):
    for one in params.values():
        one.add_(by)
    outer.trained(tokens, steps)


def values(params):
    return [one[0].item() for one in params.values()]


def test_a_round_is_due_after_h_steps_and_leaves_exactly_the_anchor():
    params, outer = made(DiLoCo(inner_steps=2))
    train(params, outer, 0.1, tokens=5)
    assert outer.due() == ()
    train(params, outer, 0.1, tokens=5)
    assert outer.due() == ("outer",)
    offer = outer.offer("outer")
    assert offer.weight == 10
    assert outer.waiting
    torch.testing.assert_close(offer.tensors[0], torch.full((3,), -0.2))
    outer.take("outer", 1, offer.tensors, 10)
    assert not outer.waiting
    assert outer.due() == ()
    assert outer.untold("outer") == 0
    assert all(torch.equal(params[name], outer.state("outer")[name]) for name in params)
    # Nesterov's first step: lr * (1 + momentum) times the mean.
    torch.testing.assert_close(params["a"], torch.full((3,), 0.7 * 1.9 * 0.2))


def test_a_share_of_a_time_budget_counts_as_so_many_steps():
    params, outer = made(DiLoCo(inner_steps=10))
    for _ in range(3):  # three slow steps, each a third of the budget
        assert outer.due() == ()
        train(params, outer, 1.0, tokens=4, steps=10 / 3)
    assert outer.due() == ("outer",)
    assert outer.offer("outer").weight == 12


def test_what_a_failed_round_did_not_count_is_in_the_next_offer():
    params, outer = made(DiLoCo(inner_steps=1, optimizer=PLAIN))
    train(params, outer, 1.0)
    outer.offer("outer")
    outer.failed("outer")
    train(params, outer, 1.0)
    offer = outer.offer("outer")
    assert (offer.weight, offer.tensors[0][0].item()) == (2, -2)
    outer.take("outer", 1, offer.tensors, 2)
    assert values(params) == [2, 2]


def test_who_was_no_member_moves_with_the_others_and_keeps_what_it_trained():
    params, outer = made(DiLoCo(inner_steps=1, optimizer=PLAIN))
    train(params, outer, 1.0)
    outer.offer("outer")
    outer.take("outer", 1, [torch.full((3,), -8.0)] * 2, None)
    assert values(params) == [9, 9]
    assert outer.untold("outer") == 1
    train(params, outer, 1.0)
    offer = outer.offer("outer")
    assert (offer.epoch, offer.weight, offer.tensors[0][0].item()) == (1, 2, -2)


def test_a_round_that_turns_out_to_have_counted_is_not_given_again():
    params, outer = made(DiLoCo(inner_steps=1, optimizer=PLAIN))
    train(params, outer, 1.0, tokens=1)
    first = outer.offer("outer")
    outer.failed("outer")
    train(params, outer, 2.0, tokens=1)
    outer.offer("outer")
    outer.withdraw("outer")  # the run said at once that a result was missed
    counted = outer.take("outer", 1, [torch.full((3,), -4.0)] * 2, first.weight)
    assert counted is first
    assert outer.untold("outer") == 1
    assert values(params) == [6, 6]  # the mean's 4 and the 2 that it does not hold
    assert outer.offer("outer").tensors[0][0].item() == -2


def test_delayed_means_are_merged_a_round_later_under_what_was_trained_meanwhile():
    params, outer = made(Delayed(inner_steps=2, optimizer=PLAIN))
    train(params, outer, 1.0, steps=2)
    outer.offer("outer")
    assert not outer.waiting
    train(params, outer, 1.0)
    outer.take("outer", 1, [torch.full((3,), -10.0)] * 2, 1)
    assert values(params) == [2, 2]
    assert outer.due() == ()
    train(params, outer, 1.0)
    assert values(params) == [12, 12]
    assert outer.due() == ("outer",)
    assert outer.offer("outer").tensors[0][0].item() == -2


def test_streaming_mixes_local_and_anchor_after_its_delay():
    params, outer = made(Streaming(4, fragments=1, delay=2, alpha=0.25, optimizer=PLAIN))
    train(params, outer, 1.0, steps=4)
    offer = outer.offer("outer")
    outer.take("outer", 1, [torch.full((3,), -9.0)] * 2, offer.weight)
    train(params, outer, 1.0)
    assert values(params) == [2, 2]  # tau is not over
    train(params, outer, 1.0)
    assert values(params) == [0.25 * 3 + 0.75 * 9] * 2
    assert outer.state("outer")["a"][0].item() == 9


def test_fragments_are_strided_layers_with_staggered_phases():
    names = ("embed_tokens.weight", *(f"model.layers.{n}.w" for n in range(6)), "model.norm.weight")
    params, outer = made(Streaming(9, fragments=3, delay=1), names)
    assert [outer.names(tag) for tag in outer.tags] == [
        ("embed_tokens.weight", "model.layers.0.w", "model.layers.3.w"),
        ("model.layers.1.w", "model.layers.4.w"),
        ("model.layers.2.w", "model.layers.5.w", "model.norm.weight"),
    ]
    seen = []
    for step in range(1, 19):
        train(params, outer, 0.0)
        for tag in outer.due():
            seen.append((step, tag))
            offer = outer.offer(tag)
            outer.take(tag, offer.epoch + 1, offer.tensors, offer.weight)
    assert seen == [(step, f"fragment-{(step // 3 - 1) % 3}") for step in range(3, 19, 3)]


def test_a_fragment_on_its_way_is_not_due_again_and_the_end_asks_for_all():
    params, outer = made(Streaming(2, fragments=2, delay=0), ("x.layers.0.a", "x.layers.1.a"))
    train(params, outer, 1.0, steps=1)
    outer.offer("fragment-0")
    train(params, outer, 1.0, steps=5)
    assert outer.due() == ("fragment-1",)
    outer.failed("fragment-0")
    assert outer.due(last=True) == ("fragment-0", "fragment-1")


def test_a_newcomer_takes_the_shared_state_and_is_due_with_the_others():
    params, outer = made(DiLoCo(inner_steps=4))
    for _ in range(2):
        train(params, outer, 1.0, steps=4)
        offer = outer.offer("outer")
        outer.take("outer", offer.epoch + 1, offer.tensors, offer.weight)
    train(params, outer, 1.0, steps=3)
    theirs, other = made(DiLoCo(inner_steps=4))
    state = {name: value.clone() for name, value in outer.state("outer").items()}
    other.load("outer", state, 2, keep=False, clock=outer.clock)
    assert all(torch.equal(theirs[name], state[name]) for name in theirs)
    train(params, outer, 1.0)
    train(theirs, other, 1.0)
    assert outer.due() == other.due() == ("outer",)
    assert (outer.offer("outer").weight, other.offer("outer").weight) == (2, 1)


def test_a_state_fetched_after_falling_behind_lies_under_what_was_trained():
    params, outer = made(DiLoCo(inner_steps=1, optimizer=PLAIN))
    train(params, outer, 3.0, tokens=2)
    outer.offer("outer")
    outer.failed("outer")
    train(params, outer, 1.0, tokens=1)
    state = {name: torch.full((3,), 50.0) for name in params}
    outer.load("outer", state, 7, keep=True, counted=2)
    assert values(params) == [51, 51]
    assert (outer.epoch("outer"), outer.untold("outer")) == (7, 1)


def test_a_state_of_another_strategy_can_be_loaded_and_a_misshapen_one_changes_nothing():
    _, sparse = made(SparseLoCo(inner_steps=1))
    params, outer = made(DiLoCo(inner_steps=1))
    train(params, outer, 1.0)
    with pytest.raises(OuterError, match="expected b of shape"):
        outer.load("outer", {"a": torch.ones(3), "b": torch.ones(4)}, 1, keep=False)
    assert values(params) == [1, 1]
    outer.load("outer", sparse.state("outer"), 1, keep=False)
    assert values(params) == [0, 0]
    assert outer.state("outer")["outer.momentum.a"].eq(0).all()


def test_data_parallel_steps_on_mean_gradients_and_shares_its_moments():
    params, outer = made(DataParallel())
    outer.trained(3)
    assert outer.due() == ("outer",)
    with pytest.raises(OuterError, match="reduces gradients"):
        outer.offer("outer")
    offer = outer.offer("outer", [torch.ones(3), torch.ones(3)])
    outer.take("outer", 1, offer.tensors, 3)
    assert values(params)[0] == pytest.approx(-1e-3, rel=1e-3)
    assert set(outer.state("outer")) == {"a", "b"} | {
        f"outer.{s}.{n}" for s in ("first", "second") for n in "ab"
    }
    outer.trained(3)
    outer.offer("outer", [torch.ones(3), torch.ones(3)])
    outer.failed("outer")
    assert outer.untold("outer") == 0  # a new gradient is worth as much as the old one, not both


def test_misuse_is_named():
    params, outer = made(DiLoCo(inner_steps=1))
    train(params, outer, 1.0)
    outer.offer("outer")
    with pytest.raises(OuterError, match="on its way already"):
        outer.offer("outer")
    with pytest.raises(OuterError, match="cannot follow epoch 0"):
        outer.take("outer", 2, [torch.zeros(3)] * 2, 1)
    with pytest.raises(OuterError, match="no fragment 'inner', expected one of outer"):
        outer.epoch("inner")
    with pytest.raises(OuterError, match="float32"):
        Outer(DiLoCo(), {"a": torch.zeros(2, dtype=torch.bfloat16)})
