"""What waits to be sent to one peer: bounded, and coalesced so that a slow peer costs little.

It drops the oldest when full, which anti-entropy repairs. It knows neither peers nor calls.
"""

from __future__ import annotations

from collections import deque

import trio

from dht.messages import Message, Push, Summary, batches


class Outbox:
    """A queue of messages. Pushes that wait together leave as one; of several summaries the newest stays."""

    def __init__(self, messages_max: int, push_bytes_max: int) -> None:
        self.dropped = 0
        self.in_flight = 0
        self._messages_max = messages_max
        self._push_bytes_max = push_bytes_max
        self._records: dict[bytes, None] = {}
        self._record_bytes = 0
        self._others: deque[Message] = deque()
        self._wake = trio.lowlevel.ParkingLot()

    def put(self, message: Message) -> None:
        """Never blocks."""
        if isinstance(message, Push):
            for record in message.records:
                if record not in self._records:
                    self._records[record] = None
                    self._record_bytes += len(record)
            while self._record_bytes > self._push_bytes_max and len(self._records) > 1:
                self._record_bytes -= len(self._pop_record())
                self.dropped += 1
        else:
            if isinstance(message, Summary):
                self._others = deque(other for other in self._others if not isinstance(other, Summary))
            self._others.append(message)
            if len(self._others) > self._messages_max:
                self._others.popleft()
                self.dropped += 1
        self._wake.unpark_all()

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is on its way."""
        return not self._records and not self._others and not self.in_flight

    async def take(self) -> Message:
        """The next message; records first. The caller counts it `in_flight` until it is done."""
        while not self._records and not self._others:
            await self._wake.park()
        if not self._records:
            return self._others.popleft()
        first, *rest = batches(self._records)
        self._records = dict.fromkeys(record for push in rest for record in push.records)
        self._record_bytes = sum(map(len, self._records))
        return first

    def _pop_record(self) -> bytes:
        oldest = next(iter(self._records))
        del self._records[oldest]
        return oldest
