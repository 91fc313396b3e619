"""What members say of how they are reached is bounded, and nonsense is nothing."""

from __future__ import annotations

import pytest

from node.reaching import read_said
from p2p import Said, pack_value

GOOD = Said("private", "symmetric", 0.0, ("12D3a", "12D3b"))


def test_what_was_said_is_read():
    assert read_said(pack_value(GOOD)) == GOOD


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\xff" * 40,
        pack_value(Said("everywhere")),
        pack_value(Said("public", "strange")),
        pack_value(Said("public", "none", -1.0)),
        pack_value(Said("public", "none", 1e9)),
    ],
)
def test_nonsense_is_nothing(wrong):
    assert read_said(wrong) is None


def test_relays_are_names_and_few():
    said = read_said(pack_value(Said("private", "unknown", 0.0, ("\x1b[2J", "x" * 65, *("12D3a",) * 20))))
    assert said.relays == ("12D3a",) * 6
