"""What a node says of a model that it offers: its shape in memory, and what its hosts must be like.

Pure but for reading what `model_shards` already read of the files. It publishes nothing.
"""

from __future__ import annotations

from model_shards import CheckpointIndex, ModelConfig, shape_of
from node import adverts
from node.adverts import ModelAdvert
from node.config import DaemonConfig
from node.errors import ConfigProblem
from node.serve.protocol import PIECE_TOKENS

CONTEXT_TOKENS_MAX = 1 << 17
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
LOGIT_BYTES = 4


def model_advert(
    config: ModelConfig,
    index: CheckpointIndex,
    settings: DaemonConfig,
    *,
    name: str,
    manifest_id: str,
    created_s: int,
    copies: int,
) -> ModelAdvert:
    """The advert of a model under this node's settings. Raises ConfigProblem for one beyond all bounds."""
    dtype = settings.dtype if settings.dtype != "auto" else natural_dtype(index)
    context_tokens = min(config.context_tokens, CONTEXT_TOKENS_MAX)
    advert = ModelAdvert(
        name=name,
        manifest_id=manifest_id,
        created_s=created_s,
        dtype=dtype,
        quant=settings.quant,
        kv_quant=settings.kv_quant,
        copies=copies,
        concurrency=settings.concurrency,
        context_tokens=context_tokens,
        working_bytes=working_bytes(
            config, dtype, settings.concurrency, 0 if settings.kv_quant == "none" else context_tokens
        ),
        require=settings.require,
        ends_require=settings.ends_require,
        **shape_of(config, index, dtype, settings.quant, settings.kv_quant),
    )
    if adverts.read(ModelAdvert, adverts.write(advert)) is None:
        raise ConfigProblem("model", name, f"at most {adverts.LAYERS_MAX} layers and sane sizes")
    return advert


def natural_dtype(index: CheckpointIndex) -> str:
    """The checkpoint's own precision: float32 stays, everything else computes in bfloat16."""
    dtypes = {index.tensor(name).dtype for name in index.names()}
    return "float32" if dtypes == {"F32"} else "bfloat16"


def working_bytes(config: ModelConfig, dtype: str, concurrency: int, widened_tokens: int = 0) -> int:
    """Memory that a stage needs beside weights and cache: the widest layer's activations for one piece of a prompt, and
    the logits of the sessions that decode together.

    A position holds its state before and after the layer, queries, keys and values, what attention gives, and gate, up
    and their product (of as many experts as it is sent to). Of a cache in eight bits a layer's rows for one session of
    `widened_tokens` are made wide again while attention reads them.
    """
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    wide = max(config.intermediate, config.expert_width * config.experts_per_token)
    position = (2 * config.hidden + heads + 3 * wide) * ITEM_BYTES[dtype]
    widened = widened_tokens * config.kv_elements * ITEM_BYTES[dtype]
    return PIECE_TOKENS * position + concurrency * config.vocab * LOGIT_BYTES + widened
