"""The official openai client against the API on a loopback socket."""

from __future__ import annotations

import openai
import pytest
import trio

from node.errors import ModelNotReady, Overloaded, StageLost

EOS = 256
HELLO = (*b"Hello, world", EOS)
MESSAGES = [{"role": "user", "content": "hi"}]


async def test_models_are_listed_and_one_can_be_asked_for(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        listed = await site.openai.models.list()
        assert [model.id for model in listed.data] == ["bytes", "org/absent"]
        assert listed.data[0].created == 1700000000
        one = await site.openai.models.retrieve("bytes")
        assert (one.id, one.object, one.owned_by) == ("bytes", "model", "shoal")
        slashed = await site.http.get("/v1/models/org/absent")
        assert slashed.json()["ready"] is False


async def test_a_chat_answer_has_text_finish_and_usage(make_gateway, serving) -> None:
    gateway = make_gateway()
    async with serving(gateway) as site:
        answer = await site.openai.chat.completions.create(model="bytes", messages=MESSAGES)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Hello, world",
        "stop",
    )
    prompt = tuple(b"user|hi;")
    assert gateway.requests[0].prompt == prompt
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 13)
    assert answer.usage.total_tokens == len(prompt) + 13
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


async def test_a_streamed_chat_gives_the_same_text_in_chunks_and_usage_last(make_gateway, serving) -> None:
    async with serving(make_gateway((*"né✓".encode(), EOS))) as site:
        chunks, problem = await site.stream("chat", messages=MESSAGES, stream_options={"include_usage": True})
    assert problem is None
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == "né✓"
    assert [t for t in texts if t] == ["n", "é", "✓"], "no chunk splits a character"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 7
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


