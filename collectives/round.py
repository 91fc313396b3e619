"""What a caller sees of a round: `Round.reduce`, and `Reduced`, which says whose mean it is."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from collectives.agreement import Certificate, LeftOut, Member
from collectives.errors import LocalFault
from collectives.reduce.feedback import Feedback

if TYPE_CHECKING:
    from collectives.run import Run

NONCE_BITS = 52


@dataclass(frozen=True, slots=True)
class Reduced:
    """The result of one committed epoch: the mean of its `members`' tensors, weighted by their weights (after caps).

    `tensors` have the shapes, dtypes and devices of those given to `reduce`; they are the caller's, but a member that
    missed the round can only fetch them from here while they are unchanged. `weight` is the sum of the members'
    weights. Every member of the epoch holds the same bytes, named by `digest`. `left_out` says who was no member and
    why. Bytes are those of this node's data links in this round, headers included.
    """

    tensors: tuple[torch.Tensor, ...]
    epoch: int
    tag: str
    members: tuple[Member, ...]
    weight: float
    digest: bytes
    left_out: tuple[LeftOut, ...]
    certificate: Certificate
    bytes_sent: int
    bytes_received: int
    took_s: float

    @property
    def peers(self) -> tuple[str, ...]:
        """The members' peer ids."""
        return tuple(member.peer for member in self.members)


class Round:
    """One attempt at the next epoch of a tag; made by `Run.round`. `deadline_s` is by trio's clock."""

    def __init__(self, run: Run, tag: str, deadline_s: float) -> None:
        self.tag = tag
        self.deadline_s = deadline_s
        self._run = run
        self._used = False

    @property
    def epoch(self) -> int:
        """The epoch it would commit."""
        return self._run.epoch(self.tag) + 1

    async def reduce(
        self,
        tensors: Sequence[torch.Tensor],
        weight: float = 1.0,
        *,
        out: Sequence[torch.Tensor] | None = None,
        feedback: Feedback | None = None,
    ) -> Reduced:
        """The mean of all members' `tensors`, weighted: a list of any shapes and floating dtypes, on any device, the
        same list for everybody. They are only read, until this returns or raises.

        `out`: contiguous tensors of the same shapes and dtypes to be written, which saves allocating them; whatever
        the end, their contents are lost. `feedback`: what a sparse codec left out of earlier rounds, kept by the
        caller. Raises RoundFailed (NoQuorum, RoundExpired, Excluded, Behind, Diverged, Superseded): no result, and
        `tensors` are as they were; NonFinite for tensors that cannot be averaged. One call a round.
        """
        if self._used:
            raise LocalFault("a round reduces once; open another one")
        self._used = True
        return await self._run.reduce(self.tag, tensors, weight, self.deadline_s, out, feedback)


def new_nonce() -> int:
    """Names an attempt: never used before, also across restarts."""
    return secrets.randbits(NONCE_BITS)
