"""Outer optimizers: one step on shared parameters from a mean pseudo-gradient (or gradient), in place, float32.

Every product and every sum is rounded by itself: with fused multiply-adds, which some processors have and some have
not, replicas on different machines would part in the last bit. It knows nothing of fragments or rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = Sequence[torch.Tensor]


class OuterOptimizer(Protocol):
    """`slots` names what it keeps beside each parameter, zeros of its shape at first."""

    @property
    def slots(self) -> tuple[str, ...]: ...

    def step(self, params: Tensors, slots: Mapping[str, Tensors], mean: Tensors, epoch: int) -> None:
        """Moves `params` against `mean`, all float32 and of the same shapes. `epoch` counts from 1."""
        ...


@dataclass(frozen=True, slots=True)
class Sgd:
    """params -= lr * mean."""

    lr: float = 1.0
    slots: tuple[str, ...] = ()

    def step(self, params: Tensors, slots: Mapping[str, Tensors], mean: Tensors, epoch: int) -> None:
        torch._foreach_sub_(list(params), torch._foreach_mul(list(mean), self.lr))


@dataclass(frozen=True, slots=True)
class Nesterov:
    """SGD with Nesterov momentum (Sutskever et al. 2013, as torch.optim.SGD has it), DiLoCo's outer optimizer
    (arXiv 2311.08105): b = momentum * b + mean; params -= lr * (mean + momentum * b)."""

    lr: float = 0.7
    momentum: float = 0.9
    slots: tuple[str, ...] = ("momentum",)

    def step(self, params: Tensors, slots: Mapping[str, Tensors], mean: Tensors, epoch: int) -> None:
        velocity = list(slots["momentum"])
        torch._foreach_mul_(velocity, self.momentum)
        torch._foreach_add_(velocity, list(mean))
        ahead = torch._foreach_mul(velocity, self.momentum)
        torch._foreach_add_(ahead, list(mean))
        torch._foreach_mul_(ahead, self.lr)
        torch._foreach_sub_(list(params), ahead)


@dataclass(frozen=True, slots=True)
class AdamW:
    """AdamW (arXiv 1711.05101) on mean gradients, for data parallel training. `rate(step)` multiplies `lr`; matrices
    decay, vectors do not; the gradient's norm is clipped at `clip` (0: not)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    rate: Callable[[int], float] = lambda step: 1.0
    slots: tuple[str, ...] = ("first", "second")

    def step(self, params: Tensors, slots: Mapping[str, Tensors], mean: Tensors, epoch: int) -> None:
        grads = [one.clone() for one in mean]
        if self.clip > 0:
            # In float64 and summed in order: the same scale everywhere.
            norm = sum(float(one.double().square().sum()) for one in grads) ** 0.5
            if norm > self.clip:
                torch._foreach_mul_(grads, self.clip / norm)
        lr = self.lr * self.rate(epoch - 1)
        first, second = list(slots["first"]), list(slots["second"])
        one_less, two_less = 1 - self.betas[0], 1 - self.betas[1]
        torch._foreach_mul_(first, self.betas[0])
        torch._foreach_add_(first, torch._foreach_mul(grads, one_less))
        torch._foreach_mul_(second, self.betas[1])
        torch._foreach_add_(second, torch._foreach_mul(torch._foreach_mul(grads, grads), two_less))
        size = torch._foreach_sqrt(second)
        torch._foreach_div_(size, (1 - self.betas[1] ** epoch) ** 0.5)
        torch._foreach_add_(size, self.eps)
        move = torch._foreach_div(first, size)
        torch._foreach_mul_(move, lr / (1 - self.betas[0] ** epoch))
        decayed = [one for one in params if one.dim() > 1]
        if self.weight_decay and decayed:
            torch._foreach_mul_(decayed, 1 - lr * self.weight_decay)
        torch._foreach_sub_(list(params), move)
