"""A whole run in one process: several workers, their strategies, codecs and reductions as in a mesh, but no links.

Means are made by `collectives.reduce.Exchange`, frame by frame, so that they have the bits that the mesh would give,
and bytes are those of its frames. Workers may die and be replaced. It measures what a strategy is worth; how rounds
fare when links and processes fail is for the tests of `collectives`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from collectives import Feedback
from collectives.agreement import Ballot, Declaration, Member
from collectives.codecs import codec
from collectives.outer import Outer
from collectives.reduce import Exchange, Layout
from node.train.corpus import LANES, Corpus
from node.train.model import TrainModel, make_model
from node.train.recipe import InnerRecipe, ModelRecipe, OuterRecipe
from node.train.worker import Worker, evaluate, strategy_of

EVALUATED_MAX = 4096


class Diverged(Exception):
    """Two replicas of one epoch are not the same, bit for bit."""


@dataclass(frozen=True, slots=True)
class Round:
    """A mean, as all members hold it, and the bytes of frames that each has sent."""

    mean: tuple[torch.Tensor, ...]
    bytes_sent: tuple[int, ...]


def reduce_together(
    given: Sequence[Sequence[torch.Tensor]],
    weights: Sequence[float],
    codec_name: str,
    feedbacks: Sequence[Feedback | None],
    number: int = 1,
) -> Round:
    """The weighted mean of the members' tensors through real exchanges. A member alone sends nothing."""
    members = tuple(
        Member(f"worker-{at}", 0, (number << 16) + at, weight) for at, weight in enumerate(weights)
    )
    seed = blake3(f"{number} {len(given)}".encode()).digest()
    declared = Declaration(
        "bench", "outer", number, Ballot(0, members[0].peer), members, codec_name, b"", seed
    )
    nodes = {
        member.peer: Exchange(member.peer, tensors, declared, feedback=feedback)
        for member, tensors, feedback in zip(members, given, feedbacks, strict=True)
    }
    sent = dict.fromkeys(nodes, 0)
    moved = True
    while moved:
        moved = False
        for name, node in nodes.items():
            for peer in node.peers:
                if not nodes[peer].wants_frames(name) or (frame := node.next_frame(peer)) is None:
                    continue
                moved = True
                buffer = nodes[peer].buffer_for(name, frame.header, frame.payload_bytes)
                buffer[:] = b"".join(frame.payload)
                nodes[peer].arrived(name, frame.header, buffer)
                sent[name] += len(frame.header) + frame.payload_bytes
    if len({node.digest for node in nodes.values()}) != 1:
        raise Diverged(f"round {number}: the members' means differ")
    means = [node.result.tensors for node in nodes.values()]
    for tensors, feedback in zip(given, feedbacks, strict=True):
        if feedback is not None:
            feedback.commit(tensors, codec(codec_name))
    return Round(tuple(means[0]), tuple(sent.values()))


@dataclass(frozen=True, slots=True)
class Death:
    """Worker `index` is killed after nominal step `step`, and replaced by one that knows nothing `away` steps later."""

    step: int
    index: int
    away: int = 0


