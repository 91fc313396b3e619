"""`shoal testnet nat`: what it measures, how it says so, and where it cannot."""

from __future__ import annotations

import json

import pytest

from shoal import cli_nat
from shoal.cli import main
from testnet import LaunchFailed
from testnet.nat import Pair


@pytest.fixture
def measured(monkeypatch):
    """The pairs that were measured, in a laboratory that is none."""
    asked = []

    def measure(one, other, link):
        asked.append((one, other, link.delay_s))
        if other == "double":
            raise LaunchFailed("h2 has ended")
        return Pair((one, other), ("port-preserving", "symmetric"), "relayed", 1.25, 2.5)

    monkeypatch.setattr(cli_nat, "measure", measure)
    monkeypatch.setattr(cli_nat, "why_not", lambda: "")
    return asked


def test_pairs_are_measured_and_drawn(measured, capsys):
    assert main(["testnet", "nat", "cone:symmetric", "--delay-ms", "30"]) == 0
    assert measured == [("cone", "symmetric", 0.03)]
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == ["cone", "symmetric", "relayed", "1.2", "s", "2.5", "s"]


def test_as_json_each_pair_is_a_line(measured, capsys):
    assert main(["testnet", "nat", "cone:symmetric", "open:cone", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["homes"] for line in lines] == [["cone", "symmetric"], ["open", "cone"]]
    assert lines[0]["path"] == "relayed"


def test_a_failure_is_one_clear_line(measured, capsys):
    assert main(["testnet", "nat", "cone:double"]) == 1
    assert "cone:double: h2 has ended" in capsys.readouterr().err


def test_where_there_is_no_laboratory_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(cli_nat, "why_not", lambda: "network namespaces need root")
    assert main(["testnet", "nat"]) == 1
    assert "network namespaces need root" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["cone", "cone:castle", ":"])
def test_wrong_pairs_are_wrong_usage(wrong, capsys):
    assert main(["testnet", "nat", wrong]) == 2
    assert "firewall" in capsys.readouterr().err
