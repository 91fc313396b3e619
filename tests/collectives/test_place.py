"""Where a node stands: LANs by measured round trips, and what a round makes of them."""

from collections import Counter

import pytest
import torch

from collectives import Place, RunConfig, Settings, lan_of
from collectives.reduce import Exchange

NEAR, FAR = 0.001, 0.040


def test_a_lan_has_one_name_for_all_who_are_in_it():
    rtts = {("b", "a"): NEAR, ("b", "c"): NEAR, ("c", "d"): FAR, ("d", "e"): NEAR, ("f", "a"): FAR}
    assert [lan_of(peer, rtts) for peer in "abcdef"] == ["lan a"] * 3 + ["lan d"] * 2 + [""]
    assert lan_of("a", {("a", "a"): 0.0}) == ""
    assert lan_of("a", {}) == ""


async def reduced_with(members, together, reduce, places, configs=None):
    each = {name: {"config": config} for name, config in (configs or {}).items()}
    config = RunConfig(agreement=Settings(members_min=len(places)))
    runs = await members.start(*places, config=config, each=each)
    for run, place in zip(runs, places.values(), strict=True):
        run._service.place = lambda place=place: place
    given = {run.me: [torch.randint(-50, 50, (200_000,)).float()] for run in runs}
    found = await together(runs, lambda run: reduce(run, given[run.me], 2.0))
    wanted = sum(tensors[0] for tensors in given.values()) / len(runs)
    for one in found:
        assert one.digest == found[0].digest
        assert torch.allclose(one.tensors[0], wanted, rtol=1e-6)
    return runs, found


async def test_members_of_a_lan_reduce_among_themselves_first(
    autojump_clock, members, together, reduce, monkeypatch
):
    sent = Counter()
    real = Exchange.next_frame

    def next_frame(self, peer):
        frame = real(self, peer)
        if frame is not None:
            sent[self.me, peer] += frame.payload_bytes
        return frame

    monkeypatch.setattr(Exchange, "next_frame", next_frame)
    home, office = Place("home"), Place("office")
    places = {"a": home, "b": office, "c": home, "d": office, "e": home, "f": Place()}
    runs, found = await reduced_with(members, together, reduce, places)
    assert {member.peer: member.group for member in found[0].members} == {
        run.me: place.group for run, place in zip(runs, places.values(), strict=True)
    }
    lan = {run.me: place.group or run.me for run, place in zip(runs, places.values(), strict=True)}
    crossed = sum(count for (one, other), count in sent.items() if lan[one] != lan[other])
    assert sum(sent.values()) - crossed > 0, "there is something to do within LANs"
    # Three units: each gives what it does not own, and what it owns to two others: 2 * (3 - 1) vectors in all.
    assert crossed == pytest.approx(2 * (3 - 1) * 800_000, rel=0.01)


async def test_who_cannot_be_dialled_owns_nothing_and_gets_the_same_result(
    autojump_clock, members, together, reduce
):
    places = {"a": Place(), "b": Place(), "c": Place(dialable=False), "d": Place(dialable=False)}
    runs, found = await reduced_with(members, together, reduce, places)
    assert [member.dialable for run in runs for member in found[0].members if member.peer == run.me] == [
        True,
        True,
        False,
        False,
    ]
    for one in found[2:]:
        assert one.bytes_sent == 800_000, "its own values once, and nothing of others'"


@pytest.mark.parametrize(
    "configured", [RunConfig(group="mine", dialable=False, agreement=Settings(members_min=2))]
)
async def test_the_config_is_believed_before_any_measurement(
    autojump_clock, members, together, reduce, configured
):
    places = {"a": Place("measured"), "b": Place("measured")}
    _, found = await reduced_with(members, together, reduce, places, {"a": configured})
    assert {(m.group, m.dialable) for m in found[0].members} == {("mine", False), ("measured", True)}
