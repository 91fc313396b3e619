"""How fast this machine reads prompts and writes tokens: an engine over a whole model, timed from outside.

Also writes random checkpoints of any shape, so that nothing has to be downloaded to measure. Knows nothing of other
programs that one may compare with.
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from model_shards.bench import micro_benchmark
from model_shards.checkpoint import CheckpointIndex
from model_shards.config import ModelConfig
from model_shards.dtypes import tensor_to_bytes
from model_shards.engine import Engine
from model_shards.errors import ConfigError
from model_shards.families import TensorSpec, embed_tensors, head_tensors, layer_tensors
from model_shards.fields import read_json_object
from model_shards.sampler import Sampling
from model_shards.span import load_span
from model_shards.steps import Step

CHUNK_TOKENS = 128
READ_BYTES = 512 << 20
READ_TRIES = 5
WARM_STEPS = 3
SPREAD = 0.02


def random_checkpoint(config_file: Path, directory: Path, seed: int = 0) -> None:
    """Writes a bfloat16 checkpoint of normal random weights into ``directory``, of the shape that ``config_file`` (a
    config.json) says; one tensor is in memory at a time. Raises ConfigError."""
    values = read_json_object(config_file)
    config = ModelConfig.from_dict(values)
    if config.packing is not None:
        raise ConfigError("quantization_config", "given", "none: packed weights cannot be made at random")
    specs = list({spec.name: spec for spec in _all_tensors(config)}.values())
    header: dict[str, object] = {}
    at = 0
    for spec in specs:
        end = at + 2 * math.prod(_stored_shape(spec))
        header[spec.name] = {"dtype": "BF16", "shape": _stored_shape(spec), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            noise = torch.empty(_stored_shape(spec), dtype=torch.float32).normal_(
                0, SPREAD, generator=generator
            )
            if spec.part.endswith("norm"):
                noise += 1
            file.write(tensor_to_bytes(noise.bfloat16())[2])
    (directory / "config.json").write_text(json.dumps(values))


def bench_decode(
    directory: Path,
    *,
    dtype: str = "bfloat16",
    quant: str = "none",
    device: str = "cpu",
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, float]:
    """Greedy decoding of ``batch`` sessions at once after prompts of ``prompt_tokens``, the model whole in one process.

    Prompts are read in pieces of ``chunk_tokens``, as a node does. ``decode_tokens_per_s`` counts those of all
    sessions; ``read_gb_per_s`` is how fast the weights that one pass meets were read, ``machine_read_gb_per_s`` what
    the machine can. Raises ModelError."""
    machine = read_bytes_per_s(device, dtype)
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    span = load_span(directory, index, config, 0, config.layers, device=device, dtype=dtype, quant=quant)
    room = prompt_tokens + new_tokens + WARM_STEPS + 1
    blocks = -(-room // 16) * 16 * config.layers * (batch + 1)
    engine = Engine(span, kv_bytes_max=blocks * config.kv_elements * span.dtype.itemsize)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, config.vocab, (batch, prompt_tokens), generator=generator).tolist()
    _read_prompt(engine, "warm", prompts[0], chunk_tokens, room)
    engine.close("warm")
    names = [f"s{at}" for at in range(batch)]
    began = time.perf_counter()
    tokens = [
        _read_prompt(engine, name, prompt, chunk_tokens, room)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    prefill_s = time.perf_counter() - began
    tokens = _decode(engine, names, tokens, prompt_tokens, WARM_STEPS)
    began = time.perf_counter()
    _decode(engine, names, tokens, prompt_tokens + WARM_STEPS, new_tokens)
    decode_s = time.perf_counter() - began
    # Of an embedding that is no head only single rows are read.
    idle = span.embed_bytes if not config.tied else 0
    return {
        "prefill_tokens_per_s": batch * prompt_tokens / prefill_s,
        "decode_tokens_per_s": batch * new_tokens / decode_s,
        "weight_bytes": span.weight_bytes,
        "read_gb_per_s": (span.weight_bytes - idle) * new_tokens / decode_s / 1e9,
        "machine_read_gb_per_s": machine / 1e9,
    }


def read_bytes_per_s(device: str = "cpu", dtype: str = "bfloat16") -> float:
    """The best of several ways to read memory: a product with a vector, and a sum of what no cache holds."""
    best = micro_benchmark(device, dtype)["read_bytes_per_s"]
    much = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
    for _ in range(READ_TRIES):
        began = time.perf_counter()
        int(much.sum())
        best = max(best, READ_BYTES / (time.perf_counter() - began))
    return best


def _read_prompt(engine: Engine, name: str, prompt: list[int], chunk: int, room: int) -> int:
    """Opens a session, reads its prompt and gives its first token."""
    engine.open(name, 0, engine.span.config.layers, room)
    token: int | None = None
    for at in range(0, len(prompt), chunk):
        last = at + chunk >= len(prompt)
        step = Step(
            name, at, tuple(prompt[at : at + chunk]), sample=Sampling(temperature=0) if last else None
        )
        token = engine.run([step])[0].token
    return token or 0


def _decode(engine: Engine, names: list[str], tokens: list[int], position: int, count: int) -> list[int]:
    """``count`` more tokens of every session."""
    greedy = Sampling(temperature=0)
    for at in range(position, position + count):
        steps = [Step(name, at, (token,), sample=greedy) for name, token in zip(names, tokens, strict=True)]
        tokens = [result.token or 0 for result in engine.run(steps)]
    return tokens


def _all_tensors(config: ModelConfig) -> Iterable[TensorSpec]:
    yield from embed_tensors(config)
    for layer in range(config.layers):
        yield from layer_tensors(config, layer)
    yield from head_tensors(config)


def _stored_shape(spec: TensorSpec) -> tuple[int, ...]:
    if not spec.stack:
        return spec.shape
    return spec.stack, spec.shape[1], spec.shape[0] // spec.stack
