"""A plane and its links: one at a time to a peer, and the end of one never spoils the next."""

from types import SimpleNamespace

import pytest
import trio
import trio.lowlevel
import trio.testing

from collectives import NonFinite, RunConfig
from collectives.agreement import Held
from collectives.data import Plane
from collectives.reduce.frames import Kind, frame_of
from collectives.reduce.outbox import Traffic


class Wire:
    """A link that sends nothing until it is let, and receives nothing."""

    def __init__(self, name, story):
        self.name, self.story = name, story
        self.failure, self.gone, self.busy = None, trio.Event(), trio.Event()

    async def send(self, header, payload):
        self.busy.set()
        try:
            await trio.sleep_forever()
        finally:
            self.story.append(f"{self.name} lets go")

    async def receive(self, sink):
        await trio.sleep_forever()


class Reduction:
    """Has frames for ever, and tells what it was asked."""

    peers, done, drained = ("x",), False, False

    def __init__(self, story, raises=()):
        self.story, self.raises = story, raises

    def relinked(self, peer):
        self.story.append("relinked")

    def next_frame(self, peer):
        self.story.append("next")
        if "next" in self.raises:
            raise NonFinite("not a number any more")
        return frame_of(Kind.LEAF, 0, 0, b"", [memoryview(bytes(8))])

    def dropped(self, peer):
        self.story.append("dropped")
        if "dropped" in self.raises:
            raise NonFinite("not a number any more")

    def wants_frames(self, peer):
        return True

    def woken(self):
        return ()


async def _at_once(count):
    await trio.lowlevel.checkpoint()


def a_plane(exchange):
    nothing = SimpleNamespace()
    run = SimpleNamespace(
        me="m",
        run_id="r",
        config=RunConfig(),
        uplink=SimpleNamespace(take=_at_once),
    )
    plane = Plane(SimpleNamespace(links=nothing, rpc=nothing, identity=nothing), run, "outer")
    plane._exchange = exchange
    plane._input = SimpleNamespace(nonce=7, tensors=[])
    return plane


async def test_a_link_that_is_replaced_has_let_go_before_the_next_one_begins(autojump_clock):
    story = []
    plane = a_plane(Reduction(story))
    first, second = Wire("first", story), Wire("second", story)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plane.use, "x", first)
        await first.busy.wait()
        nursery.start_soon(plane.use, "x", second)
        await second.busy.wait()
        assert story == ["next", "first lets go", "dropped", "relinked", "next"]
        nursery.cancel_scope.cancel()
    assert story[5:] == ["second lets go", "dropped"]


async def test_of_many_new_links_one_stays(autojump_clock):
    story = []
    plane = a_plane(Reduction(story))
    wires = [Wire(str(number), story) for number in range(5)]
    async with trio.open_nursery() as nursery:
        for wire in wires:
            nursery.start_soon(plane.use, "x", wire)
        await trio.testing.wait_all_tasks_blocked()
        assert story.count("next") - story.count("dropped") == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("when", ["next", "dropped"])
async def test_own_values_that_are_no_numbers_any_more_end_the_attempt_and_not_the_run(autojump_clock, when):
    story, faults = [], []
    plane = a_plane(Reduction(story, raises=(when,)))
    plane.own_fault = lambda nonce, error: faults.append((nonce, type(error)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(plane.use, "x", Wire("first", story))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert faults == [(7, NonFinite)]


class Ending(Reduction):
    """Is done when its last frame has left, as one whose last chunk waited for the memory of a frame is."""

    bytes_received = bytes_sent = 8
    traffic = Traffic(8, 8)
    digest, result = b"d" * 32, "the result"

    def __init__(self, story, declaration):
        super().__init__(story)
        self.declaration = declaration

    def next_frame(self, peer):
        self.done = self.drained = True


@pytest.mark.parametrize("before", [True, False])
async def test_what_the_others_decided_on_is_kept_once_it_is_whole_here_and_not_fetched(
    autojump_clock, monkeypatch, before
):
    asked = []

    async def fetch_value(*wanted):
        asked.append(wanted)
        await trio.sleep_forever()

    monkeypatch.setattr("collectives.data.fetch_value", fetch_value)
    declaration = SimpleNamespace(key=b"k" * 32, epoch=3)
    monkeypatch.setattr("collectives.data.value_digest", lambda declaration, digest: digest)
    value = SimpleNamespace(digest=b"d" * 32, declaration=declaration)
    told = []
    plane = a_plane(Ending([], declaration))
    plane.tell = told.append
    plane._ballot = None  # the ballot is over: a majority has decided, and this member was not among it
    async with trio.open_nursery() as nursery:
        plane._nursery = nursery
        if before:  # the decision comes first
            plane.fetch(value, ("x",))
            await trio.testing.wait_all_tasks_blocked()
            assert told == []
        nursery.start_soon(plane.use, "x", Wire("first", []))
        await trio.testing.wait_all_tasks_blocked()
        if not before:
            plane.fetch(value, ("x",))
        with trio.fail_after(0.01):
            await trio.testing.wait_all_tasks_blocked()
        assert told == [Held(3, value.digest)]
        assert plane.whole(value.digest).result == "the result"
        assert not asked
        nursery.cancel_scope.cancel()
