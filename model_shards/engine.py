"""Engine: sessions over one span, synchronous and called from one thread at a time.

run() takes steps of many sessions, passes them through the layers and returns activations or tokens. It keeps
each session's place and cache; it knows no network, no clock and no queue, and decides nothing about order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model_shards.attention import Batch, Rows
from model_shards.dtypes import is_finite
from model_shards.errors import ContextOverflow, LocalFault, StepError
from model_shards.exact import RowsExact
from model_shards.exchange import StateExchange
from model_shards.kv import BLOCK_TOKENS, KvCache, KvPool, SessionKv
from model_shards.lowrank import Adapter, Tuned
from model_shards.parking import ParkingLot
from model_shards.pooling import POOLS, Pooled
from model_shards.rope import LENGTH_DEPENDENT, RotaryTable
from model_shards.sampler import Pick, Said, pick
from model_shards.span import Span
from model_shards.state import layout_of
from model_shards.steps import Part, Step, StepResult, passes
from model_shards.windows import judge


@dataclass(slots=True)
class _Rows:
    """What became of a part's rows: ``hidden`` where layers remain, else ``logits`` of those that were asked for."""

    hidden: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embedding: torch.Tensor | None = None


def _scope(scope: str, start: int, end: int, adapter: str) -> str:
    return f"{start}:{end}:{len(adapter)}:{adapter}:{scope}"


def _never() -> None:
    return None