async def test_usage_is_left_out_of_a_stream_unless_asked_for(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        chunks, _ = await site.stream("completion", prompt="hi")
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello, world"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [tuple(b"ab")]),
        (["ab", "c"], [tuple(b"ab"), tuple(b"c")]),
        ([97, 98, 256], [(97, 98, 256)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_a_completion_takes_every_form_of_prompt(prompt, expected, make_gateway, serving) -> None:
    gateway = make_gateway()
    async with serving(gateway) as site:
        answer = await site.openai.completions.create(model="bytes", prompt=prompt)
    assert sorted(r.prompt for r in gateway.requests) == sorted(expected)
    assert [choice.text for choice in answer.choices] == ["Hello, world"] * len(expected)
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert answer.usage.prompt_tokens == sum(map(len, expected))
    assert answer.usage.completion_tokens == 13 * len(expected)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["o, w", ["zzz", "o, w"]])
async def test_a_stop_string_across_tokens_ends_the_answer_and_the_generation(
    stop, stream, make_gateway, serving
) -> None:
    gateway = make_gateway((*b"Hello, world", trio.Event()))
    async with serving(gateway) as site:
        if stream:
            chunks, _ = await site.stream("completion", prompt="hi", stop=stop)
            text, finish = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            answer = await site.openai.completions.create(model="bytes", prompt="hi", stop=stop)
            text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == ("Hell", "stop")
    assert gateway.running == 0


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens_ends_with_length(field, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        answer = await site.openai.chat.completions.create(model="bytes", messages=MESSAGES, **{field: 3})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hel", "length")


async def test_without_max_tokens_the_rest_of_the_context_may_be_used(make_gateway, serving) -> None:
    gateway = make_gateway(tuple(b"x" * 500))
    async with serving(gateway) as site:
        answer = await site.openai.completions.create(model="bytes", prompt="12345678")
        capped = await site.openai.completions.create(model="bytes", prompt="12345678", max_tokens=5000)
    assert answer.usage.completion_tokens == capped.usage.completion_tokens == 120
    assert answer.choices[0].finish_reason == "length"


async def test_sampling_fields_reach_the_gateway(make_gateway, serving) -> None:
    gateway = make_gateway()
    async with serving(gateway) as site:
        await site.openai.completions.create(
            model="bytes",
            prompt="hi",
            temperature=0.25,
            top_p=0.5,
            seed=7,
            max_tokens=13,
            extra_body={"top_k": 40, "ignore_eos": True},
        )
        await site.openai.completions.create(model="bytes", prompt="hi", extra_body={"top_k": -1})
        await site.openai.completions.create(model="bytes", prompt="hi")
    first, second, third = gateway.requests
    assert (first.temperature, first.top_p, first.top_k, first.seed) == (0.25, 0.5, 40, 7)
    assert first.ignore_eos
    assert (second.temperature, second.top_p, second.top_k) == (1.0, 1.0, 0)
    assert second.seed != third.seed, "without a seed each request gets one of its own"
    assert len({r.request_id for r in gateway.requests}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_n_answers_run_at_once_with_seeds_of_their_own(stream, make_gateway, serving) -> None:
    meeting: list[trio.Event] = [trio.Event() for _ in range(3)]

    def script(request):
        meeting[request.seed - 5].set()
        return (*meeting, *f"seed {request.seed}".encode(), EOS)

    gateway = make_gateway(script)
    async with serving(gateway) as site:
        if stream:
            texts = {}
            chunks, _ = await site.stream("chat", messages=MESSAGES, n=3, seed=5)
            for choice in (chunk.choices[0] for chunk in chunks):
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        else:
            answer = await site.openai.chat.completions.create(model="bytes", messages=MESSAGES, n=3, seed=5)
            texts = {choice.index: choice.message.content for choice in answer.choices}
    assert texts == {0: "seed 5", 1: "seed 6", 2: "seed 7"}


async def test_answers_that_find_no_room_wait_for_a_sibling(make_gateway, serving) -> None:
    gateway = make_gateway()
    gateway.on_enter = [None, Overloaded(1.0), Overloaded(1.0)]
    async with serving(gateway) as site:
        answer = await site.openai.completions.create(model="bytes", prompt="hi", n=3)
    assert [choice.text for choice in answer.choices] == ["Hello, world"] * 3
    assert len(gateway.requests) == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("problem", "error", "code"),
    [
        (Overloaded(3.2), openai.RateLimitError, "overloaded"),
        (ModelNotReady("moving layers"), openai.InternalServerError, "model_not_ready"),
        (StageLost("12D3Koo", "heartbeat missed"), openai.InternalServerError, "node_lost"),
    ],
)
async def test_what_fails_at_once_has_its_own_status(
    problem, error, code, stream, make_gateway, serving
) -> None:
    gateway = make_gateway()
    gateway.on_enter = [problem]
    async with serving(gateway) as site:
        with pytest.raises(error) as caught:
            await site.openai.chat.completions.create(model="bytes", messages=MESSAGES, stream=stream)
    assert caught.value.code == code
    assert str(problem) in str(caught.value)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    if isinstance(problem, Overloaded):
        assert caught.value.response.headers["retry-after"] == "4"


async def test_answers_that_never_find_room_do_not_wait_for_ever(make_gateway, serving) -> None:
    gateway = make_gateway()
    gateway.on_enter = [None, *[Overloaded(1.0)] * 4]
    async with serving(gateway) as site:
        with trio.fail_after(10), pytest.raises(openai.RateLimitError):
            await site.openai.completions.create(model="bytes", prompt="hi", n=3)


async def test_all_answers_without_room_give_one_rate_limit_error(make_gateway, serving) -> None:
    gateway = make_gateway()
    gateway.on_enter = [Overloaded(1.0), Overloaded(1.0)]
    async with serving(gateway) as site:
        with pytest.raises(openai.RateLimitError):
            await site.openai.completions.create(model="bytes", prompt="hi", n=2)


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_a_node_lost_in_the_middle_of_a_stream_is_an_api_error(kind, make_gateway, serving) -> None:
    gateway = make_gateway((*b"Hel", StageLost("12D3Koo", "heartbeat missed")))
    fields = {"messages": MESSAGES} if kind == "chat" else {"prompt": "hi"}
    async with serving(gateway) as site:
        chunks, problem = await site.stream(kind, **fields)
    choices = [chunk.choices[0] for chunk in chunks]
    seen = [choice.delta.content if kind == "chat" else choice.text for choice in choices]
    assert "".join(text or "" for text in seen) == "Hel"
    assert type(problem) is openai.APIError
    assert "12D3Koo" in str(problem)
    assert "heartbeat missed" in str(problem)
    assert problem.code == "node_lost"
    assert gateway.running == 0


async def test_a_node_lost_before_the_whole_answer_is_a_server_error(make_gateway, serving) -> None:
    async with serving(make_gateway((*b"Hel", StageLost("12D3Koo")))) as site:
        with pytest.raises(openai.InternalServerError) as caught:
            await site.openai.chat.completions.create(model="bytes", messages=MESSAGES)
    assert caught.value.status_code == 502


async def test_unknown_and_unready_models(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(openai.NotFoundError) as missing:
            await site.openai.chat.completions.create(model="nobody", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            await site.openai.models.retrieve("nobody")
        with pytest.raises(openai.InternalServerError, match="layers 2 to 4 are missing") as unready:
            await site.openai.chat.completions.create(model="org/absent", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert unready.value.status_code == 503


@pytest.mark.parametrize(("length", "fits"), [(127, True), (128, False), (5000, False)])
async def test_a_prompt_must_leave_room_in_the_context(length, fits, make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        if fits:
            await site.openai.completions.create(model="bytes", prompt="x" * length)
            return
        with pytest.raises(openai.BadRequestError, match=rf"128 tokens.*{length + 1}") as caught:
            await site.openai.completions.create(model="bytes", prompt="x" * length)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


async def test_what_a_chat_template_refuses_is_the_clients_mistake(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(openai.BadRequestError, match="no such talk"):
            await site.openai.chat.completions.create(
                model="bytes", messages=[{"role": "user", "content": "forbidden"}]
            )
