"""What an engine notes of its own steps."""

from __future__ import annotations

import pytest
import torch

from model_shards import CheckpointIndex, ModelConfig, Sampling, Step, load_span
from node import embedded
from node.timed import KEPT_MAX, TimedEngine, Took


@pytest.fixture(scope="module")
def spans():
    torch.set_num_threads(1)
    directory = embedded.path()
    index, config = CheckpointIndex.open(directory), ModelConfig.from_dir(directory)
    return {span: load_span(directory, index, config, *span) for span in ((0, 2), (6, 8))}


class Clock:
    """Each look is a second later."""

    now_s = 0.0

    def __call__(self):
        self.now_s += 1.0
        return self.now_s


def engine(span):
    return TimedEngine(span, kv_bytes_max=4 << 20, clock=Clock())


def test_decode_and_prefill_are_told_apart_with_the_layers_they_passed(spans):
    timed = engine(spans[0, 2])
    timed.open("a", 0, 2, 16)
    timed.open("b", 0, 2, 16)
    timed.open("c", 0, 1, 16)
    timed.run([Step("a", 0, (1, 2, 3))])
    timed.run([Step("a", 3, (4,)), Step("b", 0, (1,))])
    timed.run([Step("c", 0, (1,))])
    assert timed.take() == [
        Took("prefill", 2, 3, 1.0, False),
        Took("decode", 2, 2, 1.0, False),
        Took("decode", 1, 1, 1.0, False),
    ]
    assert timed.take() == []
    assert timed.busy_s == 3.0


def test_the_head_counts_where_a_token_was_drawn(spans):
    timed = engine(spans[6, 8])
    timed.open("a", 6, 8, 16)
    hidden = torch.zeros(1, spans[6, 8].config.hidden, dtype=spans[6, 8].dtype)
    timed.run([Step("a", 0, None, hidden)])
    timed.run([Step("a", 1, None, hidden, Sampling(temperature=0.0))])
    assert [took.with_head for took in timed.take()] == [False, True]


def test_mixed_batches_and_failures_count_as_work_but_measure_nothing(spans):
    timed = engine(spans[0, 2])
    timed.open("a", 0, 2, 16)
    timed.open("b", 0, 2, 16)
    timed.run([Step("a", 0, (1, 2)), Step("b", 0, (1,))])

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        timed.run([Step("b", 1, (1,))], stop)
    assert timed.take() == []
    assert timed.busy_s == 2.0


def test_notes_that_nobody_takes_do_not_pile_up(spans):
    timed = engine(spans[0, 2])
    for k in range(KEPT_MAX // 8 + 2):
        timed.open("a", 0, 2, 16)
        for position in range(8):
            timed.run([Step("a", position, (k,))])
        timed.close("a")
    assert len(timed.take()) == KEPT_MAX
