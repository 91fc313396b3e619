"""What a load test asks for, and the figures of what came back."""

from __future__ import annotations

import json

import pytest

from shoal.errors import UsageProblem
from shoal.load import Seen, figures, traced, uniform

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,900
"""


def test_uniform_requests_share_nothing_and_follow_from_the_seed():
    first, second = uniform(2, 64, 8, seed=1)
    assert (len(first.prompt), first.new_tokens, first.at_s) == (64, 8, None)
    assert first.prompt[:8] != second.prompt[:8]
    assert uniform(2, 64, 8, seed=1) == [first, second]
    assert uniform(2, 64, 8, seed=2)[0] != first


def test_azures_trace(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    planned, cut = traced(path, 10, context_tokens=1000, speed=2.0, seed=1)
    assert [(one.at_s, len(one.prompt), one.new_tokens) for one in planned] == [
        (0.0, 374, 44),
        (2.0, 396, 500),
    ]
    assert cut == 1
    assert len(traced(path, 1, 1000, 1.0, 1)[0]) == 1


def test_mooncakes_trace_shares_what_its_hashes_share(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    entries = [
        {"timestamp": 1000, "input_length": 1024, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 1000, "output_length": 5, "hash_ids": [0, 2]},
    ]
    path.write_text("\n".join(map(json.dumps, entries)))
    (first, second), cut = traced(path, 10, 4096, 1.0, seed=1)
    assert (second.at_s, cut) == (0.5, 0)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:520] != second.prompt[512:520]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\nnever,1\n", "entry 1"),
        ("a.jsonl", '{"timestamp": 1}\n', "entry 1"),
        ("a.jsonl", "{nonsense\n", "cannot be read"),
        ("a.csv", "", "no requests"),
    ],
)
def test_a_wrong_trace_is_named(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageProblem, match=words):
        traced(tmp_path / name, 5, 100, 1.0, 1)
    with pytest.raises(UsageProblem, match="cannot be read"):
        traced(tmp_path / "absent.csv", 5, 100, 1.0, 1)


def test_figures_count_whole_answers_only():
    seen = [
        Seen(0.1, 1.1, 11),
        Seen(0.3, 2.3, 11),
        Seen(None, 0.5, 0, "it died"),
        Seen(None, 0.5, 0, "it died"),
    ]
    found = figures(seen, 2.0)
    assert (found["requests"], found["failures"], found["failed_by"]) == (4, 2, {"it died": 2})
    assert (found["tokens"], found["tokens_per_s"]) == (22, 11.0)
    assert found["ttft_ms"] == {"p50": 100.0, "p90": 300.0, "p99": 300.0}
    assert found["tpot_ms"]["p50"] == 100.0


def test_figures_of_nothing_are_none():
    found = figures([], 0.0)
    assert found["tokens_per_s"] is None
    assert found["ttft_ms"]["p50"] is None
