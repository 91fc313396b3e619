"""Outer steps: what a worker gives to a round, and what it does with the mean. Torch alone: no clock, no files.

A `Strategy` is one page of choices (which parameters travel together and when, how a mean is merged); `Outer` keeps one
worker's part of it: the shared parameters and momenta, which are bit-identical at all members of an epoch, and what was
trained since. Whoever drives it opens the rounds:

    outer = Outer(DiLoCo(inner_steps=100), parameters)      # the worker's own tensors, which it writes in place
    ...one inner step...; outer.trained(tokens)
    for tag in outer.due():
        offer = outer.offer(tag)
        reduced = ...reduce(offer.tensors, offer.weight) in a round of `tag`...
        outer.take(tag, reduced.epoch, reduced.tensors, weight=mine)    # or outer.failed(tag), outer.withdraw(tag)

Nothing that was trained is lost: what a failed round did not count is part of the next offer.
"""

from collectives.outer.base import Offer, Outer, OuterError, Strategy
from collectives.outer.delayed import Delayed
from collectives.outer.diloco import DiLoCo
from collectives.outer.optimizers import AdamW, Nesterov, OuterOptimizer, Sgd
from collectives.outer.parallel import DataParallel
from collectives.outer.sparse import SparseLoCo
from collectives.outer.streaming import Streaming

__all__ = [
    "AdamW",
    "DataParallel",
    "Delayed",
    "DiLoCo",
    "Nesterov",
    "Offer",
    "Outer",
    "OuterError",
    "OuterOptimizer",
    "Sgd",
    "SparseLoCo",
    "Strategy",
    "Streaming",
]
