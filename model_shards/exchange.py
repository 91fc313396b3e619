"""Export and import of sessions' state by an engine, for migration, standby and separate prefill.

What `state` describes as bytes is here taken from sessions and put into them. It opens and closes sessions as any
caller of the engine does, and knows neither steps nor batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from model_shards.errors import LocalFault, StateError, StepError
from model_shards.kv import SessionKv
from model_shards.lowrank import Adapter
from model_shards.pooling import Pooled
from model_shards.sampler import Said
from model_shards.span import Span
from model_shards.state import PART_BYTES_MAX, Arrivals, Layout, Part, cut, decode_part, encode_part


class StateExchange:
    """The part of an Engine that gives sessions' state away and takes it over; the engine fills in the rest."""

    span: Span
    _said: dict[str, Said]
    _pooled: dict[str, Pooled]
    _tuned: dict[str, Adapter]

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._arrivals: dict[str, Arrivals] = {}

    def open(self, session: str, start: int, end: int, tokens_max: int, *, adapter: str = "") -> None:
        """The engine's."""
        raise LocalFault("only an engine opens sessions")

    def close(self, session: str) -> None:
        """The engine's."""
        raise LocalFault("only an engine closes sessions")

    def _kv(self, session: str) -> SessionKv:
        raise LocalFault("only an engine has sessions")

    def export_session(
        self,
        session: str,
        start: int | None = None,
        end: int | None = None,
        *,
        first: int = 0,
        last: int | None = None,
        bytes_max: int = PART_BYTES_MAX,
    ) -> Iterator[memoryview]:
        """The session's state in parts of about ``bytes_max`` bytes, each made when it is asked for: rows of layers
        [start, end) (all of the session's) and positions [first, last) (all); with the last layer's last row what
        sampling and pooling remember.

        Rows that are filled stay as they are: parts may be made beside run(), from another thread, also while the
        session itself goes on; it must neither be rewound nor closed. Raises StepError.
        """
        kv = self._kv(session)
        start, end = kv.start if start is None else start, kv.end if end is None else end
        last = kv.length if last is None else last
        if not kv.start <= start < end <= kv.end:
            raise StepError(session, f"has no layers [{start}, {end}), its own are [{kv.start}, {kv.end})")
        if not 0 <= first <= last <= kv.length:
            raise StepError(session, f"has no positions [{first}, {last}), it holds {kv.length}")
        return self._parts(session, cut(self._layout, start, end, first, last, bytes_max))

    def _parts(self, session: str, parts: Iterable[Part]) -> Iterator[memoryview]:
        for part in parts:
            kv = self._kv(session)
            if part.end == self.span.config.layers and part.last == kv.length:
                said = self._said[session]
                # A copy: the session may go on meanwhile.
                part.said, part.pooled = (
                    Said(list(said.tokens), said.prompt_tokens),
                    self._pooled.get(session),
                )
            part.adapter = self._adapter_of(session)
            yield encode_part(self._layout, part, kv)

    def _adapter_of(self, session: str) -> str:
        adapter = self._tuned.get(session)
        return "" if adapter is None else adapter.name

    def import_session(
        self,
        session: str,
        start: int,
        end: int,
        tokens_max: int,
        parts: Iterable[bytes | memoryview],
        *,
        adapter: str = "",
    ) -> int:
        """Opens ``session`` (see `Engine.open`) and takes over the state that ``parts`` of one or several engines
        hold; returns its position. What follows has the very bits it would have had there. Raises StateError and
        what open() raises, with nothing left open."""
        self.open(session, start, end, tokens_max, adapter=adapter)
        try:
            for part in parts:
                self.import_part(session, part)
            if session in self._arrivals:
                reached = sorted(set(self._arrivals[session].filled))
                raise StateError("parts", f"layers that end at {reached}", "all at one position")
        except BaseException:  # whatever ended it: nothing of it may stay open
            self.close(session)
            raise
        return self._kv(session).length

    @torch.inference_mode()
    def import_part(
        self,
        session: str,
        part: bytes | bytearray | memoryview,
        *,
        start: int | None = None,
        end: int | None = None,
    ) -> int:
        """Takes over one part of a state, of layers within [start, end) where given; returns the session's position,
        which moves on when all its layers have come equally far. Until then it takes no step. It may be called
        beside run(), from another thread, for a session that was opened without a prompt. Raises StateError with
        nothing changed, StepError."""
        kv = self._kv(session)
        found = decode_part(self._layout, part)
        start, end = kv.start if start is None else start, kv.end if end is None else end
        if found.start < start or found.end > end:
            raise StateError("layers", (found.start, found.end), f"within {(start, end)}")
        if found.adapter != self._adapter_of(session):
            raise StateError("adapter", found.adapter, repr(self._adapter_of(session)))
        arrivals = self._arrivals.get(session) or Arrivals.of(kv)
        arrivals.check(found, kv.tokens_max)
        remembers = found.end == self.span.config.layers
        if remembers:
            found.check_said(kv.tokens_max + 1, self.span.config.vocab)
        for layer, (keys, values) in enumerate(found.rows, found.start):
            kv.put(layer, found.first, keys.to(kv.device), values.to(kv.device))
        position = arrivals.took(found)
        self._arrivals[session] = arrivals
        if remembers and found.said is not None:
            self._said[session] = found.said
        if remembers and found.pooled is not None:
            self._pooled[session] = found.pooled
        if position is not None:
            del self._arrivals[session]
            kv.advance(position - kv.length, None)
            said = self._said[session].tokens
            said.extend([-1] * (position - len(said)))
        return kv.length

    def reached(self, session: str, start: int, end: int) -> int:
        """The position up to which all of the session's layers [start, end) hold rows, also while more is to come.
        Raises StepError."""
        kv, arrivals = self._kv(session), self._arrivals.get(session)
        if arrivals is None:
            return kv.length
        return min(arrivals.filled[start - kv.start : end - kv.start], default=kv.length)
