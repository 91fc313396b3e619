"""Runs of several workers in one process: exact means and bytes, equal replicas, deaths; shares of time from parts."""

import pytest
import torch

from collectives.codecs import codec
from collectives.reduce import HEADER_BYTES, Layout, weighted_mean
from node.train import emulate
from node.train.emulate import Death, Diverged, Parallel, Setting, World, deaths, reduce_together
from node.train.linktime import computing_share, goodput
from node.train.recipe import InnerRecipe, OuterRecipe


@pytest.fixture
def setting(corpus, shape):
    return Setting(corpus, shape, InnerRecipe(steps=24, batch=2, warmup=2, lr=1e-2), 3)


def run(world):
    assert list(world.run()) == list(range(1, 25))
    return world.figures()


def test_means_are_exact_and_bytes_are_those_of_the_frames():
    given = [[torch.randn(6, 5), torch.randn(7)] for _ in range(3)]
    found = reduce_together(given, [1.0, 2.0, 5.0], "fp32", [None] * 3)
    flat = [torch.cat([one.flatten() for one in tensors]).numpy() for tensors in given]
    expected = weighted_mean([[(weight, one)] for weight, one in zip((1.0, 2.0, 5.0), flat, strict=True)])
    assert torch.cat([one.flatten() for one in found.mean]).numpy().tobytes() == expected.tobytes()
    # 37 elements are one chunk with one owner: two send theirs to it, and it sends the result to both.
    assert sorted(found.bytes_sent) == [HEADER_BYTES + 148, HEADER_BYTES + 148, 2 * (HEADER_BYTES + 148)]


def test_a_small_codec_sends_so_much_less():
    given = [[torch.randn(300, 300)] for _ in range(2)]
    sent = {
        name: sum(reduce_together(given, [1.0, 1.0], name, [None] * 2).bytes_sent)
        for name in ("fp32", "int8", "int4")
    }
    chunks = Layout.of(given[0]).chunks
    for name, total in sent.items():
        assert total == pytest.approx(2 * codec(name).bytes_for(90_000) + 2 * chunks * HEADER_BYTES, rel=0.01)


@pytest.mark.parametrize("strategy", ["diloco", "streaming", "delayed", "sparseloco"])
def test_workers_learn_together_through_deaths(setting, strategy):
    outer = OuterRecipe(
        strategy, 6, codec="topk" if strategy == "sparseloco" else "int8", fragments=2, delay=2
    )
    killed = (Death(4, 1), Death(8, 0, away=9), Death(13, 2))
    world = World(setting, outer, killed)
    start = world.loss()
    figures = run(world)
    assert figures["val_loss"] < start - (0.1 if strategy == "sparseloco" else 0.3)
    assert world.claims == 6
    # Steps since the last round at 4, 8 and 13; the second one's place is empty for 9 steps.
    assert figures["tokens"] == 16 * (3 * 24 - 9)
    assert 0 < figures["tokens_lost_with_the_dead"] <= 16 * (4 + 8 + 6)


def test_replicas_that_differ_are_found(setting):
    world = World(setting, OuterRecipe(inner_steps=6))
    world.places[1].outer.state("outer")["model.norm.weight"][0] += 1e-7
    with pytest.raises(Diverged):
        run(world)


def test_data_parallel_in_one_pass_is_the_mean_of_the_workers_gradients(setting, corpus, worker):
    together = Parallel(setting, OuterRecipe())
    names = together.outer.names("outer")
    _, found = together.worker.gradient_step(names)
    each = [worker(claim=claim, batch=2).gradient_step(names)[1] for claim in range(3)]
    for at, value in enumerate(found):
        torch.testing.assert_close(value, sum(one[at] for one in each) / 3, rtol=1e-4, atol=1e-6)
    figures = run(Parallel(setting, OuterRecipe()))
    assert figures["tokens"] == run(World(setting, OuterRecipe(inner_steps=6)))["tokens"]


def test_data_parallel_learns_by_real_rounds_too(setting):
    """One worker's gradients through the strategy: the same optimizer as the inner one makes the same steps."""
    alone = Setting(setting.corpus, setting.model, setting.inner, 1)
    parallel = Parallel(alone, OuterRecipe())
    world = World(alone, OuterRecipe("diloco", 24, lr=1.0, momentum=0.0, codec="fp32"))
    assert run(parallel)["val_loss"] == pytest.approx(run(world)["val_loss"], abs=1e-3)


def test_a_third_of_the_workers_dies_once_each():
    killed = deaths(6, 1000, 1 / 3, seed=1)
    assert len({death.index for death in killed}) == 2
    assert all(100 <= death.step <= 900 for death in killed)
    assert len(deaths(4, 1000, 1 / 3, 1)) == 2
    assert len(deaths(1, 1000, 1.0, 1)) == 0


def test_a_links_time_is_hidden_while_it_is_shorter_than_the_delay():
    waiting = computing_share({"outer": 1000}, {"outer": 10}, 10, 0, step_s=1.0, link_bps=1600.0)
    assert waiting.computing == pytest.approx(10 / 15)
    assert waiting.bits_per_s == pytest.approx(8000 / 15)
    hidden = computing_share({"outer": 1000}, {"outer": 10}, 10, 5, step_s=1.0, link_bps=1600.0)
    assert hidden.computing == 1.0
    half = computing_share({"a": 500, "b": 500}, {"a": 5, "b": 10}, 10, 2, step_s=1.0, link_bps=1600.0)
    assert half.computing == pytest.approx(10 / 11, abs=0.01)


def test_goodput_counts_what_the_dead_had_not_told():
    assert goodput(4, 1.0, 1e9, 5.0) == 1.0
    # A death each 10 s of one of two workers costs 2 s away and half a round or less.
    assert goodput(2, 1.0, 10.0, 2.0) == pytest.approx(1 - 2.5 / 20, abs=0.03)
    assert goodput(4, 1.0, 15.0, 5.0) < goodput(4, 1.0, 60.0, 5.0)


def test_bytes_a_round_are_the_same_for_any_values(setting):
    params = emulate._model(setting).named
    assert emulate.bytes_a_round(params, 3, "int8") * 3.8 < emulate.bytes_a_round(params, 3, "fp32")
