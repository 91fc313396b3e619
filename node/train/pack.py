"""What every member of a run needs, as a folder of files that the mesh copies: the recipe, the model's configuration,
the tokens. It knows nothing of who is a member.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shards import ModelConfig
from node.errors import ConfigProblem
from node.train.corpus import MANIFEST, TOKENS, Corpus, read_corpus, tokenised
from node.train.model import TrainModel, config_values, make_model
from node.train.recipe import Recipe, read_recipe

VERSION = 1
RUN = "run.json"
NOTE = "text.txt"
CONTEXT_ANY = 1 << 24


@dataclass(frozen=True, slots=True)
class Pack:
    """A run's files, read. `values` is the model's config.json."""

    recipe: Recipe
    values: dict[str, Any]
    corpus: Corpus


def write_pack(recipe: Recipe, cache: Path, directory: Path) -> Path:
    """Tokenise the recipe's data and lay out its files in `directory`. Raises ConfigProblem."""
    tokens = tokenised(recipe.data, cache)
    corpus = read_corpus(tokens, recipe.data)
    corpus.batch(recipe.inner.seed, 0, 0, 1)  # too short a text is told now, and not at the first step
    values = config_values(recipe.model, corpus.vocab, corpus.end_id)
    directory.mkdir(parents=True)
    for name in (TOKENS, MANIFEST):
        try:
            os.link(tokens / name, directory / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(tokens / name, directory / name)
    (directory / NOTE).write_text("the text itself stays where it was; its tokens lie beside this file\n")
    said = {"version": VERSION, "created_s": time.time(), "recipe": dict(recipe.values), "model": values}
    (directory / RUN).write_text(json.dumps(said, indent=1), encoding="utf-8")
    return directory


def read_pack(directory: Path) -> Pack:
    """What `write_pack` made, here or on another computer. Raises ConfigProblem."""
    try:
        said = json.loads((directory / RUN).read_bytes())
        if said["version"] != VERSION:
            raise ConfigProblem(
                RUN, said["version"], f"version {VERSION}; run the same version on all computers"
            )
        recipe = _read_elsewhere(said["recipe"], directory)
        return Pack(recipe, dict(said["model"]), read_corpus(directory, recipe.data))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigProblem(RUN, str(problem), "a run's files as its first member wrote them") from None


def _read_elsewhere(values: Mapping[str, Any], directory: Path) -> Recipe:
    """The recipe, without the files of the computer that it was written on."""
    data = {**values["data"], "files": [str(directory / NOTE)], "tokenizer": "bytes"}
    return read_recipe({**values, "data": data, "model": {"context": CONTEXT_ANY}}, directory)


def fresh_model(recipe: Recipe, corpus: Corpus) -> TrainModel:
    """The model that a run begins with. Raises ConfigProblem, ModelError."""
    inner = recipe.inner
    return make_model(
        recipe.model, corpus.vocab, corpus.end_id,
        seed=inner.seed, precision=inner.precision, recompute=inner.recompute, compiled=inner.compile,
    )  # fmt: skip


def empty_model(pack: Pack) -> TrainModel:
    """The run's model with zeros, for whoever takes up its state. Raises ModelError."""
    inner = pack.recipe.inner
    config = ModelConfig.from_dict(pack.values)
    return TrainModel(
        config,
        pack.values,
        precision=inner.precision,
        recompute=inner.recompute,
        compiled=inner.compile,
    )
