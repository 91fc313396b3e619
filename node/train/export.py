"""A trained state as a Hugging Face directory, which `transformers` and `shoal add` read. Knows files only."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model_shards import ModelConfig
from model_shards.families import span_tensors
from node.errors import ConfigProblem
from node.train.corpus import END_OF_TEXT

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(
    state: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    tokenizer_json: str,
    directory: Path,
    *,
    end_id: int | None = None,
    tokenizer_from: Path | None = None,
) -> Path:
    """Writes the model of `state` (float32, by Hugging Face names; whatever else it holds is left out) with its
    config.json `values` and tokenizer to `directory`, all of it or nothing. `tokenizer_from`: a model directory whose
    other tokenizer files are taken along.

    Raises ConfigProblem for a directory that is in use or cannot be written, and for a state that lacks a tensor."""
    config = ModelConfig.from_dict(values)
    tensors: dict[str, torch.Tensor] = {}
    for spec in span_tensors(config, 0, config.layers):
        found = state.get(spec.name)
        if found is None or tuple(found.shape) != tuple(spec.shape):
            shape = None if found is None else tuple(found.shape)
            raise ConfigProblem(f"state: {spec.name}", shape, f"a tensor of shape {tuple(spec.shape)}")
        tensors[spec.name] = found.detach().to(torch.float32).contiguous()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigProblem("directory", str(directory), "one that does not exist yet, or is empty")
    made = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
    try:
        made.mkdir(parents=True)
        try:
            _fill(made, tensors, values, tokenizer_json, end_id, config.context_tokens, tokenizer_from)
            if directory.exists():
                directory.rmdir()
            made.rename(directory)
        except BaseException:  # whatever ended it leaves no half of a model
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigProblem(
            "directory", str(directory), f"one that can be written ({error.strerror})"
        ) from None
    return directory


def _fill(
    made: Path,
    tensors: dict[str, torch.Tensor],
    values: Mapping[str, Any],
    tokenizer_json: str,
    end_id: int | None,
    context: int,
    tokenizer_from: Path | None,
) -> None:
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    _flush(made / "model.safetensors")
    _write(made / "config.json", json.dumps({**values, "torch_dtype": "float32"}, indent=2))
    end = values.get("eos_token_id") if end_id is None else end_id
    _write(made / "generation_config.json", json.dumps({"eos_token_id": end, "do_sample": False}, indent=2))
    _write(made / "tokenizer.json", tokenizer_json)
    for name in TOKENIZER_FILES:
        if tokenizer_from is not None and (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, made / name)
    if not (made / TOKENIZER_FILES[0]).exists():
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        }
        if end_id is not None:
            settings["eos_token"] = END_OF_TEXT
        _write(made / TOKENIZER_FILES[0], json.dumps(settings, indent=2))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
