"""What a session of this gateway takes on its chains, for the gateway's own next choices before the mesh hears of it.

Knows the ledger and a choice of chains; it opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from node.serve.selection import Choice, as_stages
from scheduler.ledger import Ledger


@contextmanager
def booked(
    ledger: Ledger,
    session: str,
    manifest_id: str,
    choice: Choice,
    *,
    prompt_tokens: int,
    new_tokens: int,
    priority: int,
) -> Iterator[Callable[[], None]]:
    """Room and work are taken for as long as the block lasts. Gives what to call when a chain that only read the prompt
    has handed its cache over, and is free again."""
    reader, is_reading = f"{session}-read", choice.prefill is not None

    def book(name: str, part: Choice, tokens: int, to_read: int) -> None:
        ledger.opened(
            name,
            manifest_id,
            as_stages(part.stages),
            tokens=tokens,
            prompt_tokens=to_read,
            priority=priority,
            now_s=trio.current_time(),
        )

    def handed_over() -> None:
        nonlocal is_reading
        if is_reading:
            is_reading = False
            ledger.closed(reader, trio.current_time())

    to_read = prompt_tokens - choice.reading.reuse
    book(session, choice, prompt_tokens + new_tokens, 0 if choice.prefill is not None else to_read)
    if choice.prefill is not None:
        book(reader, choice.prefill, prompt_tokens, to_read)
    try:
        yield handed_over
    finally:
        handed_over()
        ledger.closed(session, trio.current_time())
