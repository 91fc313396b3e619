"""Which chunks are asked of whom: the choices of the picker, without any peer."""

from hypothesis import given
from hypothesis import strategies as st

from p2p.blobs.picking import Picker


def bits(*numbers):
    raw = bytearray(max(numbers, default=0) // 8 + 1)
    for number in numbers:
        raw[number >> 3] |= 1 << (number & 7)
    return bytes(raw)


def make(count=10, length=100, **limits):
    return Picker(range(count), lambda number: length, "me", **limits)


def test_the_rarest_chunk_comes_first():
    picker = make(run_chunks_max=1)
    picker.offer("a", bits(*range(10)))
    picker.offer("b", bits(0, 1, 2, 3, 4, 6, 7, 8, 9))
    assert picker.pick("a", 0.0) == range(5, 6)


def test_a_run_is_of_neighbours_and_within_the_limits():
    picker = make(run_bytes_max=350)
    picker.offer("a", bits(*range(10)))
    run = picker.pick("a", 0.0)
    assert len(run) == 3 or run.stop == 10
    picker = make(run_chunks_max=2)
    picker.offer("a", bits(4, 5, 6, 8))
    assert [picker.pick("a", 0.0) for _ in range(4)] == [range(4, 6), range(6, 7), range(8, 9), None]


def test_a_chunk_longer_than_a_run_is_asked_alone():
    picker = make(run_bytes_max=50)
    picker.offer("a", bits(3, 4))
    assert picker.pick("a", 0.0) == range(3, 4)


def test_nobody_is_asked_twice_for_the_same_unless_the_first_stalls():
    picker = make(count=1, stalled_s=5.0)
    for peer in ("a", "b", "c"):
        picker.offer(peer, bits(0))
    assert picker.pick("a", 0.0) == range(1)
    assert picker.pick("b", 4.9) is None
    assert picker.pick("b", 5.0) == range(1)
    assert picker.pick("a", 20.0) is None
    assert picker.pick("c", 9.0) is None
    picker.returned("a", range(1))
    assert picker.pick("c", 9.0) is None
    picker.returned("b", range(1))
    assert picker.pick("c", 9.0) == range(1)
    picker.done(range(1))
    assert picker.missing == set()
    assert picker.pick("a", 99.0) is None


def test_a_bad_peer_never_returns_while_a_lost_one_may():
    picker = make()
    picker.offer("a", bits(1))
    picker.drop("a", bad=False)
    assert picker.pick("a", 0.0) is None
    picker.offer("a", bits(1))
    run = picker.pick("a", 0.0)
    picker.drop("a", bad=True)
    picker.offer("a", bits(1))
    assert picker.pick("a", 0.0) is None
    assert not picker.useful("a")
    picker.offer("b", bits(1))
    assert picker.pick("b", 0.0) == run


def test_a_resting_peer_is_left_alone_until_then():
    picker = make()
    picker.offer("a", bits(1))
    picker.rest("a", 3.0)
    picker.rest("a", 2.0)
    assert picker.pick("a", 2.9) is None
    assert picker.pick("a", 3.0) == range(1, 2)


def test_a_busy_peer_is_asked_for_less_at_once():
    picker = make(run_chunks_max=1)
    picker.offer("a", bits(*range(10)))
    runs = [picker.pick("a", 0.0) for _ in range(4)]
    picker.rest("a", 1.0)
    for run in runs:
        picker.returned("a", run)
    assert [picker.pick("a", 1.0) is not None for _ in range(5)] == [True] * 3 + [False] * 2
    picker.rest("a", 2.0)
    picker.rest("a", 2.0)
    for _ in range(3):
        picker.returned("a", [])
    assert [picker.pick("a", 2.0) is not None for _ in range(3)] == [True, True, False]


def test_a_refused_run_is_asked_for_one_by_one_and_a_refused_chunk_not_again():
    picker = make(count=3)
    picker.offer("a", bits(0, 1, 2))
    while (run := picker.pick("a", 0.0)) is not None:
        picker.returned("a", run)
        picker.refuse("a", run)
        if len(run) == 1:
            break
    left = picker.missing - set(run)
    assert picker.complete("a") is False
    assert picker.useful("a")
    picked = [picker.pick("a", 0.0) for _ in range(2)]
    assert {run.start for run in picked} == left
    assert all(len(run) == 1 for run in picked)
    assert picker.unavailable() == list(run)


def test_fetchers_start_at_different_places():
    starts = set()
    for name in "abcdefgh":
        picker = Picker(range(100), lambda number: 1, name, run_chunks_max=1)
        picker.offer("s", bits(*range(100)))
        starts.add(picker.pick("s", 0.0).start)
    assert len(starts) >= 5


def test_bits_beyond_what_was_sent_are_not_there():
    picker = make(count=20)
    picker.offer("a", b"\x01")
    assert picker.pick("a", 0.0) == range(1)
    assert picker.pick("a", 0.0) is None
    assert picker.unavailable() == list(range(1, 20))


@given(
    st.lists(st.sets(st.integers(0, 29)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["done", "failed", "lost"])), max_size=60),
)
def test_whatever_happens_only_offered_missing_chunks_are_asked(offers, steps):
    picker = Picker(range(30), lambda number: 10 + number, "me", run_bytes_max=60, run_chunks_max=3)
    names = [f"p{index}" for index in range(len(offers))]
    for name, numbers in zip(names, offers, strict=True):
        picker.offer(name, bits(*numbers))
    now = 0.0
    for index, outcome in steps:
        index %= len(names)
        now += 1.0
        run = picker.pick(names[index], now)
        if run is None:
            continue
        assert set(run) <= offers[index] & picker.missing
        assert len(run) == 1 or sum(10 + number for number in run) <= 60
        if outcome == "done":
            picker.done(run)
        elif outcome == "failed":
            picker.returned(names[index], run)
    held = set().union(*offers)
    for name in names:
        picker.returned(name, range(30))
    for _ in range(100):
        for name in names:
            run = picker.pick(name, now)
            if run is not None:
                picker.done(run)
    assert picker.missing.isdisjoint(held)
    assert picker.unavailable() == sorted(picker.missing)
