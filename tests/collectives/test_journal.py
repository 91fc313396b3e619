"""The journal keeps what it confirmed, whatever instant a process was killed at."""

import os

import pytest
import trio

from collectives.errors import JournalError
from collectives.journal import MAGIC, VALUE_BYTES_MAX, Journal


async def filled(path, count=5):
    journal = Journal.open(path)
    for number in range(count):
        await journal.put(f"chain-{number % 2}", b"value %d" % number * 3)
    journal.close()
    return path.read_bytes()


async def test_the_last_value_of_each_key_survives(tmp_path):
    path = tmp_path / "deep" / "rounds"
    await filled(path)
    journal = Journal.open(path)
    assert journal.get("chain-0") == b"value 4" * 3
    assert journal.get("chain-1") == b"value 3" * 3
    assert journal.get("chain-2") is None
    journal.close()


async def test_a_file_torn_at_any_byte_gives_a_prefix_and_goes_on(tmp_path):
    path = tmp_path / "rounds"
    whole = await filled(path)
    seen = set()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal.open(path)
        seen.add(journal.get("chain-0"))
        await journal.put("chain-0", b"new")
        journal.close()
        again = Journal.open(path)
        assert again.get("chain-0") == b"new"
        again.close()
    assert seen == {None, *(b"value %d" % number * 3 for number in (0, 2))}


@pytest.mark.parametrize(("at", "last"), [(-1, b"value 2" * 3), (-5, b"value 2" * 3), (len(MAGIC) + 3, None)])
async def test_a_flipped_bit_ends_what_is_believed(tmp_path, at, last):
    path = tmp_path / "rounds"
    whole = bytearray(await filled(path))
    whole[at] ^= 4
    path.write_bytes(whole)
    journal = Journal.open(path)
    assert journal.get("chain-0") == last
    await journal.put("chain-0", b"new")
    journal.close()
    again = Journal.open(path)
    assert again.get("chain-0") == b"new", "what is written after it is believed again"
    again.close()


async def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "rounds"
    path.write_bytes(b"my letters to Santa")
    with pytest.raises(JournalError, match="not a journal"):
        Journal.open(path)
    assert path.read_bytes() == b"my letters to Santa"


async def test_an_old_file_is_rewritten_with_its_last_values(tmp_path):
    path = tmp_path / "rounds"
    journal = Journal.open(path)
    journal.compact_bytes_min = 4096
    for number in range(200):
        await journal.put("outer", bytes([number]) * 100)
        await journal.put("inner", bytes([number]) * 50)
    assert path.stat().st_size <= 4096 + 300
    await journal.put("outer", b"end")
    journal.close()
    journal = Journal.open(path)
    assert (journal.get("outer"), journal.get("inner")) == (b"end", bytes([199]) * 50)
    journal.close()


async def test_a_rewrite_that_was_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "rounds"
    await filled(path)
    (tmp_path / "rounds.new").write_bytes(MAGIC + b"half")
    journal = Journal.open(path)
    assert journal.get("chain-1") == b"value 3" * 3
    journal.close()
    assert [p.name for p in tmp_path.iterdir()] == ["rounds"]


async def test_puts_that_wait_together_share_a_flush(tmp_path, monkeypatch):
    calls = []
    real = os.fsync
    journal = Journal.open(tmp_path / "rounds")
    monkeypatch.setattr("os.fsync", lambda number: calls.append(number) or real(number))
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(journal.put, f"tag-{number}", b"x" * number)
    assert 1 <= len(calls) <= 3
    journal.close()
    again = Journal.open(tmp_path / "rounds")
    assert [again.get(f"tag-{number}") for number in range(20)] == [b"x" * number for number in range(20)]
    again.close()


async def test_after_a_failed_write_nothing_is_confirmed_any_more(tmp_path, monkeypatch):
    journal = Journal.open(tmp_path / "rounds")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(JournalError, match="No space"):
        await journal.put("a", b"1")
    monkeypatch.undo()
    with pytest.raises(JournalError):
        await journal.put("a", b"2")
    journal.close()


async def test_what_no_record_holds_is_refused(tmp_path):
    journal = Journal.open(None)
    with pytest.raises(JournalError):
        await journal.put("a", bytes(VALUE_BYTES_MAX + 1))
    await journal.put("a", b"1")
    assert journal.get("a") == b"1"
    assert journal.names() == ("a",)
