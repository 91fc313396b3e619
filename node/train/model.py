"""A trainable model of any dense family that can be served: the same descriptions, with autograd.

Parameters are float32 masters, fused as serving fuses them (query, key and value in one matrix); by their Hugging Face
names they are views of those, so that a checkpoint or an export is the same dictionary. Products are computed in
`precision`. It knows no optimizer, no data and no files but a checkpoint's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model_shards import CheckpointIndex, ModelConfig
from model_shards.families import TensorSpec, layer_tensors, span_tensors
from model_shards.linear import ACTIVATIONS
from model_shards.reader import TensorReader
from model_shards.rope import RotaryTable
from node.errors import ConfigProblem
from node.train.kernels import attend, rms_norm, swiglu
from node.train.recipe import FAMILIES, ModelRecipe

SPREAD = 0.02
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def config_values(recipe: ModelRecipe, vocab: int, end_id: int | None) -> dict[str, Any]:
    """The config.json of the recipe's model, for `vocab` tokens."""
    if recipe.checkpoint is not None:
        values: dict[str, Any] = json.loads((recipe.checkpoint / "config.json").read_text())
        return values
    return {
        "architectures": [ARCHITECTURES[recipe.family]],
        "model_type": recipe.family,
        "vocab_size": vocab,
        "hidden_size": recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "intermediate_size": recipe.intermediate,
        "max_position_embeddings": recipe.context,
        "tie_word_embeddings": recipe.tied,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "torch_dtype": "float32",
        # Families differ in their default, and so do we and transformers; Gemma 3 has two.
        **({} if recipe.family == "gemma3_text" else {"rope_theta": 10000.0}),
        **recipe.more,
    }


Rows = tuple[torch.Tensor, torch.Tensor]
Params = Mapping[str, torch.Tensor]