def deaths(workers: int, steps: int, share: float, seed: int) -> tuple[Death, ...]:
    """`share` of the workers, rounded up, each killed once in the run's middle four fifths."""
    chance = random.Random(seed)
    chosen = chance.sample(range(workers), min(workers - 1, -(-int(workers * share * 1000) // 1000)))
    return tuple(Death(chance.randint(steps // 10, steps * 9 // 10), index) for index in chosen)


@dataclass(slots=True)
class Place:
    """One worker's place; after its death a replacement comes at the nominal step `back_at`."""

    worker: Worker
    outer: Outer
    feedback: dict[str, Feedback] = field(default_factory=dict)
    bytes_sent: int = 0
    alive: bool = True
    back_at: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all arms of a comparison share."""

    corpus: Corpus
    model: ModelRecipe
    inner: InnerRecipe
    workers: int


class World:
    """The workers of one run. `run` goes on by nominal inner steps; `figures` tells what came out."""

    def __init__(self, setting: Setting, outer: OuterRecipe, killed: Sequence[Death] = ()) -> None:
        self.setting = setting
        self.recipe = outer
        self.killed = {death.step: death for death in killed}
        self.claims = 0
        self.rounds = 0
        self.lost_tokens = 0.0
        self.tokens = 0.0
        self.compute_s = 0.0
        self.places = [self._newcomer() for _ in range(setting.workers)]

    def _newcomer(self) -> Place:
        setting, claim = self.setting, self.claims
        self.claims += 1
        model = _model(setting)
        worker = Worker(model, setting.corpus, setting.inner, claim)
        return Place(worker, worker.outer(self.recipe))

    def run(self) -> Iterator[int]:
        """Yields each nominal step when it is done; the last one after the closing rounds."""
        steps = self.setting.inner.steps
        for step in range(1, steps + 1):
            for place in self.places:
                if place.alive:
                    self._train(place)
            if step in self.killed:
                self._kill(self.killed[step], step)
            self._return(step)
            self._rounds(last=False)
            if step == steps:
                self._rounds(last=True)
            yield step

    def _train(self, place: Place) -> None:
        report = place.worker.step(place.outer.clock)
        place.outer.trained(report.tokens)
        self.tokens += report.tokens
        self.compute_s += report.took_s

    def _kill(self, death: Death, step: int) -> None:
        """What it trained and had not told is lost, and so is its optimizer state."""
        place = self.places[death.index]
        self.lost_tokens += max(place.outer.untold(tag) for tag in place.outer.tags)
        place.alive, place.back_at = False, step + death.away

    def _return(self, step: int) -> None:
        for index, place in enumerate(self.places):
            if not place.alive and place.back_at <= step:
                fresh = self._newcomer()
                fresh.bytes_sent = place.bytes_sent
                helper = next(one.outer for one in self.places if one.alive)
                for tag in helper.tags:
                    state = {name: value.clone() for name, value in helper.state(tag).items()}
                    fresh.outer.load(tag, state, helper.epoch(tag), keep=False, clock=helper.clock)
                self.places[index] = fresh

    def _rounds(self, last: bool) -> None:
        alive = [place for place in self.places if place.alive]
        for tag in alive[0].outer.tags:
            members = [place for place in alive if tag in place.outer.due(last=last)]
            if members:
                self._round(tag, members, alive)

    def _round(self, tag: str, members: list[Place], alive: list[Place]) -> None:
        strategy = members[0].outer.strategy
        offers = [place.outer.offer(tag) for place in members]
        if strategy.feedback:
            for place, offer in zip(members, offers, strict=True):
                place.feedback.setdefault(tag, Feedback(Layout.of(offer.tensors)))
        self.rounds += 1
        found = reduce_together(
            [offer.tensors for offer in offers],
            [offer.weight for offer in offers],
            strategy.codec,
            [place.feedback.get(tag) for place in members],
            self.rounds,
        )
        for place, offer, count in zip(members, offers, found.bytes_sent, strict=True):
            place.bytes_sent += count
            place.outer.take(tag, offer.epoch + 1, found.mean, offer.weight)
        for place in alive:
            if place not in members:
                place.outer.take(tag, offers[0].epoch + 1, found.mean, None)
        check_replicas([place.outer for place in alive], tag)

    def loss(self) -> float:
        """Of the shared parameters, on the held-out share."""
        return shared_loss(self.setting, self.places[0].outer)

    def figures(self) -> dict[str, Any]:
        return {
            "val_loss": self.loss(),
            "bytes_per_worker": int(sum(place.bytes_sent for place in self.places) / len(self.places)),
            "rounds": self.rounds,
            "tokens": int(self.tokens),
            "tokens_lost_with_the_dead": int(self.lost_tokens),
            "compute_s": self.compute_s,
        }


class Parallel:
    """Synchronous data parallel training of as many workers. Their mean gradient is made in one pass over the samples
    of all, which is the same number; bytes are those of one real exchange, times the steps."""

    def __init__(self, setting: Setting, outer: OuterRecipe) -> None:
        self.setting = setting
        self.recipe = replace(outer, strategy="data-parallel", inner_steps=1, codec="fp32")
        together = _Together(setting.corpus, setting.workers)
        self.worker = Worker(_model(setting), together, setting.inner, 0)  # type: ignore[arg-type]
        self.outer = self.worker.outer(self.recipe)
        self.tokens = 0.0
        self.compute_s = 0.0

    def run(self) -> Iterator[int]:
        tag = self.outer.tags[0]
        for step in range(1, self.setting.inner.steps + 1):
            report, gradients = self.worker.gradient_step(self.outer.names(tag))
            self.outer.trained(report.tokens)
            offer = self.outer.offer(tag, gradients)
            self.outer.take(tag, step, offer.tensors, offer.weight)
            self.tokens += report.tokens
            self.compute_s += report.took_s
            yield step

    def figures(self) -> dict[str, Any]:
        steps = self.setting.inner.steps
        return {
            "val_loss": shared_loss(self.setting, self.outer),
            "bytes_per_worker": bytes_a_round(self.worker.model.named, self.setting.workers, "fp32") * steps,
            "rounds": steps,
            "tokens": int(self.tokens),
            "compute_s": self.compute_s,
        }


class _Together:
    """The batches of several claims as one."""

    def __init__(self, corpus: Corpus, workers: int) -> None:
        self.corpus, self.workers = corpus, workers

    def batch(self, seed: int, claim: int, index: int, rows: int) -> torch.Tensor:
        return torch.cat([self.corpus.batch(seed, one, index, rows) for one in range(self.workers)])


def _model(setting: Setting) -> TrainModel:
    inner = setting.inner
    return make_model(
        setting.model,
        setting.corpus.vocab,
        setting.corpus.end_id,
        seed=inner.seed,
        precision=inner.precision,
        recompute=inner.recompute,
        compiled=inner.compile,
    )


def shared_loss(setting: Setting, outer: Outer) -> float:
    """Of the parameters that all hold."""
    model = _model(setting)
    for tag in outer.tags:
        state = outer.state(tag)
        for name in outer.names(tag):
            model.named[name].copy_(state[name])
    return evaluate(model, setting.corpus.windows_held_out(EVALUATED_MAX))


def bytes_a_round(params: Mapping[str, torch.Tensor], workers: int, codec_name: str) -> int:
    """Bytes that a worker sends to have `params` reduced once, frame headers included, on the average. The values sent
    are noise, which matters for sparse codecs alone."""
    noise = torch.Generator().manual_seed(0)
    tensors = [torch.empty_like(one).normal_(generator=noise) for one in params.values()]
    found = reduce_together([tensors] * workers, [1.0] * workers, codec_name, [None] * workers)
    return sum(found.bytes_sent) // workers


def check_replicas(outers: Sequence[Outer], tag: str) -> None:
    """Raises Diverged unless all hold the same bits of what belongs to `tag`."""
    first = outers[0].state(tag)
    for other in outers[1:]:
        state = other.state(tag)
        if other.epoch(tag) != outers[0].epoch(tag) or any(
            not torch.equal(value, state[name]) for name, value in first.items()
        ):
            raise Diverged(f"{tag}: replicas differ at epoch {other.epoch(tag)}")


def fragments_of(
    model: ModelRecipe, inner: InnerRecipe, outer: OuterRecipe, workers: int, vocab: int = 8192
) -> tuple[dict[str, int], dict[str, int], int]:
    """What a round of each fragment costs a worker in bytes, at which step each begins, and the strategy's delay."""
    params = make_model(model, vocab, seed=inner.seed).named
    made = Outer(strategy_of(outer, inner), params)
    sizes = {
        tag: bytes_a_round({name: params[name] for name in made.names(tag)}, workers, made.strategy.codec)
        for tag in made.tags
    }
    phases = {tag: made.strategy.phase(index, len(made.tags)) for index, tag in enumerate(made.tags)}
    return sizes, phases, made.strategy.delay


def step_time(
    model: ModelRecipe, inner: InnerRecipe, sequence: int, vocab: int = 8192, steps: int = 3
) -> tuple[float, int]:
    """The fastest of some inner steps on random tokens, in seconds, and the model's parameters."""
    tokens = np.random.default_rng(0).integers(0, vocab, (LANES + 2) * sequence * inner.batch)
    corpus = Corpus(tokens, tokens[:0], vocab, None, "", sequence)
    worker = Worker(make_model(model, vocab, precision=inner.precision), corpus, inner, 0)
    return min(worker.step(0.0).took_s for _ in range(steps)), worker.model.count
