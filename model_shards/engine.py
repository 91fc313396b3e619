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
from model_shards.sampler import Said, Sampling, pick
from model_shards.span import Span
from model_shards.state import layout_of

GROUP_ROWS_MAX = 32


@dataclass(slots=True)
class Step:
    """``n`` consecutive positions of one session, from ``position`` on. Exactly one of ``tokens`` (where the
    session starts at layer 0) and ``hidden`` ([n, hidden], compute dtype) is given. ``sample`` asks the last
    stage for the token that follows the step's last position. ``pool`` asks it for the embedding of the text up
    to there: "last_hidden" (of the last position) or "mean" (of all, so every step of the session must ask)."""

    session: str
    position: int
    tokens: tuple[int, ...] | None = None
    hidden: torch.Tensor | None = None
    sample: Sampling | None = None
    pool: str | None = None

    @property
    def count(self) -> int:
        """How many positions the step holds."""
        if self.tokens is not None:
            return len(self.tokens)
        return self.hidden.shape[0] if self.hidden is not None else 0


@dataclass(slots=True)
class StepResult:
    """``hidden`` [n, hidden] in the compute dtype where layers remain; at the last stage ``token`` and its
    ``logprob`` (natural, the model's own) where the step asked to sample, ``embedding`` [hidden] float32 on the
    CPU (after the final norm, not scaled to unit length) where it asked to pool."""

    session: str
    hidden: torch.Tensor | None = None
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
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

    ``identity`` names the model's weights: only engines of one identity exchange session state.
    """

    def __init__(
        self, span: Span, *, kv_bytes_max: int, parking: ParkingLot | None = None, identity: str = ""
    ) -> None:
        config = span.config
        self.span = span
        self._lot = parking or ParkingLot(0)
        super().__init__(layout_of(config, span.dtype, identity))
        pool = KvPool(kv_bytes_max, *config.kv_shape, span.dtype, span.device)
        self._cache = KvCache(pool)
        self._rotary = [RotaryTable(rope, span.dtype, span.device) for rope in config.ropes]
        self._sessions: dict[str, SessionKv] = {}
        self._said: dict[str, Said] = {}
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
        """How many positions the session holds, which is where its next step must start. Raises StepError."""
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
        if step.position != kv.length:
            raise StepError(step.session, f"step at position {step.position}, expected {kv.length}")
        if step.position + count > kv.tokens_max:
            raise ContextOverflow(kv.tokens_max, step.position + count)
        if step.sample is not None and any(token >= config.vocab for token, _ in step.sample.logit_bias):
            raise StepError(step.session, f"biases a token outside the vocabulary of {config.vocab}")
        if step.sample is not None and kv.end != config.layers:
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
        (StepError, ContextOverflow, or that), no session has moved: the same steps may be run again.
        """
        self._check_all(steps)
        results: list[StepResult | None] = [None] * len(steps)
        sums: dict[str, Pooled] = {}
        for group in self._groups(steps):
            chosen = [steps[at] for at in group]
            for at, result in zip(group, self._run_group(chosen, check_cancelled, sums), strict=True):
                results[at] = result
        for step in steps:
            self._sessions[step.session].advance(step.count, step.tokens)
        self._pooled.update(sums)
        for step, done in zip(steps, results, strict=True):
            self._remember(step, done.token if done is not None else None)
        return [result for result in results if result is not None]

    @torch.inference_mode()
    def logits(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        """Like run(), but gives each step's logits [n, vocab] float32. Only for sessions that end with the
        model."""
        self._check_all(steps)
        found = [
            self.span.logits(self._forward([step], _never), self._tuned_rows([step], whole=step.count > 1))
            for step in steps
        ]
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

    def _groups(self, steps: Sequence[Step]) -> list[list[int]]:
        """Indices of steps that share a pass: prompts alone, single positions of equal layers together."""
        groups: list[list[int]] = []
        singles: dict[tuple[int, int], list[int]] = {}
        for at, step in enumerate(steps):
            kv = self._sessions[step.session]
            if step.count == 1:
                singles.setdefault((kv.start, kv.end), []).append(at)
            else:
                groups.append([at])
        for together in singles.values():
            while together:
                size = self._exact.largest(min(len(together), GROUP_ROWS_MAX))
                groups.append(together[:size])
                together = together[size:]
        return groups

    def _run_group(
        self, steps: list[Step], check_cancelled: Callable[[], None], sums: dict[str, Pooled]
    ) -> list[StepResult]:
        """Results of ``steps``; sums for later means go into ``sums``, to count once all is done."""
        hidden = self._forward(steps, check_cancelled)
        if self._sessions[steps[0].session].end == self.span.config.layers:
            results, row = self._sample(steps, hidden), 0
            for step, result in zip(steps, results, strict=True):
                if step.pool is not None:
                    result.embedding = self._pool(step, hidden[row : row + step.count], sums)
                row += step.count
            return results
        if len(steps) == 1:
            return [StepResult(steps[0].session, hidden)]
        return [StepResult(step.session, hidden[at : at + 1]) for at, step in enumerate(steps)]

    def _forward(self, steps: list[Step], check_cancelled: Callable[[], None]) -> torch.Tensor:
        """The rows [N, hidden] of ``steps`` (all over the same layers) after their last layer."""
        rows, offset = [], 0
        for step in steps:
            rows.append(Rows(self._sessions[step.session], step.position, step.count, offset))
            offset += step.count
        tuned = self._tuned_rows(steps, whole=len(steps) == 1 and steps[0].count > 1)
        batch = Batch(rows, [self._turns(table, rows) for table in self._rotary], tuned)
        hidden = self._enter(steps)
        kv = rows[0].kv
        for layer in self.span.layers[kv.start - self.span.start : kv.end - self.span.start]:
            check_cancelled()
            hidden = layer(hidden, batch)
        return hidden

    def _tuned_rows(self, steps: list[Step], *, whole: bool) -> Tuned | None:
        """The adapters of the steps' rows, None where there are none."""
        if not any(step.session in self._tuned for step in steps):
            return None
        found = [self._tuned.get(step.session) for step in steps for _ in range(step.count)]
        return Tuned(found, whole)

    @staticmethod
    def _turns(table: RotaryTable, rows: list[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(rows) == 1:
            return table.rows(rows[0].position, rows[0].count)
        found = [table.rows(part.position, part.count) for part in rows]
        return torch.cat([cos for cos, _ in found]), torch.cat([sin for _, sin in found])

    def _enter(self, steps: list[Step]) -> torch.Tensor:
        if steps[0].tokens is not None:
            tokens = [token for step in steps for token in step.tokens or ()]
            return self.span.embed(torch.tensor(tokens, device=self.span.device))
        given = [step.hidden.to(self.span.device) for step in steps if step.hidden is not None]
        return given[0] if len(given) == 1 else torch.cat(given)

    def _sample(self, steps: list[Step], hidden: torch.Tensor) -> list[StepResult]:
        ends, row = [], -1
        for step in steps:
            row += step.count
            ends.append(row)
        if all(step.sample is None for step in steps):
            return [StepResult(step.session) for step in steps]
        tuned = None
        if any(step.session in self._tuned for step in steps):
            tuned = Tuned([self._tuned.get(step.session) for step in steps], whole=False)
        logits = self.span.logits(hidden[ends] if len(ends) < hidden.shape[0] else hidden, tuned)
        results = []
        for step, scores in zip(steps, logits, strict=True):
            if step.sample is None:
                results.append(StepResult(step.session))
                continue
            if not is_finite(scores):
                raise StepError(step.session, "its logits are not finite")
            where = step.position + step.count
            said = self._before(step) if step.sample.wants_history else None
            found = pick(scores, step.sample, where, said)
            results.append(StepResult(step.session, None, found.token, found.logprob, found.top))
        return results

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

    def _before(self, step: Step) -> Said:
        """What the session has said up to and including ``step``'s positions."""
        said, end = self._said[step.session], step.position + step.count
        tokens = said.tokens[:end]
        if step.tokens is not None:
            tokens[step.position :] = step.tokens
        # A stage that was never told the prompt takes what came before its first token for it.
        return Said(tokens, said.prompt_tokens or end)

    def _remember(self, step: Step, sampled: int | None) -> None:
        said, end = self._said[step.session], step.position + step.count
        if step.tokens is not None:
            said.tokens[step.position : end] = step.tokens
        if sampled is not None:
            said.tokens.extend([-1] * (end - len(said.tokens)))
            said.prompt_tokens = said.prompt_tokens or end
            said.tokens[end:] = [sampled]
