"""One worker's part of a strategy: shared parameters, what was trained since, what is on its way.

A fragment is a set of parameters that travel together, by rounds of their own (`tag`). Each has an anchor: the
parameters as all members of its epoch hold them, bit for bit. The pseudo-gradient is anchor - local (arXiv 2311.08105,
alg. 1); a mean of them moves the anchor, and then what this worker trained that the mean does not hold is put on top of
it. It knows no clock: `trained` counts nominal inner steps, which may be shares of a time budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from collectives.outer.optimizers import OuterOptimizer

SLOT = "outer.{slot}.{name}"


class OuterError(Exception):
    """The driver's fault: a tag that does not exist, an offer that was never made, a state of other shapes."""


class Strategy(Protocol):
    """Choices only, no state. `inner_steps` lie between two rounds of a fragment and `delay` between an offer and the
    step at which its mean is merged. With `blocking` a worker waits for the mean instead of training on. `gradients`:
    gradients of one step are reduced, no pseudo-gradients. `codec` is the one it is meant for; with `feedback` what
    the codec leaves out is kept by `collectives.Feedback` for the next round."""

    @property
    def name(self) -> str: ...
    @property
    def inner_steps(self) -> int: ...
    @property
    def delay(self) -> int: ...
    @property
    def blocking(self) -> bool: ...
    @property
    def gradients(self) -> bool: ...
    @property
    def feedback(self) -> bool: ...
    @property
    def codec(self) -> str: ...
    @property
    def optimizer(self) -> OuterOptimizer: ...

    def cut(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The fragments, in order; each name in exactly one."""
        ...

    def phase(self, index: int, count: int) -> int:
        """The nominal inner step at which fragment `index` of `count` has its first round; 1 to inner_steps."""
        ...

    def merge(self, local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
        """Writes `local`, given the new anchor and `base`, which is what `local` was when it was offered."""
        ...


def carry(local: list[torch.Tensor], anchor: list[torch.Tensor], base: list[torch.Tensor]) -> None:
    """local = anchor + (local - base): everything that was trained since stays."""
    torch._foreach_sub_(local, base)
    torch._foreach_add_(local, anchor)


@dataclass(frozen=True, slots=True)
class Offer:
    """What this worker gives to a round of `tag` on top of `epoch`: float32 `tensors` in the order of the fragment's
    names, and its `weight` in tokens. `clock`: nominal inner steps when it was made."""

    tag: str
    epoch: int
    tensors: tuple[torch.Tensor, ...]
    weight: float
    clock: float


@dataclass(slots=True)
class Fragment:
    """`tokens` were trained and are in no mean yet. `asked` is the number of rounds this worker was due for."""

    tag: str
    names: tuple[str, ...]
    local: list[torch.Tensor]
    anchor: list[torch.Tensor]
    slots: dict[str, list[torch.Tensor]]
    phase: int
    epoch: int = 0
    tokens: float = 0.0
    asked: int = 0
    in_air: bool = False
    unsettled: list[Offer] = field(default_factory=list)  # the last is the newest
    merge_at: float | None = None
    base: list[torch.Tensor] = field(default_factory=list)


class Outer:
    """See the folder's docstring. `params` are the worker's own float32 tensors by name; they are written in place, by
    `trained` (delayed merges), `take` and `load`. Raises OuterError."""

    def __init__(self, strategy: Strategy, params: Mapping[str, torch.Tensor]) -> None:
        if any(one.dtype != torch.float32 for one in params.values()):
            raise OuterError("outer steps are made on float32 master parameters")
        self.strategy = strategy
        self.clock = 0.0
        cuts = strategy.cut(tuple(params))
        if sorted(name for cut in cuts for name in cut) != sorted(params):
            raise OuterError(f"{strategy.name} does not put each parameter into one fragment")
        self._fragments: dict[str, Fragment] = {}
        for index, names in enumerate(cuts):
            tag = "outer" if len(cuts) == 1 else f"fragment-{index}"
            local = [params[name].detach() for name in names]
            slots = {slot: [torch.zeros_like(one) for one in local] for slot in strategy.optimizer.slots}
            anchor = [one.clone() for one in local]
            phase = strategy.phase(index, len(cuts))
            self._fragments[tag] = Fragment(tag, names, local, anchor, slots, phase)

    @property
    def tags(self) -> tuple[str, ...]:
        """One for each fragment; a run may have rounds of all of them open at once."""
        return tuple(self._fragments)

    def names(self, tag: str) -> tuple[str, ...]:
        """The parameters that travel with `tag`, in the order of its tensors."""
        return self._at(tag).names

    def epoch(self, tag: str) -> int:
        """Of the anchor: the number of means it has taken."""
        return self._at(tag).epoch

    def untold(self, tag: str) -> float:
        """Tokens that were trained here and are in no mean yet."""
        return self._at(tag).tokens

    @property
    def waiting(self) -> bool:
        """Whether the worker must not train on before the rounds it is in have ended."""
        return self.strategy.blocking and any(one.in_air for one in self._fragments.values())

    # ---- what the driver tells

    def trained(self, tokens: float, steps: float = 1.0) -> None:
        """`tokens` more were trained, in `steps` nominal inner steps (a share of one where H is a time budget)."""
        self.clock += steps
        for one in self._fragments.values():
            one.tokens += tokens
            if one.merge_at is not None and self.clock >= one.merge_at:
                self._merge(one)

    def due(self, *, last: bool = False) -> tuple[str, ...]:
        """Fragments whose round is to begin now. While one is on its way its next is put off. `last`: the run ends, and
        whatever is in no mean yet has its round."""
        if last:
            for one in self._fragments.values():
                if one.merge_at is not None:
                    self._merge(one)
        return tuple(
            one.tag
            for one in self._fragments.values()
            if not one.in_air
            and one.merge_at is None
            and one.tokens > 0
            and (last or self._turn(one) > one.asked)
        )

    def offer(self, tag: str, gradients: Sequence[torch.Tensor] | None = None) -> Offer:
        """What to give to the round: a copy, weighted by all tokens that no mean holds yet. `gradients`, in the order
        of `names(tag)`, for strategies that reduce these."""
        one = self._at(tag)
        if one.in_air:
            raise OuterError(f"{tag} is on its way already")
        if (gradients is not None) != self.strategy.gradients:
            raise OuterError(
                f"{self.strategy.name} reduces {'' if self.strategy.gradients else 'no '}gradients"
            )
        if gradients is not None:
            tensors = [given.detach().clone() for given in gradients]
        else:
            tensors = list(torch._foreach_sub(one.anchor, one.local))
        one.in_air, one.asked = True, max(one.asked + 1, self._turn(one))
        offer = Offer(tag, one.epoch, tuple(tensors), one.tokens, self.clock)
        one.unsettled.append(offer)
        return offer

    def take(
        self, tag: str, epoch: int, mean: Sequence[torch.Tensor], weight: float | None = None
    ) -> Offer | None:
        """The mean of `epoch`, the one after the anchor's. `weight`: the one this worker has among its members; None
        if it is none of them, and then all it trained waits for its next offer. Results that come late
        (`Run.catch_up`) are given here too, in order; with feedback their driver commits the offer that counted, which
        is returned."""
        one = self._at(tag)
        if epoch != one.epoch + 1:
            raise OuterError(f"{tag}: the mean of epoch {epoch} cannot follow epoch {one.epoch}")
        if one.merge_at is not None:
            self._merge(one)
        counted = self._counted(one, weight)
        before = [value.clone() for value in one.anchor] if counted is None else []
        base = [] if counted is None else torch._foreach_sub(one.anchor, list(counted.tensors))
        moved = counted is not None and one.tokens > counted.weight
        self.strategy.optimizer.step(one.anchor, one.slots, [value.detach() for value in mean], epoch)
        one.epoch, one.in_air = epoch, False
        one.unsettled.clear()  # whatever was offered on top of the old epoch has counted, or never will
        if self.strategy.gradients:
            one.tokens = 0.0  # a gradient of parameters that are no more is of no use
            torch._foreach_copy_(one.local, one.anchor)
        elif counted is None:
            carry(one.local, one.anchor, before)
        else:
            one.tokens = max(0.0, one.tokens - counted.weight)
            one.base, one.merge_at = list(base), counted.clock + self.strategy.delay
            if not moved and not self.strategy.delay:  # nothing to put on top: exactly the anchor
                torch._foreach_copy_(one.local, one.anchor)
                one.base, one.merge_at = [], None
            elif self.clock >= one.merge_at:
                self._merge(one)
        return counted

    def failed(self, tag: str) -> None:
        """The round ended without a result here. It may still turn out that it had one, which counted this worker."""
        one = self._at(tag)
        one.in_air = False
        del one.unsettled[:-2]
        if self.strategy.gradients:
            one.tokens = 0.0

    def withdraw(self, tag: str) -> None:
        """The last offer was never given to anybody."""
        one = self._at(tag)
        one.in_air = False
        if one.unsettled:
            one.unsettled.pop()
        if self.strategy.gradients:
            one.tokens = 0.0

    # ---- the shared state

    def state(self, tag: str) -> dict[str, torch.Tensor]:
        """The anchor by parameter name, and `outer.SLOT.NAME` for what the optimizer keeps: equal, bit for bit, at all
        who stand at the same epoch. The tensors are the live ones: copy them before the next `take`."""
        one = self._at(tag)
        found = dict(zip(one.names, one.anchor, strict=True))
        for slot, values in one.slots.items():
            for name, value in zip(one.names, values, strict=True):
                found[SLOT.format(slot=slot, name=name)] = value
        return found

    def load(
        self,
        tag: str,
        state: Mapping[str, torch.Tensor],
        epoch: int,
        *,
        keep: bool,
        counted: float | None = None,
        clock: float = 0.0,
    ) -> None:
        """Takes up the shared state after `epoch`. `keep`: what was trained here and is in no mean stays on top of it
        (False: a newcomer, who has trained nothing). `counted`: the weight of an offer that turned out to be in that
        state already. `clock`: nominal inner steps that others are at, if known: the next round is then due with
        theirs. Slots that the state lacks, as one of another strategy does, are zeros. Raises OuterError for missing
        or misshapen tensors, and then nothing has changed."""
        one = self._at(tag)
        for name, value in zip(one.names, one.anchor, strict=True):
            if name not in state or state[name].shape != value.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise OuterError(
                    f"{tag}: expected {name} of shape {tuple(value.shape)}, the state has {found}"
                )
        if one.merge_at is not None:
            self._merge(one)
        offer = self._counted(one, counted)
        progress = list(torch._foreach_sub(one.local, one.anchor)) if keep else []
        if keep and offer is not None:
            torch._foreach_add_(progress, list(offer.tensors))
        for name, value in zip(one.names, one.anchor, strict=True):
            value.copy_(state[name])
        for slot, values in one.slots.items():
            for name, value in zip(one.names, values, strict=True):
                kept = state.get(SLOT.format(slot=slot, name=name))
                value.zero_() if kept is None or kept.shape != value.shape else value.copy_(kept)
        torch._foreach_copy_(one.local, one.anchor)
        if keep and not self.strategy.gradients:
            torch._foreach_add_(one.local, progress)
        one.tokens = one.tokens - (0.0 if offer is None else offer.weight) if keep else 0.0
        one.epoch, one.in_air = epoch, False
        one.unsettled.clear()
        if epoch > 0:
            clock = max(clock, float((epoch - 1) * self.strategy.inner_steps + one.phase))
        self.clock = max(self.clock, clock)
        one.asked = max(one.asked, self._turn(one))

    # ---- within

    def _at(self, tag: str) -> Fragment:
        try:
            return self._fragments[tag]
        except KeyError:
            raise OuterError(
                f"there is no fragment {tag!r}, expected one of {', '.join(self.tags)}"
            ) from None

    def _turn(self, one: Fragment) -> int:
        """How many rounds of the fragment have been due by now."""
        # Shares of a time budget add up to a little less than the whole.
        past = self.clock + 1e-6 - one.phase
        return 0 if past < 0 else 1 + int(past // self.strategy.inner_steps)

    def _merge(self, one: Fragment) -> None:
        self.strategy.merge(one.local, one.anchor, one.base)
        one.base, one.merge_at = [], None

    def _counted(self, one: Fragment, weight: float | None) -> Offer | None:
        """The unsettled offer of that weight; the newest where caps changed the weight."""
        if weight is None or not one.unsettled:
            return None
        return next((offer for offer in one.unsettled if offer.weight == weight), one.unsettled[-1])
