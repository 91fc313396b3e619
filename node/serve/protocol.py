"""The messages of a serving session, and their limits.

A session is a chain of nested channels: the gateway opens SESSION at the first stage, each stage opens it at the next.
Activations go down the chain; a token goes from the last stage straight to the first and to the gateway over RETURN.
Guesses at the next tokens go as rows of activations with the certain ones; what they say only the first and the last
stage see, which see the text in any case: it goes straight from one to the other, back over RETURN.
Leaving the gateway's block cancels the first channel and, through the nesting, every stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from p2p import Method, Tensor

Finish = Literal["stop", "length"]
Role = Literal["gateway", "stage"]
CHUNK_TOKENS_MAX = 512
PIECE_TOKENS = 128
"""A prompt goes through a chain in pieces of so many tokens, counted from its beginning."""
MARK_BYTES = 8
Priority = Literal[0, 1, 2]
HIGH: Final = 0
NORMAL: Final = 1
BACKGROUND: Final = 2
TELL_EVERY_TOKENS = 32
"""Every so many new tokens the stages tell how long they took."""
STAGES_MAX = 512
ID_CHARS_MAX = 128
PROMPT_WAIT_S = 30.0
IDLE_S_MAX = 600.0
TOKENS_MAX = 1 << 20
PAYLOAD_BYTES_MAX = 64 << 20
SESSION_S_MAX = 6 * 3600.0
HANDOVER_S_MAX = 600.0
HANDOVER_BYTES_MAX = 8 << 20
EPOCHS_MAX = 1 << 16
PROBE_S_MAX = 30.0
EMBEDDING_BYTES_MAX = 1 << 20
"""One part of a cache on its way; all but rare ones are a good deal smaller."""


@dataclass(frozen=True, slots=True)
class StageRef:
    """Layers [start, end) on node `peer`."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the last stage chooses tokens (model_shards.Sampling); randomness depends on (seed, position) alone.

    `form` ("json_schema", "json_object", "regex" or none) keeps the answer to `form_text`. What the choice depends on
    and the last stage cannot know is told: what of the answer stands in the session's prompt, because another session
    made it, as `answered`, and for a repetition penalty the prompt's tokens, once each, as `seen`.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    form: str = ""
    form_text: str = ""
    answered: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class SessionOpen:
    """Opens stage `index` of `stages`; that stage opens the next one with `index + 1`.

    `marks` name the whole pieces of the prompt; every stage takes the first `reuse` positions from its cache. Work of a
    lower `priority` waits for that of a higher one, and background sessions give their room to others.

    A prompt may be read on one chain and answered on another. The session that reads names the stages of the other one
    as its `heirs` and makes one token. The other one names it as `source` and its stages as `sources`: these hand the
    prompt's cache over, and have `handover_s` for what is left of that once the prompt is read. The gateway sends only
    the first token (and before it the prompt, if there are to be guesses).

    The first stage may send windows of up to `window` rows, the certain token among them; below 2 it guesses nothing.

    `adapter` is the manifest id of an adapter that every stage applies, or none.

    With a `pool` (see model_shards.Step) the session reads its prompt for an embedding, which comes instead of a token.

    A chain that broke is joined anew under a higher `epoch`: who has the session goes on with it, the others begin at
    position 0, and each says from where on it wants to be fed. `made` tokens of the answer are known to the gateway,
    which feeds the first stage; `said` are these tokens, where the choice of the next depends on them.
    """

    session: str
    manifest_id: str
    stages: tuple[StageRef, ...]
    index: int
    gateway: str
    prompt_tokens: int
    new_tokens_max: int
    ignore_eos: bool
    sampling: SamplingSpec
    marks: tuple[bytes, ...] = ()
    reuse: int = 0
    priority: Priority = 1
    heirs: tuple[StageRef, ...] = ()
    source: str = ""
    sources: tuple[StageRef, ...] = ()
    handover_s: float = 0.0
    pool: Literal["", "last_hidden", "mean"] = ""
    adapter: str = ""
    window: int = 0
    epoch: int = 0
    made: int = 0
    said: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """Positions whose tokens the gateway knows."""
        return self.prompt_tokens + self.made


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids (int32, [n]) of the text that the gateway knows, for the first stage, a chunk at a time."""

    position: int
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Activations:
    """Hidden states [n, hidden] of positions [position, position + n); `sample` asks the last stage for a token, `tell`
    every stage for a note when it is done.

    With `parents` the rows are a window (see model_shards.Window): a certain token at `position`, and guesses. Of the
    window before, the rows `kept` were right: so many positions have become certain since.
    """

    position: int
    hidden: Tensor
    sample: bool
    tell: bool = False
    parents: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionInput:
    """What travels down the chain: exactly one of the two."""

    prompt: Prompt | None = None
    activations: Activations | None = None


@dataclass(frozen=True, slots=True)
class SessionNote:
    """What is said back up the chain: stage number `stage` is done with the `tokens` positions from `position` on.

    Its predecessor fills in the `seconds` it took as seen from outside and says it on. A stage's first note has no
    tokens but `queues_s`: the seconds of prompts that waited here when the session was opened, by priority. In a chain
    that is joined anew it says from which position on it `want`s to be fed (-1: it does not say), and the `reach` of it
    and all below: how many positions the furthest of them has.
    """

    stage: int
    position: int = 0
    tokens: int = 0
    seconds: float = -1.0
    queues_s: tuple[float, ...] = ()
    want: int = -1
    reach: int = 0


@dataclass(frozen=True, slots=True)
class ReturnOpen:
    """The last stage of `session` offers its tokens to its gateway or to its first stage."""

    session: str
    role: Role
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class TokenOut:
    """The `index`-th new token of a session; `finish` is set on the last one. `top` are the (token, log-probability)
    pairs asked for, likeliest first. A pass that held guesses makes several tokens: all but the last say that `more`
    come, the last one how many were `guessed`. Where the session pools, `embedding` (float32, [hidden]) stands for the
    token."""

    index: int
    token: int
    logprob: float | None = None
    finish: Finish | None = None
    top: tuple[tuple[int, float], ...] = ()
    embedding: Tensor | None = None
    more: bool = False
    guessed: int = 0


@dataclass(frozen=True, slots=True)
class Guesses:
    """What the rows of the window at `position` stand for, from the first stage to the last."""

    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HandoverOpen:
    """An heir of `session` asks for its cache of layers [start, end)."""

    session: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class HandoverPart:
    """Some rows of the cache, as the engine writes them: uint8 [bytes]."""

    rows: Tensor


@dataclass(frozen=True, slots=True)
class ProbeAsk:
    """How far are your stages of this session?"""

    session: str


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of a session at the node asked, which starts at layer `start` and takes part under `epoch`: it was
    given the positions below `given`, did those below `done` (the last stage: and returned the tokens after them), and
    is at work on the rest for `busy_s` seconds."""

    start: int
    epoch: int
    given: int
    done: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """All stages of the session there."""

    stages: tuple[StageReport, ...]