class Forward:
    """The model as a function of its parameters, by part name. `plain` leaves gradients to autograd, which a compiler
    does better with than with those that are written out."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, recompute: bool = False, plain: bool = False
    ) -> None:
        self.config, self.dtype, self.recompute, self.plain = config, dtype, recompute, plain

    def loss(
        self, params: Params, tokens: torch.Tensor, rotary: list[Rows], masks: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Mean cross-entropy in nats of predicting each next token; `tokens` int64 [batch, n + 1]."""
        logits = self.logits(params, tokens[:, :-1], rotary, masks)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    def logits(
        self, params: Params, tokens: torch.Tensor, rotary: list[Rows], masks: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """int64 [batch, n] -> float32 [batch, n, vocab]. `masks` by sliding window."""
        config = self.config
        embed = params["embed"].to(self.dtype)
        x = F.embedding(tokens, embed)
        if config.embed_scale is not None:
            x = x * torch.tensor(config.embed_scale, dtype=self.dtype)
        for layer in range(config.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    self._layer,
                    params,
                    layer,
                    x,
                    rotary,
                    masks,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = self._layer(params, layer, x, rotary, masks)
        x = self._norm(x, params["norm"])
        scores = F.linear(x, embed if config.tied else params["head"].to(self.dtype)).float()
        if config.logit_cap is not None:
            scores = torch.tanh(scores / config.logit_cap) * config.logit_cap
        return scores

    def _linear(self, params: Params, x: torch.Tensor, part: str) -> torch.Tensor:
        bias = params[part + ".bias"].to(self.dtype) if part + ".bias" in params else None
        return F.linear(x, params[part + ".weight"].to(self.dtype), bias)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last dimension (arXiv 1910.07467); Gemma's in float32, of 1 + weight. A weight [heads, dim]
        norms each head by its own."""
        config = self.config
        offset = config.norm_offset or config.wide_norms
        if weight.dim() > 1:
            unit = F.rms_norm(x.float(), x.shape[-1:], None, config.norm_eps)
            return (unit * (weight + config.norm_offset)).to(x.dtype)
        given = x.float() if offset else x
        weight = weight + config.norm_offset if offset else weight.to(x.dtype)
        if self.plain:
            return F.rms_norm(given, x.shape[-1:], weight, config.norm_eps).to(x.dtype)
        return rms_norm(given, weight, config.norm_eps).to(x.dtype)

    def _layer(
        self,
        params: Params,
        layer: int,
        x: torch.Tensor,
        rotary: list[Rows],
        masks: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        at, config = f"{layer}.", self.config
        mixed = self._attention(params, layer, self._norm(x, params[at + "attn_norm"]), rotary, masks)
        x = x + (self._norm(mixed, params[at + "attn_post_norm"]) if config.post_norms else mixed)
        both = self._linear(params, self._norm(x, params[at + "mlp_norm"]), at + "gate_up")
        if config.activation == "silu" and not self.plain:
            inner = swiglu(both)
        else:
            gate, up = both.chunk(2, -1)
            inner = ACTIVATIONS[config.activation](gate) * up
        inner = self._linear(params, inner, at + "down")
        return x + (self._norm(inner, params[at + "mlp_post_norm"]) if config.post_norms else inner)

    def _attention(
        self,
        params: Params,
        layer: int,
        x: torch.Tensor,
        rotary: list[Rows],
        masks: Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """Causal grouped-query attention; [batch, n, hidden] -> the same."""
        config, at = self.config, f"{layer}."
        batch, count, _ = x.shape
        heads, kv_heads = config.heads, config.kv_heads
        fused = self._linear(params, x, at + "qkv").view(batch, count, heads + 2 * kv_heads, config.head_dim)
        qk, v = torch.split(fused, [heads + kv_heads, kv_heads], 2)
        if config.qk_norm:
            norms = (params[at + "q_norm"].expand(heads, -1), params[at + "k_norm"].expand(kv_heads, -1))
            qk = self._norm(qk, torch.cat(norms))
        rope = config.layer_ropes[layer]
        if rope is not None:
            qk = _rotate(qk, *rotary[rope])
        q, k = torch.split(qk.transpose(1, 2), [heads, kv_heads], 1)
        window = config.windows[layer]
        mask = None if window is None or window >= count else masks[window]
        mixed = attend(q, k, v.transpose(1, 2), mask, config.attention_scale, config.attention_cap)
        return self._linear(params, mixed.transpose(1, 2).reshape(batch, count, -1), at + "out")


@lru_cache(maxsize=8)
def _compiled(config: ModelConfig, dtype: torch.dtype, recompute: bool) -> Any:
    """Compiled once for all models of a shape."""
    return torch.compile(Forward(config, dtype, recompute, plain=True).loss, dynamic=False)


class TrainModel:
    """Made by `make_model`. `params` by part name are what an optimizer trains; `named` are their rows by Hugging Face
    name. `compiled`: the loss through torch.compile, which takes a minute at first and needs a C++ compiler."""

    def __init__(
        self,
        config: ModelConfig,
        values: Mapping[str, Any],
        *,
        precision: str = "float32",
        recompute: bool = False,
        compiled: bool = False,
    ) -> None:
        self.config = config
        self.values = dict(values)
        dtype = DTYPES[precision]
        self._forward = Forward(config, dtype, recompute)
        self._loss = _compiled(config, dtype, recompute) if compiled else self._forward.loss
        self._specs = _specs(config)
        rows: dict[str, int] = {}
        for part, spec in self._specs:
            rows[part] = max(rows.get(part, 0), spec.row + spec.shape[0])
        self.params = {
            part: torch.zeros(rows[part], *spec.shape[1:], requires_grad=True) for part, spec in self._specs
        }
        self.named = {
            spec.name: self.params[part].detach()[spec.row : spec.row + spec.shape[0]]
            for part, spec in self._specs
        }
        self._ropes = [RotaryTable(rope, dtype, torch.device("cpu")) for rope in config.ropes]
        self._masks: tuple[int, dict[int, torch.Tensor]] = (0, {})

    @property
    def count(self) -> int:
        """Parameters, tied ones once."""
        return sum(one.numel() for one in self.params.values())

    def gradients(self, names: Iterable[str]) -> list[torch.Tensor]:
        """Of `named` tensors, zeros where there are none."""
        found = {}
        for part, spec in self._specs:
            grad = self.params[part].grad
            whole = torch.zeros_like(self.params[part]) if grad is None else grad
            found[spec.name] = whole[spec.row : spec.row + spec.shape[0]]
        return [found[name] for name in names]

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of predicting each next token; `tokens` int64 [batch, n + 1]."""
        count = tokens.shape[1] - 1
        found: torch.Tensor = self._loss(self.params, tokens, self._rotary(count), self._windows(count))
        return found

    def plain_loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same, never compiled: for batches of sizes that come once."""
        count = tokens.shape[1] - 1
        return self._forward.loss(self.params, tokens, self._rotary(count), self._windows(count))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [batch, n] -> float32 [batch, n, vocab]."""
        count = tokens.shape[1]
        return self._forward.logits(self.params, tokens, self._rotary(count), self._windows(count))

    def _rotary(self, count: int) -> list[Rows]:
        return [table.rows(0, count) for table in self._ropes]

    def _windows(self, count: int) -> dict[int, torch.Tensor]:
        """For each sliding window shorter than the text: [n, n], True where a query may look."""
        if self._masks[0] != count:
            whole = torch.ones(count, count, dtype=torch.bool).tril()
            shorter = {one for one in self.config.windows if one is not None and one < count}
            self._masks = (count, {window: whole.triu(1 - window) for window in shorter})
        return self._masks[1]


def make_model(
    recipe: ModelRecipe,
    vocab: int,
    end_id: int | None = None,
    *,
    seed: int = 1,
    precision: str = "float32",
    recompute: bool = False,
    compiled: bool = False,
) -> TrainModel:
    """From scratch: normal weights of deviation 0.02, divided by sqrt(2 layers) where they end a branch (GPT-2);
    the same seed gives the same bits. Or from the recipe's checkpoint. Raises ConfigProblem, and model_shards'
    ConfigError and CheckpointError for a directory that cannot be used."""
    values = config_values(recipe, vocab, end_id)
    config = ModelConfig.from_dict(values)
    if config.family not in FAMILIES or config.packing is not None:
        what = "a dense model that is not quantised, of one of " + ", ".join(FAMILIES)
        raise ConfigProblem(
            "model.checkpoint", config.family if config.packing is None else "packed weights", what
        )
    if config.vocab < vocab:
        raise ConfigProblem(
            "data.tokenizer", f"{vocab} tokens", f"at most {config.vocab}, which the model knows"
        )
    model = TrainModel(config, values, precision=precision, recompute=recompute, compiled=compiled)
    with torch.no_grad():
        if recipe.checkpoint is not None:
            _load(model, recipe.checkpoint)
        else:
            _initialise(model, seed)
    return model


def _initialise(model: TrainModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named.items():
        if value.dim() == 1:
            value.fill_(0.0 if name.endswith("bias") or model.config.norm_offset else 1.0)
            continue
        ends = name.endswith(("o_proj.weight", "down_proj.weight"))
        value.normal_(0, SPREAD / (math.sqrt(2 * model.config.layers) if ends else 1.0), generator=generator)


def _load(model: TrainModel, directory: Path) -> None:
    index = CheckpointIndex.open(directory)
    index.check(model.config)
    specs = span_tensors(model.config, 0, model.config.layers)
    with TensorReader(directory, index, None, None) as reader:
        for spec in specs:
            reader.read_into(spec.name, index.tensor(spec.name), model.named[spec.name])


def _specs(config: ModelConfig) -> list[tuple[str, TensorSpec]]:
    """Every tensor of the model with the name of its parameter, each once."""
    inside = [
        (f"{layer}.{spec.part}", spec)
        for layer in range(config.layers)
        for spec in layer_tensors(config, layer)
    ]
    known = {spec.name for _, spec in inside}
    outside = [spec for spec in span_tensors(config, 0, config.layers) if spec.name not in known]
    first = [(spec.part, spec) for spec in outside if spec.part == "embed"]
    return [*first, *inside, *((spec.part, spec) for spec in outside if spec.part != "embed")]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [batch, n, heads, dim] turned by their positions' rows (see model_shards/rope.py)."""
    dim = cos.shape[-1]
    if dim != heads.shape[-1]:
        return torch.cat((_rotate(heads[..., :dim], cos, sin), heads[..., dim:]), -1)
    return torch.addcmul(heads * cos, heads.roll(dim // 2, -1), sin)
