"""Traces by path and synthetic load: what is read, what is cut, and what a bad line is told."""

import statistics

import pytest

from scheduler import InputError
from scheduler.sim.config import Load, default_model
from scheduler.sim.trace import asks

MODEL = default_model()
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 500, "output_length": 20, "hash_ids": [0]}
{"timestamp": 3500, "input_length": 90000, "output_length": 90000, "hash_ids": [1]}
"""


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_an_azure_trace_starts_at_nought_and_keeps_its_gaps(tmp_path):
    found = asks(Load(trace=write(tmp_path, "a.csv", AZURE)), MODEL, 4.5, 1)
    assert [(round(a.at_s, 3), a.prompt_tokens, a.answer_tokens) for a in found] == [
        (0.0, 374, 44),
        (4.0, 396, 109),
    ]


def test_speed_plays_it_faster_and_a_short_trace_is_played_again(tmp_path):
    found = asks(Load(trace=write(tmp_path, "a.csv", AZURE), speed=2.0), MODEL, 6.0, 1)
    assert [round(a.at_s, 3) for a in found] == [0.0, 2.0, 3.0, 5.0]


def test_mooncake_times_are_milliseconds_and_lengths_are_cut_to_the_context(tmp_path):
    found = asks(Load(trace=write(tmp_path, "m.jsonl", MOONCAKE)), MODEL, 3.0, 1)
    assert [round(a.at_s, 3) for a in found] == [0.0, 2.5]
    assert found[1].prompt_tokens + found[1].answer_tokens <= MODEL.context_tokens
    assert found[1].prompt_tokens > 0 < found[1].answer_tokens


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "A,B\n1,2\n", "TIMESTAMP"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "at least one request"),
        ("m.jsonl", '{"timestamp": 1}\n', "line 1"),
        ("m.jsonl", "[1, 2]\n", "line 1"),
        ("m.jsonl", "nonsense\n", "line 1"),
    ],
)
def test_a_bad_trace_is_told_where_and_what_would_be_right(tmp_path, name, text, said):
    with pytest.raises(InputError, match=said):
        asks(Load(trace=write(tmp_path, name, text)), MODEL, 10.0, 1)


def test_a_trace_that_is_not_there_is_one_plain_error(tmp_path):
    with pytest.raises(InputError, match="can be read"):
        asks(Load(trace=str(tmp_path / "none.csv")), MODEL, 10.0, 1)


def test_a_synthetic_load_has_the_rate_and_the_medians_asked_for():
    found = asks(Load(requests_per_s=4.0), MODEL, 1000.0, 7)
    assert len(found) == pytest.approx(4000, rel=0.08)
    assert statistics.median(a.prompt_tokens for a in found) == pytest.approx(700, rel=0.1)
    assert statistics.median(a.answer_tokens for a in found) == pytest.approx(130, rel=0.1)
    assert found == asks(Load(requests_per_s=4.0), MODEL, 1000.0, 7)
    assert found != asks(Load(requests_per_s=4.0), MODEL, 1000.0, 8)


def test_a_load_can_be_bounded():
    assert len(asks(Load(requests_max=10), MODEL, 1000.0, 1)) == 10
