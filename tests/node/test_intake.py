"""The queue of requests in front of the mesh, in virtual time."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from node.errors import Overloaded
from node.serve.intake import Intake
from scheduler import AdmissionConfig, Ticket
from scheduler.admission import Capacity


class Mesh:
    """As much room as a test wants."""

    def __init__(self, tokens=100, rate=100.0, requests=1 << 30, **config):
        self.now = Capacity(tokens, rate, requests)
        self.intake = Intake(AdmissionConfig(**config), lambda model, admission: self.now)
        self.order = []

    async def run(self, name, client="c", for_s=1.0, **more):
        ticket = Ticket(name, client, 80, 20, **more)
        try:
            async with self.intake.place("m", ticket) as place:
                while True:
                    self.order.append(name)
                    with place.turn() as turn:
                        await trio.sleep(for_s)
                    if not turn.cancelled_caught:
                        self.order.append(f"{name} done")
                        return
                    self.order.append(f"{name} gives way")
                    await place.again()
        except Overloaded as full:
            self.order.append((name, round(full.retry_after_s, 1)))


async def test_who_finds_no_room_waits_for_it(autojump_clock):
    mesh = Mesh()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run, "a")
        await trio.sleep(0.1)
        nursery.start_soon(mesh.run, "b")
        await trio.sleep(0.1)
        assert mesh.intake.counts() == {"m": (1, 1)}
        assert mesh.order == ["a"]
    assert mesh.order == ["a", "a done", "b", "b done"]
    assert mesh.intake.counts() == {}


async def test_room_that_others_give_back_is_found_without_an_event_here(autojump_clock):
    mesh = Mesh(tokens=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run, "a")
        await trio.sleep(5)
        assert mesh.order == []
        mesh.now = Capacity(100, 100.0)
    assert mesh.order == ["a", "a done"]


async def test_who_would_come_too_late_is_told_at_once_and_when_to_come_back(autojump_clock):
    mesh = Mesh(rate=10.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run, "a", "c", 60.0)
        await trio.sleep(0.1)
        began_s = trio.current_time()
        await mesh.run("b", target_s=4.0)
        assert trio.current_time() == began_s
        nursery.cancel_scope.cancel()
    assert mesh.order == ["a", ("b", 6.0)]
    assert mesh.intake.rejected == 1


async def test_who_waited_past_its_target_is_told(autojump_clock):
    mesh = Mesh(rate=1000.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run, "a", "c", 60.0)
        await trio.sleep(0.1)
        began_s = trio.current_time()
        await mesh.run("b", target_s=4.0)
        assert trio.current_time() == pytest.approx(began_s + 4.0, abs=0.3)
        nursery.cancel_scope.cancel()
    assert mesh.order[-1][0] == "b"


async def test_one_that_leaves_the_queue_is_forgotten(autojump_clock):
    mesh = Mesh()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run, "a", "c", 5.0)
        await trio.sleep(0.1)
        with trio.move_on_after(1):
            await mesh.run("b")
        nursery.start_soon(mesh.run, "d")
    assert mesh.order == ["a", "a done", "d", "d done"]


async def test_a_client_that_floods_does_not_starve_another(autojump_clock):
    mesh = Mesh(quantum_tokens=200.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run, "first")
        await trio.sleep(0.1)
        for k in range(20):
            nursery.start_soon(mesh.run, f"flood{k:02}", "flood")
        await trio.sleep(0.1)
        nursery.start_soon(mesh.run, "calm", "calm")
    starts = [name for name in mesh.order if not name.endswith("done")]
    assert starts.index("calm") <= 3, starts


async def test_background_work_fills_idle_time_gives_way_at_once_and_goes_on_later(autojump_clock):
    mesh = Mesh()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(mesh.run, "batch", for_s=10.0, kind="background"))
        await trio.sleep(2)
        assert mesh.order == ["batch"]
        nursery.start_soon(mesh.run, "chat")
        await trio.sleep(0.01)
        assert mesh.order == ["batch", "chat", "batch gives way"] or mesh.order == [
            "batch",
            "batch gives way",
            "chat",
        ]
    assert mesh.order[3:] == ["chat done", "batch", "batch done"]
    assert mesh.intake.yielded == 1


async def test_background_work_that_lost_its_room_elsewhere_comes_back_after_a_while(autojump_clock):
    mesh = Mesh()
    turns = []
    async with mesh.intake.place("m", Ticket("batch", "c", 80, 20, kind="background")) as place:
        with place.turn():
            turns.append(trio.current_time())
        await mesh.intake.elsewhere(place, "m", 3.0)
        with place.turn() as turn:
            turns.append(trio.current_time())
        assert not turn.cancelled_caught
    assert turns[1] - turns[0] >= 3.0
