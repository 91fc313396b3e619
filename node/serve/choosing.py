"""How a session's tokens are chosen: from what a client asks for to what the engine of the last stage follows."""

from __future__ import annotations

import torch

from model_shards import ModelError, Sampling, tensor_from_bytes
from node.errors import StageLost
from node.gateway import GenerateRequest
from node.serve.compute import Compute
from node.serve.protocol import SamplingSpec, TokenOut


def sampling_asked(request: GenerateRequest, made: tuple[int, ...]) -> SamplingSpec:
    """For a session whose prompt ends with `made`, tokens of the answer that other sessions made."""
    penalised = request.presence_penalty != 0.0 or request.frequency_penalty != 0.0
    repeated = request.repetition_penalty != 1.0
    return SamplingSpec(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        form=request.form,
        form_text=request.form_text,
        answered=made if request.form or penalised else (),
        seen=tuple(sorted({*request.prompt, *made})) if repeated else (),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        top_logprobs=request.top_logprobs,
    )


async def sampling_of(spec: SamplingSpec, compute: Compute | None) -> Sampling:
    """Every stage checks it, the last one (which has a `compute`) follows it. Raises ModelError."""
    grammar = None
    answered, seen = spec.answered, spec.seen
    if compute is not None:
        answered, seen = known_tokens(answered, compute), known_tokens(seen, compute)
        if spec.form:
            grammar = await compute.grammar(spec.form, spec.form_text)
    return Sampling(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        seed=spec.seed,
        min_p=spec.min_p,
        repetition_penalty=spec.repetition_penalty,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        logit_bias=spec.logit_bias,
        top_logprobs=spec.top_logprobs,
        grammar=grammar,
        seen=frozenset(seen),
        answered=answered,
    )


def known_tokens(tokens: tuple[int, ...], compute: Compute) -> tuple[int, ...]:
    """`tokens`, all of them in the vocabulary. Raises ModelError."""
    vocab = compute.engine.span.config.vocab
    for token in tokens:
        if not 0 <= token < vocab:
            raise ModelError(f"token {token} is outside the vocabulary of {vocab}")
    return tokens


def embedding_of(token: TokenOut, peer: str) -> tuple[float, ...]:
    """The finite numbers that came in a token's place. Raises StageLost, which names the last stage's `peer`."""
    given = token.embedding
    if given is None or given.dtype != "float32" or len(given.shape) != 1 or given.shape[0] < 1:
        raise StageLost(peer, f"{peer} was asked for an embedding and gave none")
    rows = tensor_from_bytes(given.dtype, given.shape, given.data)
    if not bool(torch.isfinite(rows).all()):
        raise StageLost(peer, f"the embedding of {peer} is not finite")
    return tuple(rows.tolist())
