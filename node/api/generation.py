"""`/v1/chat/completions`, `/v1/responses`, `/v1/completions`: from a parsed request to an answer, whole or streamed.

A request is prepared (model, prompt tokens, lengths), run as a fan-out of generations, and written. A
stream's status line waits a moment for the first piece, so that what fails at once fails with its own
status; what fails later is an SSE event with an error, after which the stream closes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model_shards import ModelError
from node.api.answers import KEEPALIVE, Answer, Told, Usage, Writing, dump
from node.api.config import ApiConfig
from node.api.embeddings import EmbeddingRequest, embed
from node.api.fanout import Choice, Fanout, open_fanout
from node.api.fields import parse_json
from node.api.likelihoods import Likelihoods
from node.api.problems import ApiProblem, from_error, internal_problem, invalid, unsupported
from node.api.requests import SEED_BITS, ChatRequest, Options, parse_chat, parse_completion
from node.api.responses import ResponsesAnswer, parse_responses
from node.api.terms import Terms, terms_of
from node.api.tools import CallReader
from node.errors import ContextTooLong, GatewayError, ModelNotReady, UnknownModel
from node.gateway import Gateway, GenerateRequest, ModelInfo
from node.metrics import Metrics
from node.text import Piece, TextStream

if TYPE_CHECKING:
    from model_shards import Tokenizer

log = logging.getLogger("shoal.http")
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to run."""

    answer: Writing
    choices: tuple[Choice, ...]
    prompt_tokens: int
    stream: bool
    likelihoods: tuple[Likelihoods, ...] | None
    shown: int
    tried: int
    token_ids: bool
    readers: tuple[CallReader, ...] = ()

    def told(self, index: int, *pieces: Piece) -> Told:
        """What the answer says of these pieces of choice number `index`."""
        logprobs = None
        if self.likelihoods is not None:
            logprobs = self.likelihoods[index].document([event for piece in pieces for event in piece.events])
        tokens = None
        if self.token_ids:
            tokens = tuple(piece.token for piece in pieces if piece.token is not None)
        text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish
        if not self.readers:
            return Told(text, finish, logprobs, tokens)
        reader = self.readers[index]
        before = len(reader.calls)
        shown, calls = reader.push(text, end=finish is not None)
        ended = "tool_calls" if finish == "stop" and reader.calls else finish
        return Told(shown, ended, logprobs, tokens, tuple(calls), before)

    def best(self) -> list[int]:
        """The choices to show: of those `tried` for each prompt the `shown` ones with the highest log-probability a
        token, as OpenAI's best_of has it."""

        def likelihood(index: int) -> float:
            text = self.choices[index].text
            return text.logprob / max(1, text.tokens)

        found: list[int] = []
        for first in range(0, len(self.choices), self.tried):
            ranked = range(first, first + self.tried)
            if self.shown < self.tried:
                found += sorted(ranked, key=likelihood, reverse=True)[: self.shown]
            else:
                found += ranked
        return found


