"""What adapters add to a layer's linear maps (LoRA, arXiv 2106.09685): rows of one pass may each have their own.

A single position is always computed as one of a batch of small products, never by a kernel chosen for its row alone, so
that it has the same bits whoever decodes beside it, with an adapter or without. Knows no files and no sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

Place = tuple[int, int, int]
_EXACT: dict[tuple[object, ...], bool] = {}


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one part: ``ups[i] @ (its rows of down @ x)`` to the results [row, row + rows) of
    ``places[i]`` = (row, rows, rank). ``down`` [sum of ranks, in]; ``ups[i]`` [rows, rank], its scale worked in."""

    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.down.nbytes) + sum(int(up.nbytes) for up in self.ups)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's matrices for layers [start, end) by (layer, part); the head's are those of layer ``layers``."""

    name: str
    start: int
    end: int
    dtype: torch.dtype
    deltas: Mapping[tuple[int, str], Delta]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(delta.nbytes for delta in self.deltas.values())


@dataclass(frozen=True, slots=True)
class Tuned:
    """Which adapter each row of a pass has. ``whole``: all rows are one step of several positions. A layer and its
    parts take a view of their own by `at`, `under` and `of`."""

    adapters: Sequence[Adapter | None]
    whole: bool
    layer: int = 0
    prefix: str = ""
    _indices: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def at(self, layer: int) -> Tuned:
        """For the parts of ``layer``."""
        return Tuned(self.adapters, self.whole, layer, "", self._indices)

    def under(self, prefix: str) -> Tuned:
        """For the parts whose names begin with ``prefix``."""
        return Tuned(self.adapters, self.whole, self.layer, prefix, self._indices)

    def of(self, rows: Sequence[int]) -> Tuned:
        """For some of the rows."""
        chosen = [self.adapters[row] for row in rows]
        return Tuned(chosen, self.whole, self.layer, self.prefix, self._indices)

    def add(self, part: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to ``y`` [n, out] = part(x) what the adapters of its rows make of ``x`` [n, in]; others stay as they
        are."""
        key = self.layer, self.prefix + part
        deltas = [None if adapter is None else adapter.deltas.get(key) for adapter in self.adapters]
        if self.whole:
            delta = deltas[0] if deltas else None
            if delta is not None:
                _add_whole(delta, x, y)
            return
        alike: dict[tuple[Place, ...], list[int]] = {}
        for row, delta in enumerate(deltas):
            if delta is not None:
                alike.setdefault(delta.places, []).append(row)
        for places, rows in alike.items():
            found = _by_rows(self._pick(x, rows), [d for row in rows if (d := deltas[row]) is not None])
            for (row, width, _), added in zip(places, found, strict=True):
                if len(rows) == len(y):
                    y[:, row : row + width] += added
                else:
                    y[:, row : row + width].index_add_(0, self._index(rows, y), added)

    def _pick(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return x if len(rows) == len(x) else x[self._index(rows, x)]

    def _index(self, rows: list[int], like: torch.Tensor) -> torch.Tensor:
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = torch.tensor(rows, device=like.device)
        return self._indices[key]


def _add_whole(delta: Delta, x: torch.Tensor, y: torch.Tensor) -> None:
    low, first = F.linear(x, delta.down), 0
    for up, (row, width, rank) in zip(delta.ups, delta.places, strict=True):
        y[:, row : row + width] += F.linear(low[:, first : first + rank], up)
        first += rank


def _by_rows(x: torch.Tensor, deltas: Sequence[Delta]) -> list[torch.Tensor]:
    """For each place what row i of ``x`` [n, in] gets from ``deltas[i]`` (all of the same places), [n, rows]."""
    low, first, found = _products(x, [delta.down for delta in deltas]), 0, []
    for at, (_, _, rank) in enumerate(deltas[0].places):
        found.append(_products(low[:, first : first + rank], [delta.ups[at] for delta in deltas]))
        first += rank
    return found


def _products(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """``matrices[i]`` [out, in] times row i of ``x`` [n, in] -> [n, out], each with the bits it has by itself."""
    count = len(matrices)
    if count == 1:
        # A batch of one may take another kernel than a batch of two, and no larger one was seen to differ from two.
        return _batched(x.expand(2, -1), [matrices[0], matrices[0]])[:1]
    if _batch_is_exact(count, matrices[0]):
        return _batched(x, matrices)
    return torch.cat([_products(x[at : at + 1], matrices[at : at + 1]) for at in range(count)])


def _batched(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.bmm(x.unsqueeze(1), torch.stack(list(matrices)).mT).squeeze(1)


def _batch_is_exact(count: int, like: torch.Tensor) -> bool:
    """Whether rows of a batch of ``count`` products have the bits of batches of two; tried once for each shape."""
    key = count, tuple(like.shape), like.dtype, like.device, torch.get_num_threads()
    if key not in _EXACT:
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(count, like.shape[1], generator=generator).to(like.device, like.dtype)
        several = torch.randn(count, *like.shape, generator=generator).to(like.device, like.dtype)
        together = _batched(x, list(several))
        _EXACT[key] = all(
            torch.equal(together[at], _products(x[at : at + 1], [several[at]])[0]) for at in range(count)
        )
    return _EXACT[key]
