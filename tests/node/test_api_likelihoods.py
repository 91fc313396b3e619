"""Log-probabilities by the official openai client, and the best of several answers."""

from __future__ import annotations

import openai
import pytest

from node.api.likelihoods import LEAST, Likelihoods
from node.gateway import TokenEvent

EOS = 256
HELLO = (*b"hey", EOS)
MESSAGES = [{"role": "user", "content": "hi"}]


async def test_a_chat_answer_tells_each_token_and_its_rivals(make_gateway, serving) -> None:
    gateway = make_gateway((*"né".encode(), EOS))
    async with serving(gateway) as site:
        answer = await site.openai.chat.completions.create(
            model="bytes", messages=MESSAGES, logprobs=True, top_logprobs=2, seed=1
        )
    assert gateway.requests[0].top_logprobs == 2
    told = answer.choices[0].logprobs.content
    assert [one.bytes for one in told] == [[byte] for byte in "né".encode()], "the end of text is not shown"
    assert [one.token for one in told] == ["n", "\ufffd", "\ufffd"]
    assert [one.logprob for one in told] == [-0.5] * 3
    assert [(top.token, top.logprob) for top in told[0].top_logprobs] == [("n", -0.5), ("m", -1.5)]


async def test_none_are_told_unless_asked_for(make_gateway, serving) -> None:
    async with serving(make_gateway(HELLO)) as site:
        answer = await site.openai.chat.completions.create(model="bytes", messages=MESSAGES)
        plain = await site.openai.completions.create(model="bytes", prompt="a")
        bare = await site.openai.chat.completions.create(model="bytes", messages=MESSAGES, logprobs=True)
    assert answer.choices[0].logprobs is None
    assert plain.choices[0].logprobs is None
    assert [one.top_logprobs for one in bare.choices[0].logprobs.content] == [[], [], []]


@pytest.mark.parametrize("stops", [None, "ey"])
async def test_a_stream_tells_them_with_their_text(stops, make_gateway, serving) -> None:
    async with serving(make_gateway(HELLO)) as site:
        asked = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "stop": stops}
        chunks, problem = await site.stream("chat", **asked)
    assert problem is None
    shown = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    tokens = ["".join(one.token for one in choice.logprobs.content) for choice in shown]
    assert tokens == [choice.delta.content for choice in shown]
    assert "".join(tokens) == ("h" if stops else "hey")


@pytest.mark.parametrize("stream", [False, True])
async def test_plain_completions_have_a_form_of_their_own(stream, make_gateway, serving) -> None:
    asked = {"prompt": "a", "logprobs": 2, "seed": 1}
    async with serving(make_gateway(HELLO)) as site:
        if stream:
            chunks, _ = await site.stream("completion", **asked)
            found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        else:
            found = [(await site.openai.completions.create(model="bytes", **asked)).choices[0].logprobs]
    assert [token for one in found for token in one.tokens] == ["h", "e", "y"]
    assert [offset for one in found for offset in one.text_offset] == [0, 1, 2]
    assert [logprob for one in found for logprob in one.token_logprobs] == [-0.5] * 3
    assert found[0].top_logprobs[0] == {"h": -0.5, "g": -1.5}


async def test_of_several_answers_the_likeliest_are_given(make_gateway, serving) -> None:
    def script(request):
        # Odd seeds are likelier; a token more or less makes no difference to a mean.
        return (*f"{request.seed}".encode(), *b"x" * (request.seed % 3), EOS)

    async with serving(make_gateway(script)) as site:
        answer = await site.openai.completions.create(
            model="bytes", prompt=["a", "b"], n=2, best_of=4, seed=10, temperature=1.0
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [int(choice.text.rstrip("x")) for choice in answer.choices] == [11, 13, 15, 17]
    tried = sum(len(str(seed)) + seed % 3 + 1 for seed in range(10, 18))
    assert answer.usage.completion_tokens == tried, "those not shown were made, too"


async def test_a_bias_for_a_token_that_the_model_has_not_is_the_clients_mistake(
    make_gateway, serving
) -> None:
    async with serving(make_gateway()) as site:
        with pytest.raises(openai.BadRequestError, match="token ids below") as caught:
            await site.openai.chat.completions.create(
                model="bytes", messages=MESSAGES, logit_bias={"99999": 1}
            )
    assert caught.value.param == "logit_bias"


def test_what_cannot_happen_is_told_as_a_number(byte_tokenizer) -> None:
    """A form forbids tokens, whose log-probability JSON cannot hold where it is minus infinity."""
    event = TokenEvent(104, 0, float("-inf"), None, ((104, float("-inf")),))
    for chat in (True, False):
        document = Likelihoods(byte_tokenizer, chat=chat).document([event])
        assert str(LEAST) in str(document)
        assert "inf" not in str(document)
