"""A member of two that is left alone: an error with the next step, soon, and a new run that goes on from its state."""

from contextlib import AsyncExitStack

import torch
import trio

from collectives import NoQuorum, RunConfig, Settings, open_run
from collectives.agreement.events import Received
from collectives.agreement.messages import Accept

CONFIG = RunConfig(agreement=Settings(members_min=1))
ONES = torch.ones(1000)


def second_of(runs):
    """Who cannot decide the next epoch alone, and who can."""
    first = runs[0]._tags["outer"].chain.config.seats[0].peer
    return next(run for run in runs if run.me != first), next(run for run in runs if run.me == first)


async def new_run(stack, run, **more):
    service = run._service
    return await stack.enter_async_context(
        open_run(service.host, service.rpc, service.links, service.identity, "r again", CONFIG, **more)
    )


async def test_the_survivor_of_two_is_told_what_to_do_and_goes_on_in_a_new_run(
    autojump_clock, members, together, reduce
):
    runs = await members.start("a", "b", config=CONFIG)

    async def call(run):
        out = await reduce(run, [ONES])
        await run.publish({"w": out.tensors[0]})
        return out

    assert {one.epoch for one in await together(runs, call)} == {1}
    survivor, coordinator = second_of(runs)
    hear = survivor._tags["outer"].tell
    killed = []

    def tell(event):
        """Between the proposal and the vote."""
        if isinstance(event, Received) and isinstance(event.message, Accept) and not killed:
            killed.append(event.sender)
            members.kill(coordinator)
        hear(event)

    survivor._tags["outer"].tell = tell
    began_s = trio.current_time()
    found = await together(runs, lambda run: reduce(run, [ONES * 2], deadline_s=60.0))
    assert killed == [coordinator.me]
    error = found[runs.index(survivor)]
    assert isinstance(error, NoQuorum)
    assert error.missing == (coordinator.me,)
    assert f"wait for {coordinator.me}, or, where they are gone for good, open a new run" in str(error)
    assert trio.current_time() - began_s < 15.0

    best = survivor.shelf("outer").newest
    joiner = await members.join("c")
    async with AsyncExitStack() as stack:
        again = await new_run(stack, survivor, founders=[survivor.me])
        await again.publish(best.tensors, 0)
        alone = await reduce(again, [ONES * 2])
        assert (alone.epoch, alone.peers) == (1, (survivor.me,))
        await again.publish({"w": best.tensors["w"] + alone.tensors[0]})
        newcomer = await new_run(stack, joiner, contacts=[survivor.me])
        state = await newcomer.fetch_state(deadline_s=30.0)
        assert torch.equal(state.tensors["w"], ONES * 3)

        async def with_newcomer(run):
            await trio.sleep(1.0 if run is again else 0.0)  # whoever is there in time is a member
            return await reduce(run, [ONES * 4])

        both = await together([again, newcomer], with_newcomer)
        assert all(len(one.peers) == 2 and torch.equal(one.tensors[0], ONES * 4) for one in both)
