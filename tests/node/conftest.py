"""A fake gateway, a real tokenizer of bytes, and the API on a loopback socket, for the tests of this folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
import tokenizers
import trio
from tokenizers import decoders, models, pre_tokenizers

from model_shards import CheckpointIndex, Engine, Grammars, ModelConfig, Sampling, Step, Tokenizer, load_span
from node import embedded
from node.api import ApiConfig, ServerConfig, build_app, serve_http
from node.errors import UnknownModel
from node.gateway import GenerateRequest, ModelInfo, TokenEvent
from node.metrics import Metrics
from node.serve.choosing import sampling_asked
from node.serve.protocol import PIECE_TOKENS

sys.path.insert(0, str(Path(__file__).parent))
EOS = 256
CONTEXT_TOKENS = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}|{{ m.content }};{% endfor %}"
    "{% if 'forbidden' in messages[0].content %}{{ raise_exception('no such talk') }}{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Token i is byte i; token 256 ends the text. Every UTF-8 character beyond ASCII is split over tokens."""
    letters = _byte_letters()
    vocab = {letter: index for index, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    directory = tmp_path_factory.mktemp("bytes")
    backend.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_dir(directory)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + extra)
            extra += 1
    return [letters[byte] for byte in range(256)]


Script = Sequence[Any] | Callable[[GenerateRequest], Sequence[Any]]


