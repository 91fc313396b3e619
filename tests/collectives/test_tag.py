"""One tag's shell: a round ends by its deadline, whatever its disk does, and what is decided then is not lost."""

import pytest
import trio
import trio.testing

from collectives.agreement import Offer, Reduced, Settings, founding
from collectives.errors import RoundExpired
from collectives.tag import TagShell


class StickyJournal:
    """Takes `quick` records at once, and the others when it is let go."""

    def __init__(self, quick):
        self.quick = quick
        self.go = trio.Event()

    def get(self, key):
        return None

    async def put(self, key, value):
        self.quick -= 1
        if self.quick < 0:
            await self.go.wait()


class QuickPlane:
    """Has a result as soon as it is asked for one."""

    def __init__(self):
        self.tell = None

    def reduce(self, declaration):
        self.tell.reduced(declaration.ballot)

    def whole(self, digest):
        return digest

    def release(self, digest):
        pass

    def abandon(self, ballot):
        pass


class Shell(TagShell):
    def reduced(self, ballot):

        self.tell(Reduced(ballot, b"digest"))


@pytest.fixture
def shell():
    def make(names, quick):
        plane = QuickPlane()
        config = founding("r", "outer", names)
        made = plane.tell = Shell(
            "a", "r", "outer", config=config, settings=Settings(), incarnation=0, journal=StickyJournal(quick),
            plane=plane, send=lambda *letter: None, letters_max=10,
        )  # fmt: skip
        return made

    return make


@pytest.mark.parametrize("names", ["ab", "a"])
async def test_a_round_ends_at_its_deadline_while_the_disk_is_stuck(shell, nursery, autojump_clock, names):
    one = shell(names, 0)
    nursery.start_soon(one.run)
    with pytest.raises(RoundExpired):
        await one.attempt_round(Offer(0, 1, 1.0), 3.0 + trio.current_time())
    assert trio.current_time() == pytest.approx(3.0)
    assert one.attempt is None
    nursery.cancel_scope.cancel()


async def test_a_decision_that_the_disk_delayed_past_the_deadline_is_not_lost(shell, nursery, autojump_clock):
    one = shell("a", 2)  # a restart is known to be one, the vote; the decision waits
    nursery.start_soon(one.run)
    with pytest.raises(RoundExpired):
        await one.attempt_round(Offer(0, 1, 1.0), 3.0)
    assert not one.missed
    one._journal.go.set()
    await trio.testing.wait_all_tasks_blocked()
    assert [(outcome.epoch, outcome.whole) for outcome in one.missed] == [(1, b"digest")]
    nursery.cancel_scope.cancel()


async def test_a_round_in_time_gives_its_outcome(shell, nursery, autojump_clock):
    one = shell("a", 9)
    nursery.start_soon(one.run)
    outcome = await one.attempt_round(Offer(0, 1, 1.0), 3.0)
    assert (outcome.epoch, outcome.nonce, outcome.whole) == (1, 1, b"digest")
    assert not one.missed
    nursery.cancel_scope.cancel()
