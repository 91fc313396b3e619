"""What members say of their runs is within bounds, or nothing."""

from dataclasses import replace

import pytest

from node import adverts
from node.adverts import RunAdvert

ADVERT = RunAdvert(
    "tiny", "ab" * 32, "training", 1, "12D3KooWx", 7, 1e6, 0, loss=2.5, rounds=7, rounds_whole=30
)


def test_an_advert_survives_the_way():
    assert adverts.read(RunAdvert, adverts.write(ADVERT)) == ADVERT


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""}, {"name": "a b"}, {"manifest_id": "x"}, {"founder": "a/b"}, {"generation": -1}, {"epoch": 1 << 60},
        {"tokens": 1e30}, {"loss": 1e30}, {"loss": -2.0}, {"computing": 1.5},
        {"claim": -1}, {"tokens_per_s": -1.0},
    ],
)  # fmt: skip
def test_what_no_honest_member_says_is_nothing(wrong):
    assert adverts.read(RunAdvert, adverts.write(replace(ADVERT, **wrong))) is None


def test_texts_are_one_printable_line():
    said = adverts.read(RunAdvert, adverts.write(replace(ADVERT, detail="a\x1b[2J\nb")))
    assert said.detail == "a [2J b"