@dataclass(frozen=True, slots=True)
class ReleaseAsk:
    """The session is over: its room is free. Only its gateway may say so."""

    session: str


@dataclass(frozen=True, slots=True)
class Released:
    """How many stages of it were there."""

    stages: int


SESSION = Method(
    name="serve.session",
    request=SessionOpen,
    reply=SessionNote,
    upstream=SessionInput,
    body_bytes_max=256 << 10,
    payload_bytes_max=PAYLOAD_BYTES_MAX,
    deadline_s=SESSION_S_MAX,
)
RETURN = Method(
    name="serve.return",
    request=ReturnOpen,
    reply=Guesses,
    upstream=TokenOut,
    body_bytes_max=4096,
    payload_bytes_max=EMBEDDING_BYTES_MAX,
    deadline_s=SESSION_S_MAX,
)
HANDOVER = Method(
    name="serve.handover",
    request=HandoverOpen,
    reply=HandoverPart,
    body_bytes_max=4096,
    payload_bytes_max=HANDOVER_BYTES_MAX,
    deadline_s=SESSION_S_MAX,
    lane="bulk",
)
PROBE = Method(
    name="serve.probe", request=ProbeAsk, reply=ProbeAnswer, body_bytes_max=4096, deadline_s=PROBE_S_MAX
)
RELEASE = Method(
    name="serve.release", request=ReleaseAsk, reply=Released, body_bytes_max=4096, deadline_s=PROBE_S_MAX
)
