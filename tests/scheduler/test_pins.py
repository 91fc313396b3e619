"""Spans that are fixed from outside, and what they leave to be placed."""

from scheduler import Assignment
from scheduler.pins import uncovered


def test_uncovered_layers_are_found_with_how_many_hosts_they_lack():
    fixed = [Assignment("a", 0, 3), Assignment("b", 2, 5)]
    assert uncovered(fixed, 8, 1) == [(5, 8, 1)]
    assert uncovered(fixed, 8, 2) == [(0, 2, 1), (3, 5, 1), (5, 8, 2)]