class Engine(StateExchange):
    """Serves sessions over ``span`` within ``kv_bytes_max`` bytes of KV cache.

    What is guaranteed of the numbers, given the same machine, dtype and torch thread count: a session's
    results depend only on its own steps and their shapes (how many positions each step holds), not on where
    the layers are cut into spans nor on which other sessions ran beside it. Running layers [0, 8) in one
    engine or in four gives the same bits. Every step is computed in its own shape; single-position steps of
    several sessions share one pass only in group sizes for which this machine's kernels were found to give
    each row the very bits it has alone (see `exact.py`). A prompt given in other pieces may differ in the
    last bits, as matrix kernels differ by shape. Adapters change neither the bits of sessions without one nor
    one another's.

    ``identity`` names the model's weights: only engines of one identity exchange session state. ``kv_quant``
    "int8" keeps keys and values in eight bits (see `kv_int8.py`): about half of bfloat16's bytes.
    """

    def __init__(
        self,
        span: Span,
        *,
        kv_bytes_max: int,
        parking: ParkingLot | None = None,
        identity: str = "",
        kv_quant: str = "none",
    ) -> None:
        config = span.config
        self.span = span
        self._lot = parking or ParkingLot(0)
        super().__init__(layout_of(config, span.dtype, identity, kv_quant))
        pool = KvPool(kv_bytes_max, *config.kv_shape, span.dtype, span.device, kv_quant)
        self._cache = KvCache(pool)
        self._rotary = [RotaryTable(rope, span.dtype, span.device) for rope in config.ropes]
        self._sessions: dict[str, SessionKv] = {}
        self._said: dict[str, Said] = {}
        self._guessed: dict[str, tuple[int, ...]] = {}
        self._pooled: dict[str, Pooled] = {}
        self._adapters: dict[str, Adapter] = {}
        self._tuned: dict[str, Adapter] = {}
        self._exact = RowsExact(span)
        # Such a scaling rotates a key by the length its sequence had then: no other session may take it over.
        self._sharing = not any(rope.kind in LENGTH_DEPENDENT for rope in config.ropes)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a session may take over what others of its scope computed."""
        return self._sharing

    @property
    def adapters(self) -> dict[str, int]:
        """Adapters that sessions may be opened with, by name, and how many open sessions have each."""
        names = [adapter.name for adapter in self._tuned.values()]
        return {name: names.count(name) for name in self._adapters}

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters held, those that are removed but still in use included."""
        held = {id(adapter): adapter for adapter in (*self._adapters.values(), *self._tuned.values())}
        return sum(adapter.nbytes for adapter in held.values())

    def add_adapter(self, adapter: Adapter) -> None:
        """From now on sessions may be opened with ``adapter``. Raises LocalFault for one of other layers or dtype."""
        span = self.span
        if adapter.start > span.start or adapter.end < span.end or adapter.dtype != span.dtype:
            found = f"[{adapter.start}, {adapter.end}) in {adapter.dtype}"
            raise LocalFault(
                f"adapter {adapter.name}: {found}, the span is [{span.start}, {span.end}) in {span.dtype}"
            )
        self._adapters[adapter.name] = adapter

    def remove_adapter(self, name: str) -> None:
        """No session may be opened with it any more; those that have it go on. An unknown one is no error."""
        self._adapters.pop(name, None)

    def open(
        self,
        session: str,
        start: int,
        end: int,
        tokens_max: int,
        *,
        prompt: Sequence[int] = (),
        reuse: int = 0,
        scope: str = "",
        adapter: str = "",
    ) -> None:
        """Admits ``session`` for layers [start, end) of the span and reserves KV for ``tokens_max``
        positions.

        ``prompt`` (optional) lets its positions be shared with sessions of the same ``scope`` that begin
        alike; ``reuse`` positions of it (see `cached`) are taken from the cache, and the first step starts
        there. Every stage of a request must reuse equally many. ``adapter`` (see `add_adapter`) changes the
        model for this session; what it computes is shared only with sessions of the same. Raises NoRoom where
        it does not fit now, ContextOverflow beyond the model's context, StepError for an open session, an
        unknown adapter or a reuse that is not cached, LocalFault for layers outside the span.
        """
        if session in self._sessions:
            raise StepError(session, "is open already")
        if adapter and adapter not in self._adapters:
            raise StepError(session, f"asks for adapter {adapter!r:.80}, which is not loaded")
        self._check_layers(start, end)
        if tokens_max < max(1, len(prompt)):
            raise StepError(session, f"tokens_max is {tokens_max}, expected at least {max(1, len(prompt))}")
        if tokens_max > self.span.config.context_tokens:
            raise ContextOverflow(self.span.config.context_tokens, tokens_max)
        self._check_tokens(session, prompt, 0)
        salted = _scope(scope, start, end, adapter)
        pages = self._cache.pages.match(salted, prompt) if reuse else []
        if reuse % BLOCK_TOKENS or not 0 <= reuse <= len(pages) * BLOCK_TOKENS:
            held = len(pages) * BLOCK_TOKENS
            raise StepError(
                session, f"cannot reuse {reuse} positions, {held} are cached in steps of {BLOCK_TOKENS}"
            )
        self._sessions[session] = SessionKv(
            self._cache,
            start,
            end,
            tokens_max,
            scope=salted,
            prompt=prompt if self._sharing else (),
            reuse=pages[: reuse // BLOCK_TOKENS],
            sharing=self._sharing,
        )
        self._said[session] = Said(list(prompt), len(prompt))
        if adapter:
            self._tuned[session] = self._adapters[adapter]

    def cached(
        self, start: int, end: int, prompt: Sequence[int], *, scope: str = "", adapter: str = ""
    ) -> int:
        """How many first positions of ``prompt`` are in the cache for layers [start, end): whole blocks, and
        never the last position. It holds until the next open()."""
        self._check_layers(start, end)
        return len(self._cache.pages.match(_scope(scope, start, end, adapter), prompt)) * BLOCK_TOKENS

    def close(self, session: str, tokens: Sequence[int] = ()) -> None:
        """Ends ``session`` and frees its KV; closing an unknown or closed one does nothing. ``tokens``, all
        of the session's, let a stage that saw only activations keep them for prompts that continue this
        text."""
        kv = self._sessions.pop(session, None)
        self._said.pop(session, None)
        self._pooled.pop(session, None)
        self._guessed.pop(session, None)
        self._arrivals.pop(session, None)
        self._tuned.pop(session, None)
        if kv is not None:
            if tokens and self._sharing and not kv.parked:
                kv.learn(tokens)
            kv.release(self._lot)

    def blocks_wanted(
        self,
        start: int,
        end: int,
        tokens_max: int,
        *,
        prompt: Sequence[int] = (),
        reuse: int = 0,
        scope: str = "",
        adapter: str = "",
    ) -> int:
        """How many free KV blocks an open() with these arguments would take now."""
        self._check_layers(start, end)
        pages = (
            self._cache.pages.match(_scope(scope, start, end, adapter), prompt)[: reuse // BLOCK_TOKENS]
            if reuse
            else []
        )
        own = (end - start) * (-(-tokens_max // BLOCK_TOKENS) - len(pages))
        return own + sum(len(page.blocks) for page in pages if page.refs == 0)

    def park(self, session: str) -> int:
        """Moves the session's KV out of the cache until unpark(); meanwhile it can only be closed. Returns how many
        free blocks it needs to come back. Raises StepError, or NoRoom where the parking lot has none."""
        kv = self._kv(session)
        kv.park(self._lot)
        return kv.blocks

    def unpark(self, session: str) -> None:
        """Brings a parked session back, bit for bit. Raises StepError, NoRoom (it stays parked) or OSError."""
        kv = self._sessions.get(session)
        if kv is None or not kv.parked:
            raise StepError(session, "is not parked")
        kv.unpark(self._lot)

    def rewind(self, session: str, position: int) -> None:
        """Forgets every position from ``position`` on, so that the next step may start there. Raises
        StepError, or NoRoom where shared positions had to be copied and cannot be."""
        kv = self._kv(session)
        if not 0 <= position <= kv.length:
            raise StepError(session, f"cannot rewind to {position}, it holds {kv.length} positions")
        kv.rewind(position)
        self._arrivals.pop(session, None)
        if position != self._pooled.get(session, Pooled()).count:
            self._pooled.pop(session, None)  # rows cannot be taken out of a sum again
        del self._said[session].tokens[position:]

    def recall(self, session: str, tokens: Sequence[int], prompt_tokens: int) -> None:
        """Tells the session's tokens so far, of which the first ``prompt_tokens`` are its prompt: penalties
        at a last stage that replaces another, or that was opened without its prompt, depend on them. Raises
        StepError."""
        self._kv(session)
        if not 0 <= prompt_tokens <= len(tokens):
            raise StepError(session, f"a prompt of {prompt_tokens} among {len(tokens)} tokens")
        self._check_tokens(session, tokens, -1)
        self._said[session] = Said(list(tokens), prompt_tokens)

    def position(self, session: str) -> int:
        """How many positions the session holds, which is where its next step must start: so many further on as that
        keeps rows of a window. Raises StepError."""
        return self._kv(session).length

    def check(self, step: Step) -> None:
        """Raises the StepError or ContextOverflow that run() would raise for this step, and changes
        nothing."""
        kv, count, config = self._kv(step.session), step.count, self.span.config
        if (step.tokens is None) == (step.hidden is None):
            raise StepError(step.session, "needs either tokens or hidden")
        if count < 1:
            raise StepError(step.session, "holds no positions")
        if step.session in self._arrivals:
            raise StepError(step.session, "has layers whose rows have still to come")
        last = kv.end == config.layers
        problem = step.kept_problem(kv.length, kv.loose) or step.window_problem(last=last)
        if problem:
            raise StepError(step.session, problem)
        if step.position + count > kv.tokens_max:
            raise ContextOverflow(kv.tokens_max, step.position + count)
        if step.sample is not None and any(token >= config.vocab for token, _ in step.sample.logit_bias):
            raise StepError(step.session, f"biases a token outside the vocabulary of {config.vocab}")
        if step.sample is not None and not last:
            raise StepError(
                step.session, f"asks to sample, but its layers end at {kv.end} of {config.layers}"
            )
        if step.pool is not None:
            self._check_pool(step, kv)
        if step.tokens is not None:
            if kv.start != 0:
                raise StepError(
                    step.session, f"has tokens, but its layers start at {kv.start}: hidden expected"
                )
            self._check_tokens(step.session, step.tokens, 0)
        elif step.hidden is not None:
            self._check_tokens(step.session, step.window.tokens if step.window is not None else (), 0)
            self._check_hidden(step.session, kv, step.hidden)

    def _check_pool(self, step: Step, kv: SessionKv) -> None:
        if step.pool not in POOLS:
            raise StepError(step.session, f"pool is {step.pool!r:.40}, expected one of {', '.join(POOLS)}")
        if kv.end != self.span.config.layers:
            raise StepError(
                step.session, f"asks to pool, but its layers end at {kv.end} of {self.span.config.layers}"
            )
        seen = self._pooled.get(step.session, Pooled()).count
        if step.pool == "mean" and seen != step.position:
            raise StepError(
                step.session,
                f"asks for the mean of all positions, but only {seen} of {step.position} were pooled",
            )

    def _check_tokens(self, session: str, tokens: Sequence[int], least: int) -> None:
        if tokens and (min(tokens) < least or max(tokens) >= self.span.config.vocab):
            raise StepError(session, f"has a token outside the vocabulary of {self.span.config.vocab}")

    def _check_hidden(self, session: str, kv: SessionKv, hidden: torch.Tensor) -> None:
        if kv.start == 0:
            raise StepError(session, "has hidden, but its layers start at 0: tokens expected")
        if hidden.dim() != 2 or hidden.shape[1] != self.span.config.hidden or hidden.dtype != self.span.dtype:
            found = f"{list(hidden.shape)} {hidden.dtype}"
            raise StepError(
                session, f"hidden is {found}, expected [n, {self.span.config.hidden}] {self.span.dtype}"
            )
        if not is_finite(hidden):
            raise StepError(session, "hidden has values that are not finite")

    @torch.inference_mode()
    def run(self, steps: Sequence[Step], check_cancelled: Callable[[], None] = _never) -> list[StepResult]:
        """Advances each step's session; results in the order of ``steps``. At most one step a session.

        ``check_cancelled`` is called before every layer; what it raises ends the call. Whatever is raised
        (StepError, ContextOverflow, or that), no session has moved but for what it kept of a window: the same
        steps may be run again.
        """
        self._check_all(steps)
        for step in steps:
            self._adopt(step)
        sums: dict[str, Pooled] = {}
        found: list[list[_Rows]] = [[] for _ in steps]
        for parts in passes(steps, self._layers_of, lambda rows: self._exact.largest(rows)):
            for part, rows in zip(parts, self._run_pass(parts, check_cancelled, sums), strict=True):
                found[part.at].append(rows)
        results = [self._result(step, rows) for step, rows in zip(steps, found, strict=True)]
        self._pooled.update(sums)
        for step, result in zip(steps, results, strict=True):
            self._advance(step, result)
        return results

    @torch.inference_mode()
    def logits(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        """Like run(), but gives each step's logits [n, vocab] float32. Only for sessions that end with the
        model."""
        self._check_all(steps)
        found = []
        for step in steps:
            part = Part(0, step, 0, step.count)
            found.append(self.span.logits(self._forward([part], _never), self._tuned_rows([part])))
        for step in steps:
            self._sessions[step.session].advance(step.count, step.tokens)
        return found

    @property
    def kv_blocks(self) -> int:
        """KV blocks in all; a block holds BLOCK_TOKENS positions of one layer."""
        return self._cache.pool.blocks

    @property
    def kv_blocks_free(self) -> int:
        """KV blocks that no session holds, cached or not."""
        return self._cache.free_blocks

    def kv_tokens_free(self) -> int:
        """How many more positions a session over the whole span could reserve now."""
        return self._cache.free_blocks // (self.span.end - self.span.start) * BLOCK_TOKENS

    def kv_bytes_used(self) -> int:
        """Bytes that sessions hold or have reserved; cached positions that nobody holds count as free."""
        return (self._cache.pool.blocks - self._cache.free_blocks) * self._cache.pool.block_bytes

    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def _check_layers(self, start: int, end: int) -> None:
        if not self.span.start <= start < end <= self.span.end:
            raise LocalFault(
                f"layers [{start}, {end}) are not within the span [{self.span.start}, {self.span.end})"
            )

    def _kv(self, session: str) -> SessionKv:
        kv = self._sessions.get(session)
        if kv is None:
            raise StepError(session, "is not open")
        if kv.parked:
            raise StepError(session, "is parked")
        return kv

    def _check_all(self, steps: Sequence[Step]) -> None:
        seen: set[str] = set()
        for step in steps:
            if step.session in seen:
                raise StepError(step.session, "has two steps in one run")
            seen.add(step.session)
            self.check(step)

    def _layers_of(self, step: Step) -> tuple[int, int]:
        kv = self._sessions[step.session]
        return kv.start, kv.end

    def _adopt(self, step: Step) -> None:
        """What the step keeps of its session's last window becomes positions."""
        kv = self._sessions[step.session]
        if not kv.loose:
            return
        guessed = self._guessed.pop(step.session, None)
        tokens = [guessed[row - 1] for row in step.kept] if guessed is not None else None
        if tokens is not None:
            self._said[step.session].tokens[kv.length :] = tokens
        kv.adopt(step.kept, tokens)

    def _run_pass(
        self, parts: list[Part], check_cancelled: Callable[[], None], sums: dict[str, Pooled]
    ) -> list[_Rows]:
        """What became of each part's rows; sums for later means go into ``sums``, to count once all is done."""
        hidden = self._forward(parts, check_cancelled)
        cut = torch.split(hidden, [part.count for part in parts])
        if self._sessions[parts[0].step.session].end < self.span.config.layers:
            return [_Rows(hidden=rows) for rows in cut]
        found = [
            _Rows(embedding=self._pool(part.step, rows, sums) if part.step.pool is not None else None)
            for part, rows in zip(parts, cut, strict=True)
        ]
        asked = [part.sampled() for part in parts]
        wanted = [rows[one.start : one.stop] for rows, one in zip(cut, asked, strict=True)]
        if any(asked):
            tuned = self._tuned_rows(parts, sampled=True)
            whole = all(len(one) == part.count for one, part in zip(asked, parts, strict=True))
            logits = self.span.logits(hidden if whole else torch.cat(wanted), tuned)
            for rows, scores in zip(found, torch.split(logits, [len(one) for one in asked]), strict=True):
                rows.logits = scores
        return found

    def _forward(self, parts: list[Part], check_cancelled: Callable[[], None]) -> torch.Tensor:
        """The rows [N, hidden] of ``parts`` (all over the same layers) after their last layer."""
        rows, offset = [], 0
        for part in parts:
            kv, base = self._sessions[part.step.session], part.step.position
            rows.append(Rows(kv, base + part.first, part.count, offset, base=base, branches=part.branches))
            offset += part.count
        places = [place for part in parts for place in part.places()]
        batch = Batch(rows, [self._turns(table, places) for table in self._rotary], self._tuned_rows(parts))
        hidden = self._enter(parts)
        kv = rows[0].kv
        for layer in self.span.layers[kv.start - self.span.start : kv.end - self.span.start]:
            check_cancelled()
            hidden = layer(hidden, batch)
        return hidden

    def _tuned_rows(self, parts: list[Part], *, sampled: bool = False) -> Tuned | None:
        """The adapters of the parts' rows, or of those that are sampled; None where there are none."""
        if not any(part.step.session in self._tuned for part in parts):
            return None
        counts = [len(part.sampled()) if sampled else part.count for part in parts]
        found = [
            self._tuned.get(part.step.session)
            for part, count in zip(parts, counts, strict=True)
            for _ in range(count)
        ]
        return Tuned(found, whole=not sampled and any(part.piece for part in parts))

    @staticmethod
    def _turns(table: RotaryTable, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(places) == 1:
            return table.rows(*places[0])
        found = [table.rows(*place) for place in places]
        return torch.cat([cos for cos, _ in found]), torch.cat([sin for _, sin in found])

    def _enter(self, parts: list[Part]) -> torch.Tensor:
        if parts[0].step.tokens is not None:
            tokens = [
                token
                for part in parts
                for token in (part.step.tokens or ())[part.first : part.first + part.count]
            ]
            return self.span.embed(torch.tensor(tokens, device=self.span.device))
        given = [
            part.step.hidden[part.first : part.first + part.count].to(self.span.device)
            for part in parts
            if part.step.hidden is not None
        ]
        return given[0] if len(given) == 1 else torch.cat(given)

    def _result(self, step: Step, parts: list[_Rows]) -> StepResult:
        """The result of a step from what became of its rows, part by part."""
        hidden = [part.hidden for part in parts if part.hidden is not None]
        if hidden:
            return StepResult(step.session, hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        result = StepResult(step.session, embedding=parts[-1].embedding)
        if step.sample is None:
            return result
        logits = [scores for part in parts if part.logits is not None for scores in part.logits]
        if step.window is None:
            found = self._choose(step, logits[0], step.position + step.count, ())
        else:
            verdict = judge(
                step.window,
                lambda row, before: self._choose(step, logits[row], step.position + 1 + len(before), before),
            )
            result.verdict, found = verdict, verdict.picks[-1]
        result.token, result.logprob, result.top_logprobs = found.token, found.logprob, found.top
        return result

    def _choose(self, step: Step, logits: torch.Tensor, position: int, before: Sequence[int]) -> Pick:
        """The token that stands at ``position``, after the step's certain positions and the tokens ``before``."""
        if not is_finite(logits):
            raise StepError(step.session, "its logits are not finite")
        if step.sample is None:
            raise LocalFault("only a step that samples has a token chosen")
        said = self._before(step, before) if step.sample.wants_history else None
        return pick(logits, step.sample, position, said)

    def _pool(self, step: Step, hidden: torch.Tensor, sums: dict[str, Pooled]) -> torch.Tensor:
        if step.pool == "last_hidden":
            rows = self.span.normed(hidden[-1:])
            if not is_finite(rows):
                raise StepError(step.session, "its embedding is not finite")
            return rows[0].float().cpu()
        pooled = self._pooled.get(step.session, Pooled()).with_rows(self.span.normed(hidden))
        sums[step.session] = pooled
        mean = pooled.mean()
        if not is_finite(mean):
            raise StepError(step.session, "its embedding is not finite")
        return mean

    def _before(self, step: Step, picked: Sequence[int]) -> Said:
        """What the session has said up to and including ``step``'s certain positions, and ``picked`` after them."""
        said, end = self._said[step.session], step.position + step.certain
        tokens = said.tokens[:end]
        if step.tokens is not None:
            tokens[step.position :] = step.tokens[: step.certain]
        # A stage that was never told the prompt takes what came before its first token for it.
        return Said([*tokens, *picked], said.prompt_tokens or end)

    def _advance(self, step: Step, result: StepResult) -> None:
        """The step is done: its positions count, and what is known of a window's guesses."""
        kv, verdict = self._sessions[step.session], result.verdict
        kv.advance(step.certain, step.tokens[: step.certain] if step.tokens is not None else None)
        sampled = [] if result.token is None else [result.token]
        if step.window is not None:
            kv.loose = step.count - 1
        if verdict is not None:
            sampled = [pick.token for pick in verdict.picks]
            kv.adopt(verdict.path, sampled[:-1] if step.tokens is not None else None)
        elif step.window is not None and step.tokens is not None:
            self._guessed[step.session] = step.tokens[1:]
        said, end = self._said[step.session], step.position + step.certain
        if step.tokens is not None:
            said.tokens[step.position : end] = step.tokens[: step.certain]
        if sampled:
            said.tokens.extend([-1] * (end - len(said.tokens)))
            said.prompt_tokens = said.prompt_tokens or end
            said.tokens[end:] = sampled
