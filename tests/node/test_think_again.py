"""Stages say how much work they have when a session is opened; a gateway thinks again before the first token."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import trio
from rings import CUTS, MANIFEST, ring_of, tokens_of, wish

from node.errors import Overloaded
from node.serve.relay import Above
from node.serve.selection import Selector

BUSY_S = 60.0


def stuck(ring, number):
    """A stage that has much to do and comes to nothing until the test is over; its advert does not know yet."""
    compute = ring.nodes[number].computes[MANIFEST]
    compute.queue_by_class_s = lambda: (0.0, BUSY_S, 0.0)

    def run(steps, check_cancelled):
        while not threading.Event().wait(0.005):
            check_cancelled()

    compute.engine.run = run


def shunned(ring, number):
    """Let adverts say that a stage has some work, so that another is chosen first."""
    plain, me = ring.atlas, ring.nodes[number].me

    def atlas():
        found = plain()
        hosts = dict(found.hosts[MANIFEST])
        hosts[me] = replace(hosts[me], queue_by_class_s=(0.0, 3.0, 0.0))
        return replace(found, hosts={MANIFEST: hosts})

    ring.gateway._atlas = atlas


@pytest.mark.parametrize("busy", [0, 2])
async def test_a_chain_with_much_to_do_is_left_for_a_better_one_and_kept_in_mind(model, alone, prompt, busy):
    request = wish(prompt)
    async with ring_of(model, CUTS["two"], copies=2) as ring:
        stuck(ring, busy)
        shunned(ring, busy + 1)
        opened = []
        ring.nodes[busy].computes[MANIFEST].open = counted(ring.nodes[busy].computes[MANIFEST].open, opened)
        with trio.fail_after(10):
            assert [event.token for event in await tokens_of(ring, request)] == alone(request)
            assert len(opened) == 1
            assert [event.token for event in await tokens_of(ring, request)] == alone(request)
        assert len(opened) == 1, "what the stage said is remembered"
        await ring.quiet()


def counted(what, calls):
    async def wrapped(*args, **more):
        calls.append(args)
        return await what(*args, **more)

    return wrapped


async def test_where_all_have_as_much_to_do_one_goes_on(model, alone, prompt, monkeypatch):
    asked = []
    instead = Selector.instead
    monkeypatch.setattr(Selector, "instead", lambda *args: asked.append(args) or instead(*args))
    async with ring_of(model, CUTS["two"], copies=2) as ring:
        for node in ring.nodes:
            node.computes[MANIFEST].queue_by_class_s = lambda: (0.0, BUSY_S, 0.0)
        assert [event.token for event in await tokens_of(ring, wish(prompt))] == alone(wish(prompt))
        assert 1 <= len(asked) <= 4


async def test_a_request_that_would_come_too_late_everywhere_is_refused(model, prompt):
    async with ring_of(model, CUTS["two"]) as ring:
        stuck(ring, 0)
        with pytest.raises(Overloaded, match=r"in time|first token"), trio.fail_after(10):
            await tokens_of(ring, wish(prompt, first_token_s=20.0))
        await ring.quiet()


async def test_a_chain_with_a_stage_that_does_not_say_is_gone_on_with(model, alone, prompt, monkeypatch):
    plain = Above.say

    async def say(self, note):
        if not note.queues_s:
            await plain(self, note)

    monkeypatch.setattr(Above, "say", say)
    monkeypatch.setattr(Selector, "instead", lambda *args: pytest.fail("nobody said anything"))
    async with ring_of(model, CUTS["two"]) as ring:
        assert [event.token for event in await tokens_of(ring, wish(prompt))] == alone(wish(prompt))


@pytest.mark.parametrize("said", [(-1.0,), (1e9,), (1.0,) * 9])
async def test_what_no_honest_stage_says_is_passed_over(model, alone, prompt, monkeypatch, said):
    monkeypatch.setattr(Selector, "instead", lambda *args: pytest.fail("that was believed"))
    async with ring_of(model, CUTS["two"], copies=1) as ring:
        ring.nodes[1].computes[MANIFEST].queue_by_class_s = lambda: said
        assert [event.token for event in await tokens_of(ring, wish(prompt))] == alone(wish(prompt))
