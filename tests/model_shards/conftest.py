"""Random tiny checkpoints written by `transformers`, loaded once each, and helpers to run our engine over
them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model_shards import CheckpointIndex, Engine, ModelConfig, Sampling, Step, load_span

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclasses.dataclass
class Reference:
    """A checkpoint directory and the `transformers` model that wrote it, in float32."""

    directory: Path
    model: Any

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dir(self.directory)

    def _forget(self) -> None:
        """A short pass first: dynamic scaling in the reference remembers the longest sequence it has met."""
        self.model(torch.tensor([[0]]), use_cache=False)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        self._forget()
        return self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]

    @torch.no_grad()
    def cached_logits(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits of consecutive pieces of one sequence, through the model's own KV cache."""
        self._forget()
        past, found = None, []
        for piece in pieces:
            out = self.model(torch.tensor([list(piece)]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[0])
        return torch.cat(found)

    @torch.no_grad()
    def logits_with(
        self, tokens: Sequence[int], change: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Logits of the same model with every weight passed through ``change(name, weight)``."""
        model = copy.deepcopy(self.model)
        for name, weight in model.named_parameters():
            weight.data.copy_(change(name, weight.data))
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0]

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        out = self.model.generate(
            torch.tensor([list(prompt)]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return out[0, len(prompt) :].tolist()


class Chain:
    """One session through consecutive engines, as stages of the mesh would run it."""

    def __init__(self, engines: Sequence[Engine], session: str = "s", tokens_max: int = 64) -> None:
        self.engines = list(engines)
        self.session = session
        self.position = 0
        for engine in self.engines:
            engine.open(session, engine.span.start, engine.span.end, tokens_max)

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        return self.engines[-1].logits([self._last_step(tokens, None)])[0]

    def sample(self, tokens: Sequence[int], sampling: Sampling) -> tuple[int, float]:
        result = self.engines[-1].run([self._last_step(tokens, sampling)])[0]
        return result.token, result.logprob

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens, out = list(prompt), []
        for _ in range(count):
            token, _ = self.sample(tokens, Sampling(temperature=0))
            out.append(token)
            tokens = [token]
        return out

    def close(self) -> None:
        for engine in self.engines:
            engine.close(self.session)

    def _last_step(self, tokens: Sequence[int], sampling: Sampling | None) -> Step:
        step = Step(self.session, self.position, tokens=tuple(tokens))
        for engine in self.engines[:-1]:
            hidden = engine.run([step])[0].hidden
            step = Step(self.session, self.position, hidden=hidden)
        step.sample = sampling
        self.position += len(tokens)
        return step


def engines_of(
    directory: Path, cuts: Sequence[int], dtype: str = "float32", kv_bytes_max: int = 1 << 20, **options: Any
) -> list[Engine]:
    """One engine for each span between neighbouring ``cuts``, e.g. (0, 2, 4)."""
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    return [
        Engine(load_span(directory, index, config, a, b, dtype=dtype, **options), kv_bytes_max=kv_bytes_max)
        for a, b in itertools.pairwise(cuts)
    ]


def splits(layers: int) -> list[tuple[int, ...]]:
    """Every way to cut ``layers`` layers into consecutive spans."""
    inner = range(1, layers)
    chosen = [[at for bit, at in enumerate(inner) if mask >> bit & 1] for mask in range(1 << (layers - 1))]
    return [(0, *cuts, layers) for cuts in chosen]


def randomise(model: Any, seed: int) -> None:
    """Weights wide enough that layers, biases and norms all matter to the logits."""
    generator = torch.Generator().manual_seed(seed)
    corrections = [item for item in model.named_buffers() if item[0].endswith("correction_bias")]
    for name, weight in sorted([*model.named_parameters(), *corrections], key=lambda item: item[0]):
        noise = torch.randn(weight.shape, generator=generator)
        wide = 1.5 if "sinks" in name else 0.15
        weight.data.copy_(1 + 0.2 * noise if "norm" in name else wide * noise)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """make_reference(model_type, seed=0, shard_bytes=None, dtype="float32", **config) -> Reference, cached by
    arguments."""
    import transformers

    made: dict[str, Reference] = {}

    def make(
        model_type: str,
        *,
        seed: int = 0,
        shard_bytes: int | None = None,
        dtype: str = "float32",
        **changes: Any,
    ) -> Reference:
        key = json.dumps([model_type, seed, shard_bytes, dtype, changes], sort_keys=True)
        if key not in made:
            values = {**TINY, **changes}
            config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(values)))
            config._attn_implementation = "eager"
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            randomise(model, seed)
            directory = tmp_path_factory.mktemp(model_type)
            kept = model.to(getattr(torch, dtype))
            kept.save_pretrained(directory, max_shard_size=shard_bytes or "1GB")
            made[key] = Reference(directory, kept.float())
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_reference: Callable[..., Reference]) -> Reference:
    """A plain tiny Llama checkpoint, for tests that need any model."""
    return make_reference("llama")


@pytest.fixture
def tools() -> type:
    """The helpers above, for test modules (which cannot import a conftest)."""

    class Tools:
        Chain = Chain
        engines_of = staticmethod(engines_of)
        splits = staticmethod(splits)

    return Tools
