"""Random LoRA adapters for tiny checkpoints, and what they do to the weights, worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


@dataclass
class MadeAdapter:
    """An adapter directory and, by weight name, the product scale * B @ A that it adds, in float64."""

    directory: Path
    added: dict[str, torch.Tensor] = field(default_factory=dict)

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with what the adapter adds to it."""
        if name not in self.added:
            return weight
        return (weight.double() + self.added[name]).to(weight.dtype)


def make_adapter(
    directory: Path,
    base: Path,
    targets: list[str],
    *,
    rank: int = 4,
    alpha: float = 8.0,
    rslora: bool = False,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    layers: list[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> MadeAdapter:
    """Writes an adapter for every weight of ``base`` whose module ends with one of ``targets``."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    if "lm_head" in targets and "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    found, made = {}, MadeAdapter(directory)
    for name in sorted(weights):
        module = name.removesuffix(".weight")
        skipped = layers is not None and not any(f".layers.{layer}." in name for layer in layers)
        if skipped or not any(module == t or module.endswith("." + t) for t in targets):
            continue
        r = next((n for end, n in (ranks or {}).items() if module.endswith("." + end)), rank)
        a = next((n for end, n in (alphas or {}).items() if module.endswith("." + end)), alpha)
        down = (0.3 * torch.randn(r, weights[name].shape[1], generator=generator)).to(dtype)
        up = (0.3 * torch.randn(weights[name].shape[0], r, generator=generator)).to(dtype)
        found[f"{PREFIX}{module}.lora_A.weight"], found[f"{PREFIX}{module}.lora_B.weight"] = down, up
        made.added[name] = (a / (math.sqrt(r) if rslora else r)) * (up.double() @ down.double())
    directory.mkdir(parents=True, exist_ok=True)
    save_file(found, directory / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "acme/base", "r": rank,
        "lora_alpha": alpha, "use_rslora": rslora, "target_modules": targets, "rank_pattern": ranks or {},
        "alpha_pattern": alphas or {}, "layers_to_transform": layers, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": None, "use_dora": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return made


def edit_config(directory: Path, **changes: Any) -> None:
    """Changes fields of the adapter's config."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Any) -> None:
    """Passes the adapter's tensors through ``change(dict)``."""
    path = directory / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def merge(base: Path, made: MadeAdapter, directory: Path) -> Path:
    """A checkpoint with the adapter merged into ``base``."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    save_file({n: made.merged(n, w) for n, w in weights.items()}, directory / "model.safetensors")
    return directory
