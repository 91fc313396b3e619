"""Ctrl-C and polite kills that never fall between starting a process and remembering it.

Inside `with Interrupts() as interrupts`, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, except within
`interrupts.held()`, where they wait for the block's end; after the first one the rest of clean-up is not
interrupted again. It knows nothing of what is being protected.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """A context manager; outside the main thread, where Python allows no handlers, it does nothing."""

    def __init__(self) -> None:
        self._holds = 0
        self._pending = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A signal that our parent has chosen to ignore (nohup) stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._holds:
            self._pending = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals that come inside take effect at the end of the outermost such block."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._pending and not self._holds:
            self._pending = False
            raise KeyboardInterrupt

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Signals that come inside have no effect: for clean-up, which is what they ask for."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self._pending = False
