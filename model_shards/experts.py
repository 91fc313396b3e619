"""Mixtures of experts: which of them a token goes to, and the sum of what they say.

Rows of one expert are computed together, experts in order (arXiv 2101.03961). Knows nothing of attention,
sessions or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from model_shards.families.base import Routing
from model_shards.linear import AnyLinear, Linear
from model_shards.lowrank import Tuned


class FeedForward(Protocol):
    """[n, hidden] -> [n, hidden]."""

    def __call__(self, x: torch.Tensor, tuned: Tuned | None = None) -> torch.Tensor: ...

    def linears(self) -> tuple[AnyLinear, ...]: ...


class Router:
    """The ``top`` experts of every row and their weights. ``gate`` [experts, hidden] computes in its own
    dtype; ``correction`` [experts] float32 changes the choice, not the weights (arXiv 2408.15664)."""

    def __init__(
        self,
        gate: Linear,
        top: int,
        routing: Routing,
        sum_to_one: bool,
        correction: torch.Tensor | None = None,
    ) -> None:
        self.gate = gate
        self.top = top
        self.routing = routing
        self.sum_to_one = sum_to_one
        self.correction = correction

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [n, hidden] -> weights [n, top] float32, experts [n, top]."""
        scores = self.gate(x.to(self.gate.weight.dtype)).float()
        if self.routing.kind == "softmax_of_top":
            highest, chosen = torch.topk(scores, self.top, -1)
            return torch.softmax(highest, -1) * self.routing.scale, chosen
        if self.routing.kind == "sigmoid":
            scores = torch.sigmoid(scores)
            choice = scores if self.correction is None else scores + self.correction
            chosen = torch.topk(self._of_best_groups(choice, 2, -torch.inf), self.top, -1).indices
        else:
            scores = torch.softmax(scores, -1)
            chosen = torch.topk(self._of_best_groups(scores, 1, 0.0), self.top, -1).indices
        weights = scores.gather(-1, chosen)
        if self.sum_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.routing.scale, chosen

    def _of_best_groups(self, scores: torch.Tensor, judged_by: int, excluded: float) -> torch.Tensor:
        """``scores`` with all but the best groups' ``excluded``; a group is worth the sum of its ``judged_by``
        best experts."""
        groups = self.routing.groups
        if groups == 1:
            return scores
        apart = scores.view(len(scores), groups, -1)
        worth = apart.topk(judged_by, -1).values.sum(-1)
        best = torch.zeros_like(worth, dtype=torch.bool)
        best.scatter_(-1, worth.topk(self.routing.groups_used, -1).indices, True)
        return apart.masked_fill(~best.unsqueeze(-1), excluded).flatten(-2)


class Experts:
    """The routed experts' weighted sum, plus ``shared``, which every row takes."""

    def __init__(
        self, router: Router, experts: Sequence[FeedForward], shared: FeedForward | None = None
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared

    def __call__(self, x: torch.Tensor, tuned: Tuned | None = None) -> torch.Tensor:
        weights, chosen = self.router(x)
        weights = weights.to(x.dtype)
        mixed = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.where(chosen == expert)
            own = None if tuned is None else tuned.of(rows.tolist()).under(f"experts.{expert}.")
            mixed.index_add_(0, rows, self.experts[expert](x[rows], own) * weights[rows, place, None])
        if self.shared is None:
            return mixed
        return mixed + self.shared(x, None if tuned is None else tuned.under("shared."))

    def linears(self) -> tuple[AnyLinear, ...]:
        shared = self.shared.linears() if self.shared is not None else ()
        routed = (linear for expert in self.experts for linear in expert.linears())
        return self.router.gate, *shared, *routed
