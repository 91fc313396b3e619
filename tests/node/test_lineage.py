"""From where a mended chain goes on, and what of a history is sent again."""

from __future__ import annotations

import random

import pytest
import torch

from node.serve.history import Shelf
from node.serve.lineage import Footing, answered_to, boundary, footing, parts

PROMPT = 300


@pytest.mark.parametrize(
    ("own", "kept_from", "below", "found"),
    [
        (340, 0, 340, Footing(340, 340)),
        (340, 0, 0, Footing(340, 0)),
        (0, 0, 340, Footing(0, 0)),
        (340, 128, 256, Footing(340, 256)),
        (340, 256, 128, Footing(128, 128)),
        (340, 300, 200, Footing(128, 128)),
        (340, 320, 310, Footing(310, 310)),
        (320, 0, 340, Footing(320, 320)),
    ],
)
def test_a_stage_goes_on_from_what_it_has_and_its_neighbour_lacks(own, kept_from, below, found):
    assert footing(own, kept_from, below, PROMPT) == found


@pytest.mark.parametrize(
    ("position", "tokens", "found"), [(300, 0, 256), (300, 1, 300), (340, 41, 340), (340, 39, 338)]
)
def test_a_position_whose_token_was_lost_counts_as_not_done(position, tokens, found):
    assert answered_to(position, PROMPT, tokens) == found


@pytest.mark.parametrize(
    ("position", "found"), [(0, 0), (127, 0), (128, 128), (299, 256), (300, 300), (301, 301)]
)
def test_a_prompt_is_cut_where_it_was_read(position, found):
    assert boundary(position, PROMPT) == found


@pytest.mark.parametrize("seed", range(20))
def test_what_is_sent_again_is_all_of_it_in_the_shapes_it_had(seed):
    chance = random.Random(seed)
    known = PROMPT + chance.randrange(0, 60)
    spans = [(0, 128), (128, 256), (256, 300)] + [
        (at, at + 1) for at in range(PROMPT, known + chance.randrange(3))
    ]
    first = chance.randrange(len(spans))
    found = list(parts(spans[first:], PROMPT, known, 32))
    assert [at for part in found for at in range(part.start, part.end)] == list(
        range(spans[first][0], spans[-1][1])
    )
    for part in found:
        assert part.alone == (part.start >= PROMPT)
        assert part.alone or (part.start, part.end) in spans
        assert part.end - part.start <= 32 or not part.alone
        assert part.sample == (part.end >= known)
        assert not (part.sample and part.alone and part.end - part.start > 1)


def rows(start, count):
    return torch.arange(start, start + count, dtype=torch.float32).unsqueeze(1).expand(count, 4).contiguous()


@pytest.mark.parametrize("seed", range(20))
def test_a_history_gives_back_what_it_kept_wherever_it_lies(seed):
    """Against a plain dictionary: adding, forgetting the end, and reading, with next to no memory and little disk."""
    chance = random.Random(seed)
    shelf = Shelf(
        memory_bytes_max=chance.choice([0, 64, 1 << 20]), disk_bytes_max=chance.choice([0, 256, 1 << 20])
    )
    one, other = shelf.open(), shelf.open()
    at = 0
    for _ in range(60):
        if chance.random() < 0.85:
            count = chance.choice([1, 1, 1, 7])
            one.add(at, rows(at, count))
            at += count
            other.add(other.end, rows(other.end, 1))
        else:
            at = chance.randrange(one.start, at + 1)
            one.truncate(at)
            at = one.end
        assert one.end == at
        assert shelf.memory_bytes <= shelf.memory_bytes_max
        assert shelf.disk_bytes <= shelf.disk_bytes_max
        if one.start < at:
            start = chance.randrange(one.start, at)
            assert torch.equal(one.read(start, at), rows(start, at - start))
        assert shelf.memory_bytes == one.memory_bytes + other.memory_bytes
    one.close()
    other.close()
    assert (shelf.memory_bytes, shelf.disk_bytes, shelf.histories) == (0, 0, [])
