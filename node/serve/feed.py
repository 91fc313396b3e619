"""What a stage is fed: messages in time, and a prompt's tokens where they belong. Knows nothing of engines."""

from __future__ import annotations

import contextlib
from typing import TypeAlias

import torch
import trio

from model_shards import tensor_from_bytes
from node.serve.protocol import (
    CHUNK_TOKENS_MAX,
    IDLE_S_MAX,
    PROMPT_WAIT_S,
    SessionInput,
    SessionNote,
    SessionOpen,
)
from p2p import Channel, EndOfChannel, RpcRefusal, Tensor

InputChannel: TypeAlias = Channel[SessionInput, SessionNote]


async def piece(
    channel: InputChannel, position: int, prompt_tokens: int, wait_s: float | None = None
) -> tuple[int, ...]:
    """The next part of the prompt, which must go on at `position`."""
    prompt = (await in_time(channel, PROMPT_WAIT_S if wait_s is None else wait_s)).prompt
    if prompt is None or prompt.position != position:
        raise RpcRefusal("invalid", f"expected the prompt from position {position}")
    return _token_ids(prompt.tokens, prompt_tokens - position)


async def whole_prompt(request: SessionOpen, channel: InputChannel) -> tuple[int, ...]:
    """All of the prompt: what of it is cached can only be told with its tokens."""
    prompt: list[int] = []
    while len(prompt) < request.prompt_tokens:
        prompt.extend(await piece(channel, len(prompt), request.prompt_tokens))
    return tuple(prompt)


def _token_ids(tensor: Tensor, most: int) -> tuple[int, ...]:
    ids = tensor_from_bytes(tensor.dtype, tensor.shape, tensor.data)
    if ids.dtype != torch.int32 or ids.ndim != 1 or not 0 < ids.numel() <= min(most, CHUNK_TOKENS_MAX):
        raise RpcRefusal("invalid", f"expected 1 to {min(most, CHUNK_TOKENS_MAX)} token ids as int32")
    return tuple(ids.tolist())


async def in_time(channel: InputChannel, wait_s: float) -> SessionInput:
    """What comes next. A session that nobody feeds must not keep its room for ever."""
    with trio.move_on_after(wait_s):
        return await channel.receive()
    raise RpcRefusal("unavailable", f"nothing came for this session within {wait_s:g} s")


async def until_closed(channel: InputChannel) -> None:
    """Keep the session's room until the gateway has read its last token and leaves."""
    with contextlib.suppress(EndOfChannel):
        while True:
            await in_time(channel, IDLE_S_MAX)