class Generation:
    """The two endpoints over one gateway."""

    def __init__(self, gateway: Gateway, metrics: Metrics, config: ApiConfig, stopping: trio.Event) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._config = config
        self._stopping = stopping

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        parsed = parse_chat(parse_json(await request.body(), self._config.json_depth_max), self._config)
        return await self._respond(await self._chat(request, parsed))

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        parsed = parse_responses(parse_json(await request.body(), self._config.json_depth_max), self._config)
        prepared = await self._chat(request, parsed.chat)
        model = prepared.choices[0].request.model
        answer = ResponsesAnswer(f"resp_{secrets.token_hex(12)}", int(time.time()), model, parsed)
        return await self._respond(replace(prepared, answer=answer))

    async def _chat(self, request: Request, parsed: ChatRequest) -> Prepared:
        info, tokenizer = await self._model(parsed.options.model)
        messages = list(parsed.messages)
        size = sum(len(message["content"]) for message in messages)

        tools = parsed.tools
        extra: dict[str, Any] = {"tools": list(tools.offered)} if tools.offered else {}

        def tokenize() -> Sequence[int]:
            try:
                if extra and tokenizer.chat_text(messages) == tokenizer.chat_text(messages, **extra):
                    raise unsupported(
                        "tools", sorted(tools.names), "this model's chat template knows of none"
                    )
                return tokenizer.chat(messages, **extra)
            except ModelError as problem:
                message = f"'messages' cannot be put into this model's chat template: {problem}"
                raise ApiProblem(400, message, param="messages", code="invalid_value") from None

        terms = self._terms(request, parsed.options)
        prompt = await self._tokenized(tokenize, size)
        prepared = self._prepare("chat", info, tokenizer, parsed.options, [prompt], terms)
        readers = tuple(CallReader(tools) for _ in prepared.choices) if tools.offered else ()
        return replace(prepared, readers=readers)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parse_json(await request.body(), self._config.json_depth_max)
        parsed = parse_completion(body, self._config)
        info, tokenizer = await self._model(parsed.options.model)
        terms = self._terms(request, parsed.options)
        prompts = [await self._ids(tokenizer, "prompt", given) for given in parsed.prompts]
        prepared = self._prepare("completion", info, tokenizer, parsed.options, prompts, terms)
        return await self._respond(prepared)

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        body = parse_json(await request.body(), self._config.json_depth_max)
        asked = EmbeddingRequest(body, self._config)
        info, tokenizer = await self._model(asked.options.model)
        terms = self._terms(request, asked.options)
        prompts = [await self._ids(tokenizer, "input", given) for given in asked.inputs]
        for prompt in prompts:
            _room(info, len(prompt), 1, "input")
        rows = await embed(self._gateway, self._metrics, self._stopping, asked, prompts, terms)
        document = asked.document(info.name, rows, sum(map(len, prompts)))
        return Response(dump(document), media_type="application/json")

    async def _ids(self, tokenizer: Tokenizer, param: str, given: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(given, str):
            return await self._tokenized(partial(tokenizer.encode, given), len(given))
        _known_tokens(param, given, tokenizer.vocab_size)
        return given

    def _terms(self, request: Request, options: Options) -> Terms:
        address = request.client.host if request.client else ""
        return terms_of(request.headers, address, options, self._config)

    async def _model(self, name: str) -> tuple[ModelInfo, Tokenizer]:
        for info in self._gateway.models():
            if name == info.name or name in info.aliases:
                break
        else:
            raise UnknownModel(name)
        if not info.ready:
            raise ModelNotReady(f"the model {name!r} is not ready: {info.detail}")
        return info, await self._gateway.tokenizer(name)

    async def _tokenized(self, tokenize: Callable[[], Sequence[int]], chars: int) -> tuple[int, ...]:
        """Tokens, made on a thread where the text is long: the node's heartbeats must not wait for it."""
        if chars <= self._config.inline_chars_max:
            return tuple(tokenize())
        return tuple(await trio.to_thread.run_sync(tokenize))

    def _prepare(
        self,
        kind: str,
        info: ModelInfo,
        tokenizer: Tokenizer,
        options: Options,
        prompts: Sequence[tuple[int, ...]],
        terms: Terms,
    ) -> Prepared:
        param = "messages" if kind == "chat" else "prompt"
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        identity = f"{prefix}-{secrets.token_hex(12)}"
        seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
        _known_tokens("logit_bias", [token for token, _ in options.logit_bias], tokenizer.vocab_size)
        _known_tokens("continue_token_ids", options.made, tokenizer.vocab_size)
        if options.made and len(prompts) > 1:
            raise invalid(
                "prompt", len(prompts), "one prompt where continue_token_ids says how its answer began"
            )
        choices: list[Choice] = []
        for prompt in prompts:
            max_tokens = _room(info, len(prompt), options.max_tokens, param)
            for _ in range(options.best_of):
                index = len(choices)
                asked = _asked(
                    info.name,
                    f"{identity}-{index}",
                    prompt,
                    max_tokens,
                    seed + index,
                    options,
                    terms,
                    self._config.likely_tokens,
                )
                text = TextStream(tokenizer, options.stops, max_tokens, prompt)
                _go_on(text, options.made)
                choices.append(Choice(index, asked, text))
        answer = Answer(
            kind="chat" if kind == "chat" else "completion",
            id=identity,
            created_s=int(time.time()),
            model=info.name,
            include_usage=options.include_usage,
            service_tier=terms.tier,
        )
        likely = None
        if options.logprobs is not None:
            likely = tuple(Likelihoods(tokenizer, chat=kind == "chat") for _ in choices)
        return Prepared(
            answer,
            tuple(choices),
            sum(map(len, prompts)),
            options.stream,
            likely,
            options.choices,
            options.best_of,
            options.token_ids,
        )

    async def _respond(self, prepared: Prepared) -> Response:
        if prepared.stream:
            return _StreamedAnswer(self._gateway, self._metrics, self._config, self._stopping, prepared)
        pieces: list[list[Piece]] = [[] for _ in prepared.choices]
        async with open_fanout(self._gateway, self._metrics, prepared.choices, self._stopping) as fanout:
            while (told := await fanout.receive()) is not None:
                index, piece = told
                pieces[index].append(piece)
        whole = [prepared.told(index, *pieces[index]) for index in prepared.best()]
        return Response(dump(prepared.answer.whole(whole, _usage(prepared))), media_type="application/json")


def _usage(prepared: Prepared) -> Usage:
    return Usage(prepared.prompt_tokens, sum(choice.text.tokens for choice in prepared.choices))


def _known_tokens(param: str, tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if token >= vocab_size:
            raise invalid(param, token, f"token ids below {vocab_size}, this model's vocabulary")


def _asked(
    model: str,
    request_id: str,
    prompt: tuple[int, ...],
    max_tokens: int,
    seed: int,
    options: Options,
    terms: Terms,
    likely_tokens: int,
) -> GenerateRequest:
    """The request to the mesh for one choice."""
    return GenerateRequest(
        request_id=request_id,
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=seed % (1 << SEED_BITS),
        ignore_eos=options.ignore_eos,
        deadline_s=terms.deadline_s,
        client=terms.client,
        priority=terms.priority,
        first_token_s=terms.first_token_s,
        likely_tokens=likely_tokens if options.max_tokens is None else 0,
        form=options.form,
        form_text=options.form_text,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=options.logit_bias,
        top_logprobs=options.logprobs or 0,
        made=options.made,
    )


def _go_on(text: TextStream, made: tuple[int, ...]) -> None:
    """Bring the text to where another gateway left it."""
    text.replay(made)
    if text.finish is not None:
        raise invalid("continue_token_ids", len(made), "the tokens of an answer that is not at its end")


def _room(info: ModelInfo, prompt_tokens: int, wanted: int | None, param: str) -> int:
    """How many tokens may be generated: what was asked for, cut to what the context leaves."""
    if prompt_tokens == 0:
        message = f"'{param}': it has no tokens; at least one is needed"
        raise ApiProblem(400, message, param=param, code="invalid_value")
    left = info.context_tokens - prompt_tokens
    if left < 1:
        problem = from_error(ContextTooLong(info.context_tokens, prompt_tokens + 1))
        problem.param = param
        raise problem
    return left if wanted is None else min(wanted, left)


class _StreamedAnswer(Response):
    """Runs the request while Starlette sends it."""

    def __init__(
        self,
        gateway: Gateway,
        metrics: Metrics,
        config: ApiConfig,
        stopping: trio.Event,
        prepared: Prepared,
    ) -> None:
        super().__init__(None, 200, STREAM_HEADERS, "text/event-stream")
        del self.headers["content-length"]
        self._gateway = gateway
        self._metrics = metrics
        self._config = config
        self._stopping = stopping
        self._prepared = prepared
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with open_fanout(
                self._gateway, self._metrics, self._prepared.choices, self._stopping
            ) as fanout:
                await self._stream(fanout, send)
        except GatewayError as problem:
            if not self._started:
                raise
            await self._write(send, self._prepared.answer.fail(from_error(problem)))
        except Exception:  # a bug may end one answer, said in its own stream, and no more
            if not self._started:
                raise
            log.exception("a streamed answer failed")
            await self._write(send, self._prepared.answer.fail(internal_problem()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, fanout: Fanout, send: Send) -> None:
        with trio.move_on_after(self._config.first_byte_s) as patience:
            told = await fanout.receive()
        await self._start(send)
        if patience.cancelled_caught:
            told = await self._next(fanout, send)
        while told is not None:
            await self._tell(send, *told)
            told = await self._next(fanout, send)
        await self._write(send, self._prepared.answer.end(_usage(self._prepared)))

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._started = True
        indexes = [choice.index for choice in self._prepared.choices]
        await self._write(send, self._prepared.answer.begin(indexes) or KEEPALIVE)

    async def _next(self, fanout: Fanout, send: Send) -> tuple[int, Piece] | None:
        """The next piece; while there is none, comments keep proxies and clients patient."""
        while True:
            with trio.move_on_after(self._config.keepalive_s):
                return await fanout.receive()
            await self._write(send, KEEPALIVE)

    async def _tell(self, send: Send, index: int, piece: Piece) -> None:
        said = self._prepared.answer.say(index, self._prepared.told(index, piece))
        if said:
            await self._write(send, said)

    async def _write(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})


def model_document(info: ModelInfo) -> dict[str, Any]:
    """A model as /v1/models shows it; what OpenAI has no name for stands in fields of our own. An adapter has its base
    as `parent`."""
    document = {
        "id": info.name,
        "object": "model",
        "created": info.created_s,
        "owned_by": "shoal",
        "ready": info.ready,
        "detail": info.detail,
        "context_tokens": info.context_tokens,
    }
    return document | {"parent": info.parent} if info.parent else document
