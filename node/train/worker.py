"""The inner loop of one worker, driven step by step: it draws samples, trains, and keeps its own optimizer state.

    worker = Worker(model, corpus, recipe.inner, claim=3)
    outer = worker.outer(recipe.outer)             # collectives.outer.Outer over the model's own tensors
    report = worker.step(outer.clock)              # one inner step; report.tokens, .loss, .took_s
    outer.trained(report.tokens, worker.nominal(report, recipe.outer))

The shell runs it in a thread of its own, and lets means be merged into the model's tensors only between two steps. It
knows nothing of rounds or peers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from collectives.outer import (
    AdamW,
    DataParallel,
    Delayed,
    DiLoCo,
    Nesterov,
    Outer,
    OuterOptimizer,
    Sgd,
    SparseLoCo,
    Strategy,
    Streaming,
)
from node.train.corpus import Corpus
from node.train.model import TrainModel
from node.train.recipe import InnerRecipe, OuterRecipe

OWN = "inner."


@dataclass(frozen=True, slots=True)
class StepReport:
    """One inner step: `tokens` predicted, mean `loss` in nats a token, `norm` of the gradient before clipping."""

    tokens: int
    loss: float
    norm: float
    took_s: float


class Worker:
    """`claim` names its lane of the corpus and is nobody else's (see corpus.py); `drawn` counts its batches."""

    def __init__(self, model: TrainModel, corpus: Corpus, recipe: InnerRecipe, claim: int) -> None:
        self.model = model
        self.corpus = corpus
        self.recipe = recipe
        self.claim = claim
        self.drawn = 0
        self.steps = 0
        self._parameters = list(model.params.values())
        self._optimizers = _optimizers(model, recipe)

    def outer(self, recipe: OuterRecipe) -> Outer:
        """This worker's part of the run's strategy."""
        return Outer(strategy_of(recipe, self.recipe), self.model.named)

    def nominal(self, report: StepReport, recipe: OuterRecipe) -> float:
        """Nominal inner steps that a step was: one, or its share of the round's time budget."""
        return 1.0 if recipe.budget_s is None else report.took_s / recipe.budget_s * recipe.inner_steps

    def step(self, clock: float) -> StepReport:
        """One inner step; the learning rate is that of `clock` nominal inner steps."""
        began_s = time.perf_counter()
        tokens, loss, norm = self._backward()
        share = self.recipe.rate(clock)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
        self._forget()
        self.steps += 1
        return StepReport(tokens, loss, norm, time.perf_counter() - began_s)

    def gradient_step(self, names: tuple[str, ...]) -> tuple[StepReport, list[torch.Tensor]]:
        """Mean gradients of one step in the order of `names`, unclipped, for strategies that reduce these; nothing is
        changed."""
        began_s = time.perf_counter()
        tokens, loss, norm = self._backward(clip=False)
        grads = [grad.clone() for grad in self.model.gradients(names)]
        self._forget()
        self.steps += 1
        return StepReport(tokens, loss, norm, time.perf_counter() - began_s), grads

    def _backward(self, clip: bool = True) -> tuple[int, float, float]:
        """Gradients of `accumulate` batches, averaged."""
        recipe, total, tokens = self.recipe, 0.0, 0
        for _ in range(recipe.accumulate):
            batch = self.corpus.batch(recipe.seed, self.claim, self.drawn, recipe.batch)
            self.drawn += 1
            loss = self.model.loss(batch)
            (loss if recipe.accumulate == 1 else loss / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / recipe.accumulate
            tokens += batch.shape[0] * (batch.shape[1] - 1)
        norm = 0.0
        if clip and recipe.clip > 0:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, recipe.clip, foreach=True).item()
        return tokens, total, norm

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def evaluate(self, windows: torch.Tensor, rows: int = 32) -> float:
        """Mean loss over windows int64 [n, sequence + 1], in nats a token; nan if there are none."""
        return evaluate(self.model, windows, rows)

    def delta(self, outer: Outer) -> dict[str, torch.Tensor]:
        """What this worker would give now, by name: anchor - local. A copy."""
        found: dict[str, torch.Tensor] = {}
        for tag in outer.tags:
            state = outer.state(tag)
            found |= {name: state[name] - self.model.named[name] for name in outer.names(tag)}
        return found

    # ---- what it keeps through churn

    def own_state(self) -> dict[str, torch.Tensor]:
        """The inner optimizer's state and the position in the data, for a later start; copies, on the CPU."""
        found = {OWN + "drawn": torch.tensor(self.drawn), OWN + "steps": torch.tensor(self.steps)}
        found[OWN + "claim"] = torch.tensor(self.claim)
        for number, optimizer in enumerate(self._optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for slot, value in state.items():
                    found[f"{OWN}{number}.{key}.{slot}"] = torch.as_tensor(value).detach().clone()
        return found

    def load_own_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on with what `own_state` gave, under the same recipe. Raises ValueError where shapes differ, and then
        nothing has changed."""
        loaded: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self._optimizers]
        for name, value in state.items():
            parts = name.removeprefix(OWN).split(".")
            if name.startswith(OWN) and len(parts) == 3:
                number, key = int(parts[0]), int(parts[1])
                if number >= len(loaded):
                    raise ValueError(f"{name} belongs to an optimizer that this run does not have")
                loaded[number].setdefault(key, {})[parts[2]] = value
        for optimizer, found in zip(self._optimizers, loaded, strict=True):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            for key, slots in found.items():
                wrong = key >= len(parameters) or any(
                    value.dim() > 0 and value.shape != parameters[key].shape for value in slots.values()
                )
                if wrong:
                    raise ValueError(
                        f"the optimizer state of parameter {key} has another shape than the parameter"
                    )
        for optimizer, found in zip(self._optimizers, loaded, strict=True):
            whole = optimizer.state_dict()
            whole["state"] = {
                key: {slot: value.clone() for slot, value in slots.items()} for key, slots in found.items()
            }
            optimizer.load_state_dict(whole)
        self.drawn, self.steps = int(state[OWN + "drawn"]), int(state[OWN + "steps"])
        self.claim = int(state[OWN + "claim"])


@torch.no_grad()
def evaluate(model: TrainModel, windows: torch.Tensor, rows: int = 32) -> float:
    """Mean loss over windows int64 [n, sequence + 1], `rows` at a time, in nats a token; nan if there are none."""
    losses = [model.plain_loss(part).item() * len(part) for part in torch.split(windows, rows)]
    return sum(losses) / len(windows) if len(windows) else float("nan")


def strategy_of(outer: OuterRecipe, inner: InnerRecipe) -> Strategy:
    """The strategy that the recipe names, with its own settings where the recipe has none."""
    if outer.strategy == "data-parallel":
        adam = AdamW(inner.lr, inner.betas, 1e-8, inner.weight_decay, inner.clip, inner.rate)
        return DataParallel(adam, outer.codec)
    made: Streaming | Delayed | SparseLoCo | DiLoCo
    match outer.strategy:
        case "streaming":
            made = Streaming(outer.inner_steps, outer.fragments, outer.delay, outer.alpha, codec=outer.codec)
        case "delayed":
            made = Delayed(outer.inner_steps, codec=outer.codec)
        case "sparseloco":
            made = SparseLoCo(outer.inner_steps, codec=outer.codec)
        case _:
            made = DiLoCo(outer.inner_steps, codec=outer.codec)
    return replace(made, optimizer=_changed(made.optimizer, outer.lr, outer.momentum))


def _changed(given: OuterOptimizer, lr: float | None, momentum: float | None) -> OuterOptimizer:
    lr = lr if lr is not None else getattr(given, "lr", 1.0)
    momentum = momentum if momentum is not None else getattr(given, "momentum", 0.0)
    return Nesterov(lr, momentum) if momentum > 0 else Sgd(lr)


def _optimizers(model: TrainModel, recipe: InnerRecipe) -> list[torch.optim.Optimizer]:
    """AdamW, matrices decaying; or Muon (Jordan 2024) for the layers' matrices and AdamW for the rest."""
    matrices = {part: one for part, one in model.params.items() if one.dim() == 2}
    inside = {part: one for part, one in matrices.items() if part not in ("embed", "head")}
    by_muon = inside if recipe.optimizer == "muon" else {}
    decaying = [one for part, one in matrices.items() if part not in by_muon]
    others = [one for part, one in model.params.items() if part not in matrices]
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay, "peak_lr": recipe.lr},
        {"params": others, "weight_decay": 0.0, "peak_lr": recipe.lr},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    if not by_muon:
        return [adam]
    muon = torch.optim.Muon(
        [{"params": list(by_muon.values()), "peak_lr": recipe.matrix_lr}],
        lr=recipe.matrix_lr,
        weight_decay=recipe.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adam, muon]
