"""A light peer that cannot be."""

from __future__ import annotations

import pytest

from shoal import Client
from shoal.errors import CommandFailed, UsageProblem


def test_a_wrong_invite_is_the_nodes_own_words_in_one_line(tmp_path):
    with pytest.raises(CommandFailed, match="invite") as caught:
        Client.join("nonsense", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_invite_starts_nothing(tmp_path):
    with pytest.raises(UsageProblem, match="`shoal invite`"):
        Client.join(" ", data_dir=str(tmp_path / "sdk"))
    assert not (tmp_path / "sdk").exists()
