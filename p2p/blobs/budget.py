"""How much a node uploads: a bucket that fills at the owner's rate, and the queue before it.

`Bucket` is a synchronous core, the clock is an argument. What waits in the queue learns of a new rate at once.
"""

from __future__ import annotations

import trio

BURST_S = 0.25


class Bucket:
    """`bytes_per_s` None: no limit; 0: nothing. What was not sent for a while may be sent at once, up to BURST_S."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes_per_s = bytes_per_s
        self._debt_bytes = 0.0
        self._at_s = 0.0

    def set_rate(self, bytes_per_s: float | None, now: float) -> None:
        self._settle(now)
        self.bytes_per_s = bytes_per_s

    def wait_s(self, now: float) -> float:
        """How long until something may be sent; infinite where nothing is."""
        self._settle(now)
        if (
            self.bytes_per_s is None or self._debt_bytes < 1
        ):  # less than a byte may be less than the clock's step
            return 0.0 if self.bytes_per_s != 0 else float("inf")
        return self._debt_bytes / self.bytes_per_s if self.bytes_per_s else float("inf")

    def spend(self, count: int, now: float) -> None:
        """`count` bytes go out now."""
        self._settle(now)
        self._debt_bytes += count

    def _settle(self, now: float) -> None:
        rate = self.bytes_per_s
        if rate is None:
            self._debt_bytes = 0.0
        else:
            self._debt_bytes = max(self._debt_bytes - rate * (now - self._at_s), -rate * BURST_S)
        self._at_s = now


class UploadBudget:
    """The queue: first come, first served."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self._bucket = Bucket(bytes_per_s)
        self._turn = trio.StrictFIFOLock()
        self._changed = trio.Event()
        self.sent_bytes = 0

    @property
    def bytes_per_s(self) -> float | None:
        return self._bucket.bytes_per_s

    def set_rate(self, bytes_per_s: float | None) -> None:
        """From now on, also for what waits."""
        self._bucket.set_rate(bytes_per_s, trio.current_time())
        self._changed.set()
        self._changed = trio.Event()

    async def spend(self, count: int) -> None:
        """Wait until `count` bytes may go out, which counts them as sent."""
        async with self._turn:
            while (wait_s := self._bucket.wait_s(trio.current_time())) > 0:
                with trio.move_on_after(wait_s):
                    await self._changed.wait()
            self._bucket.spend(count, trio.current_time())
        self.sent_bytes += count