class FakeGateway:
    """Plays a script for each request: ints are tokens, exceptions are raised, events are waited for.

    A script that ends gives no end to the stream: put EOS into it, or let max_tokens cut it.
    """

    def __init__(self, tokenizer: Tokenizer, script: Script = ()) -> None:
        self._tokenizer = tokenizer
        self.script = script
        self.on_enter: list[Exception | None] = []
        self.requests: list[GenerateRequest] = []
        self.running = 0
        self.left = trio.Event()
        self.entered = trio.Event()
        self.infos = [
            ModelInfo("bytes", "m1", 1700000000, CONTEXT_TOKENS, 4, True, ""),
            ModelInfo("org/absent", "m2", 1700000001, CONTEXT_TOKENS, 4, False, "layers 2 to 4 are missing"),
        ]
        self.mesh_document: dict[str, Any] = {"mesh": "m", "self": "p", "nodes": [], "models": []}

    def models(self) -> list[ModelInfo]:
        return self.infos

    async def tokenizer(self, model: str) -> Tokenizer:
        if model != "bytes":
            raise UnknownModel(model)
        return self._tokenizer

    def mesh(self) -> dict[str, Any]:
        return self.mesh_document

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[TokenEvent]]:
        self.requests.append(request)
        problem = self.on_enter.pop(0) if self.on_enter else None
        if problem is not None:
            raise problem
        self.running += 1
        self.entered.set()
        try:
            yield self._play(request)
        finally:
            self.running -= 1
            self.left.set()

    async def _play(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if request.pool:
            await trio.lowlevel.checkpoint()
            row = (3.0, float(len(request.prompt)))
            if isinstance(self.script, Exception):
                raise self.script
            yield TokenEvent(0, 0, None, "stop", (), row)
            return
        index = len(request.made)
        for item in self.script(request) if callable(self.script) else self.script:
            await trio.lowlevel.checkpoint()
            if isinstance(item, trio.Event):
                await item.wait()
            elif isinstance(item, Exception):
                raise item
            else:
                ends = item == EOS and not request.ignore_eos
                full = index + 1 == request.max_tokens
                finish = "stop" if ends else "length" if full else None
                logprob = -0.5 if request.seed % 2 else -1.0
                likely = tuple((item - at, logprob - at) for at in range(request.top_logprobs))
                yield TokenEvent(item, index, logprob, finish, likely)
                if ends or full:
                    return
                index += 1


@pytest.fixture
def make_gateway(byte_tokenizer: Tokenizer) -> Callable[..., FakeGateway]:
    def make(script: Script = (*b"Hello, world", EOS)) -> FakeGateway:
        return FakeGateway(byte_tokenizer, script)

    return make


def _collect(url: str, kind: str, fields: dict[str, Any]) -> tuple[list[Any], openai.APIError | None]:
    """A whole stream by the synchronous client, and the error that ended it. Runs on a thread.

    The asynchronous client leaves its generators to the garbage collector, which trio reports.
    """
    chunks: list[Any] = []
    http = httpx2.Client(verify=False, trust_env=False, timeout=20)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        endpoint = client.chat.completions if kind == "chat" else client.completions
        try:
            for chunk in endpoint.create(model="bytes", stream=True, **fields):
                chunks.append(chunk)
        except openai.APIStatusError:
            raise
        except openai.APIError as problem:
            return chunks, problem
    return chunks, None


class _LoopbackOnly(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.host != "127.0.0.1":
            raise AssertionError(f"a test reached out to {request.url}")
        return await super().handle_async_request(request)


@pytest.fixture
def serving() -> Callable[..., Any]:
    """`async with serving(gateway) as site`: .url, .http (httpx2), .openai (the official client), .metrics, .app.

    `await site.stream("chat", messages=...)` gives (chunks, the error that ended them or None).
    """

    @asynccontextmanager
    async def serve(
        gateway: FakeGateway,
        *,
        control: Any = None,
        config: ApiConfig | None = None,
        server: ServerConfig | None = None,
        key: str = "none",
    ) -> AsyncIterator[SimpleNamespace]:
        metrics = Metrics()
        app = build_app(gateway, metrics, control, config)
        async with trio.open_nursery() as nursery:
            scope, stopped = trio.CancelScope(), trio.Event()

            async def run(task_status: Any) -> None:
                with scope:
                    await serve_http(app, "127.0.0.1", 0, config=server, task_status=task_status)
                stopped.set()

            url = await nursery.start(run)
            async with httpx2.AsyncClient(
                transport=_LoopbackOnly(verify=False), base_url=url, timeout=20
            ) as http:
                async with openai.AsyncOpenAI(
                    base_url=f"{url}/v1",
                    api_key=key,
                    max_retries=0,
                    http_client=httpx2.AsyncClient(transport=_LoopbackOnly(verify=False), timeout=20),
                ) as client:

                    async def stream(kind: str, **fields: Any) -> Any:
                        return await trio.to_thread.run_sync(_collect, url, kind, fields)

                    yield SimpleNamespace(
                        stream=stream,
                        url=url,
                        port=int(url.rpartition(":")[2]),
                        http=http,
                        openai=client,
                        metrics=metrics,
                        app=app,
                        nursery=nursery,
                        stop=scope.cancel,
                        stopped=stopped,
                    )
            nursery.cancel_scope.cancel()

    return serve


@pytest.fixture(scope="session")
def model():
    """The embedded model's config, files and tokenizer."""
    directory = embedded.path()
    return ModelConfig.from_dir(directory), CheckpointIndex.open(directory), Tokenizer.from_dir(directory)


@pytest.fixture
def prompt(model):
    """A short prompt of the embedded model."""
    return model[2].encode("def read_file(path):\n")


@pytest.fixture(scope="session")
def alone(model):
    """The tokens that one engine gives for a request."""
    config, index, tokenizer = model
    engine = Engine(load_span(embedded.path(), index, config, 0, 8), kv_bytes_max=4 << 20)

    def run(request):
        spec = sampling_asked(request, ())
        names = {"form", "form_text", "answered", "seen"}
        asked = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in names}
        if request.form:
            asked["grammar"] = Grammars(tokenizer, config.vocab, config.eos_ids).compile(
                request.form, request.form_text
            )
        sampling = Sampling(**asked)
        engine.open("s", 0, 8, len(request.prompt) + request.max_tokens)
        found, given, position = [], request.prompt, 0
        while len(found) < request.max_tokens:
            chunk, given = given[:PIECE_TOKENS], given[PIECE_TOKENS:]
            result = engine.run([Step("s", position, chunk, None, None if given else sampling)])[0]
            position += len(chunk)
            if not given:
                found.append(result.token)
                given = (result.token,)
        engine.close("s")
        return found

    return run
